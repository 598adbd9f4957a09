"""Whose weights are measured where a callback of Lightning's averages them."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch import callbacks
from torch import nn

from grok_callbacks import AtValidation, EverySteps, NormMonitor
from tests._common import Classifier, Plain, fit, loader

pytestmark = pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="Lightning has no WeightAveraging")


def norm_of(module: nn.Module) -> float:
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()]).norm().item()


class Weights(L.Callback):
    """The norms of what is trained after each step, and of what is validated."""

    def __init__(self):
        self.trained, self.validated = {}, {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.trained[trainer.global_step] = norm_of(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *args):
        if not trainer.sanity_checking:
            self.validated[trainer.global_step] = norm_of(pl_module)


def run(before, after, average=None):
    weights = Weights()
    average = average or callbacks.WeightAveraging(avg_fn=lambda old, new, _: 0.5 * old + 0.5 * new)
    fit([weights, *before, average, *after], Plain(), validation=loader(8), max_epochs=3)
    assert weights.validated
    return weights


def values(monitor):
    return dict(zip(monitor.history["grok/norm"].steps, monitor.history["grok/norm"].values, strict=True))


@pytest.mark.parametrize("first", [True, False])
def test_measurements_are_of_the_weights_that_are_trained(first):
    monitor = NormMonitor(schedule=EverySteps(1))
    weights = run([monitor] if first else [], [] if first else [monitor])
    found = values(monitor)
    found.pop(0)
    assert found == pytest.approx(weights.trained, rel=1e-12)
    assert all(abs(weights.validated[step] - found[step]) > 1e-6 for step in weights.validated), "validated is the average"


@pytest.mark.parametrize(("before", "after", "sees_average"), [([0], [], True), ([], [0], False), ([1], [0], True)])
def test_at_validation_it_hangs_on_the_place_of_the_first_monitor(before, after, sees_average):
    monitors = [NormMonitor(schedule=AtValidation()), NormMonitor(schedule=EverySteps(100), prefix="other")]
    weights = run([monitors[number] for number in before], [monitors[number] for number in after])
    found = values(monitors[0])
    expected = weights.validated if sees_average else weights.trained
    assert {step: found[step] for step in weights.validated} == pytest.approx(
        {step: expected[step] for step in weights.validated}, rel=1e-12
    )


def test_stochastic_averaging_validates_what_is_trained():
    monitor = NormMonitor(schedule=EverySteps(1))
    weights = run([], [monitor], callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1))
    found = values(monitor)
    assert {step: found[step] for step in weights.validated} == pytest.approx(weights.validated, rel=1e-12)


def test_for_batch_norm_an_epoch_is_added_in_which_the_average_is_measured():
    monitor = NormMonitor(schedule=EverySteps(1))
    weights, module = Weights(), Classifier()
    average = callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    fit([weights, average, monitor], module, validation=loader(8), max_epochs=3, max_steps=-1)
    found = values(monitor)
    last = 3 * len(loader())
    assert found[last] == pytest.approx(weights.validated[last], rel=1e-12)
    assert max(found) > last
    assert found[max(found)] == pytest.approx(norm_of(module), rel=1e-12)
    assert abs(found[max(found)] - found[last]) > 1e-6
