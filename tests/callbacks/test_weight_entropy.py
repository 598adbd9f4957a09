"""Weight entropy of every matrix of a network, each against its sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from grok_callbacks import Recorder, WeightEntropyMonitor
from grok_callbacks._compat import MisconfigurationException
from tests._common import fit


class Mixed(nn.Module):
    """One of each kind of matrix, and one that is there twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.convolution, self.norm = nn.Embedding(5, 4), nn.Conv1d(4, 3, 2), nn.LayerNorm(3)
        self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.position = nn.Parameter(torch.randn(1, 7, 4))


def entropy(weight):
    """Term by term."""
    return -sum(abs(w) * math.log(abs(w)) for w in weight.double().flatten().tolist() if w)


def test_each_matrix_once():
    model = Mixed()
    values = Recorder(model, [WeightEntropyMonitor()]).record(step=0)
    names = ["position", "embedding.weight", "convolution.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert set(values) == {f"grok/weight_entropy/{name}" for name in names}
    for name in names:
        assert values[f"grok/weight_entropy/{name}"] == pytest.approx(entropy(model.get_parameter(name).detach()), rel=1e-12)


def test_chosen_ones_in_a_trainer():
    _, trainer = fit([WeightEntropyMonitor("net.0.*")])
    logged = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("grok/")}
    assert set(logged) == {"grok/weight_entropy/net.0.weight"}


def test_wrong_glob():
    with pytest.raises(MisconfigurationException, match=r"`parameters`: 'net.0.bias' matches nothing.*net.0.weight"):
        fit([WeightEntropyMonitor("net.0.bias")])


def test_zeros_and_nan():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[1].weight, math.nan)
    recorder = Recorder(model, [WeightEntropyMonitor()])
    with pytest.warns(UserWarning, match=r"weight_entropy/1.weight is nan at step 0; said once"):
        values = recorder.record(step=0)
    assert values["grok/weight_entropy/0.weight"] == 0
    assert math.isnan(values["grok/weight_entropy/1.weight"])
