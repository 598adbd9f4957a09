"""The cosine of the gradients of two halves, against autograd by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grok_callbacks import GradientCoherenceMonitor, Probe, Recorder

INPUTS = torch.randn(41, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(41) % 4


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))


def measured(model, probe=None, **settings):
    probe = probe or Probe(train=(INPUTS, LABELS))
    values = Recorder(model, [GradientCoherenceMonitor(on_error="raise", **settings)], probe).record(step=0)
    return {key.removeprefix("grok/gradient_coherence"): value for key, value in values.items()}


def gradients(model, half):
    model.eval()
    loss = F.cross_entropy(model(INPUTS[half]), LABELS[half])
    return dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), strict=True)
    )


def test_against_gradients_by_hand():
    model = network()
    first, second = gradients(model, slice(0, None, 2)), gradients(model, slice(1, None, 2))
    model.train()
    values = measured(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    def cosine(names):
        one, other = (torch.cat([gradient[name].flatten() for name in names]) for gradient in (first, second))
        return float(F.cosine_similarity(one, other, dim=0))

    expected = {"": cosine(first), "/0.weight": cosine(["0.weight"]), "/3.weight": cosine(["3.weight"])}
    assert values == pytest.approx(expected, abs=1e-5)


def test_what_is_not_trained_is_left_out():
    model = network()
    model[0].requires_grad_(False)
    assert set(measured(model)) == {"", "/3.weight"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of them is trained"):
        measured(model)


def test_halves_that_agree_and_that_do_not():
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    inputs = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for labels, expected in (([0, 0], 1.0), ([0, 1], -1.0)):
        assert measured(model, Probe(train=(inputs, torch.tensor(labels))))[""] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:.*; said once")
def test_one_sample_has_no_halves():
    values = measured(network(), Probe(train=(INPUTS[:1], LABELS[:1])))
    assert len(values) == 3
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.filterwarnings("ignore:.*; said once")
def test_weights_that_are_not_finite_give_no_number():
    model = network()
    model[0].weight.data[0, 0] = torch.nan
    assert all(math.isnan(value) for value in measured(model).values())
