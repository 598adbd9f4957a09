"""Reentrant activation checkpointing, in which ``torch.autograd.grad`` is not to be had."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from grok_callbacks import EverySteps, GradientCoherenceMonitor, default_callbacks
from tests._common import Plain, fit, loader

WITHOUT_GRADIENTS = {"RobustnessMonitor", "GradientCoherenceMonitor"}


class Checkpointed(Plain):
    """Its second and third layer are checkpointed, or the second alone."""

    def __init__(self, last_is_inside):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.last_is_inside = last_is_inside

    def forward(self, x):
        end = 5 if self.last_is_inside else 4
        return self.net[end:](checkpoint(self.net[2:end], self.net[:2](x), use_reentrant=True))


def run(monitors, last_is_inside):
    module = Checkpointed(last_is_inside)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(monitors, module, validation=loader(8), max_steps=3)
    said = [str(warning.message) for warning in caught if "switched off" in str(warning.message)]
    return module.state_dict(), said


@pytest.mark.parametrize("last_is_inside", [True, False])
def test_what_needs_gradients_is_switched_off_and_the_rest_works(last_is_inside):
    torch.manual_seed(0)
    bare, _ = run([], last_is_inside)
    torch.manual_seed(0)
    monitors = default_callbacks("full", schedule=EverySteps(1))
    weights, said = run(monitors, last_is_inside)
    assert all(torch.equal(value, weights[name]) for name, value in bare.items())

    def kind(label):
        return label.partition("(")[0]

    off = WITHOUT_GRADIENTS | ({"FeatureLearningMonitor"} if last_is_inside else set())
    assert {kind(message) for message in said} == off
    assert len(said) == len(off)
    recorder = monitors[0]._recorder
    # The inputs are not two operands.
    assert {kind(label) for label in recorder.switched_off} == off | {"CommutativityMonitor"}
    for monitor in monitors:
        if kind(monitor.label) not in {*off, "CommutativityMonitor", "GrokkingForecast"}:
            keys = [key for key in recorder.keys_of(monitor) if "/onset/" not in key]
            # What compares with the measurement before begins at the second.
            assert all(recorder.history[key].steps[-3:] == [1, 2, 3] for key in keys)
            assert keys


class FromTheInputs(Checkpointed):
    """Its first layer is checkpointed, which trains nothing of it."""

    def forward(self, x):
        return self.net[2:](checkpoint(self.net[:2], x, use_reentrant=True))


def test_a_part_that_begins_at_the_inputs_has_no_gradients():
    monitor = GradientCoherenceMonitor(schedule=EverySteps(1))
    module = FromTheInputs(last_is_inside=False)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit([monitor], module, validation=loader(8), max_steps=3)
    assert monitor._recorder.switched_off == []
    for name, weight in module.state_dict().items():
        is_checkpointed = name.startswith("net.0")
        assert torch.equal(weight, before[name]) == is_checkpointed
        key = f"grok/gradient_coherence/{name}"
        assert key in monitor.history or name.endswith("bias")
        if key in monitor.history:
            assert all(math.isnan(value) == is_checkpointed for value in monitor.history[key].values)
