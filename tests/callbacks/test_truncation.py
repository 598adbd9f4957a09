"""The cut network's loss and accuracy, against weights cut by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grok_callbacks import Probe, Recorder, TruncationMonitor
from grok_callbacks._compat import MisconfigurationException

INPUTS = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 8


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 8))


def measured(model, targets=LABELS, **settings):
    values = Recorder(model, [TruncationMonitor(on_error="raise", **settings)], Probe(train=(INPUTS, targets))).record(step=0)
    return {key.removeprefix("grok/truncation/"): value for key, value in values.items()}


@torch.no_grad()
def cut_by_hand(model, share, names):
    model = copy.deepcopy(model)
    for name in names:
        weight = model.get_submodule(name).weight
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        rank = int(((s**2).cumsum(0) / (s**2).sum() < share).sum()) + 1
        weight.copy_((u[:, :rank] * s[:rank]) @ v[:rank])
    return model(INPUTS)


@pytest.mark.parametrize("names", [["0", "2"], ["2"]])
def test_against_weights_cut_by_hand(names):
    model = network()
    before = copy.deepcopy(model.state_dict())
    chosen = {} if len(names) == 2 else {"parameters": "2.weight"}
    values = measured(model, **chosen)
    expected = {}
    for share in (0.5, 0.7, 0.9):
        logits = cut_by_hand(model, share, names)
        expected[f"loss/{share}"] = float(F.cross_entropy(logits, LABELS))
        expected[f"accuracy/{share}"] = float((logits.argmax(1) == LABELS).float().mean())
    assert values == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_small_matrices_stay_whole_unless_there_are_no_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 3), nn.Linear(3, 8))
    assert measured(model, shares=[0.5])["loss/0.5"] == pytest.approx(
        float(F.cross_entropy(cut_by_hand(model, 0.5, ["0", "1"]), LABELS)), rel=1e-5
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 3), nn.Linear(3, 8))
    assert measured(model, shares=[0.5])["loss/0.5"] == pytest.approx(
        float(F.cross_entropy(cut_by_hand(model, 0.5, ["0"]), LABELS)), rel=1e-5
    )


def test_regression_has_no_accuracy():
    assert set(measured(network(), torch.randn(40, 8), shares=[0.5, 1.0])) == {"loss/0.5", "loss/1"}


@pytest.mark.filterwarnings("ignore:.*; said once")
def test_weights_that_are_not_finite_give_no_number():
    model = network()
    model[0].weight.data[0, 0] = torch.nan
    assert all(math.isnan(value) for key, value in measured(model).items() if "loss" in key)


def test_shares_out_of_range():
    with pytest.raises(MisconfigurationException, match="`shares`"):
        TruncationMonitor(shares=[0.0])


def test_a_model_without_matrices():
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(8))

        def forward(self, inputs):
            return inputs[:, :8] * self.gain

    with pytest.raises(ValueError, match="no parameter"):
        measured(Gain())
