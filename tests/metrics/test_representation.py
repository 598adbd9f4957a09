"""The rivals' signals give over updates and ranks what the functions give on everything at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from grok_callbacks.functional import representation as functional
from grok_callbacks.metrics import (
    ClassDistanceRatio,
    LossOscillation,
    PredictionChurn,
    PredictionEntropy,
    RepresentationEntropy,
)
from tests.metrics._common import check_metric
from tests.metrics._ddp import metrics_on_two_ranks


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.arange(18) * 5 % 3
FEATURES = draw(0, 18, 4) + LABELS[:, None]
LOGITS, PREVIOUS = draw(1, 18, 3), draw(2, 18, 3)
LOSSES = 5 - 0.1 * torch.arange(18.0, dtype=torch.float64) + 0.3 * draw(3, 18)
SPLIT = (4, 2, 12)

CASES = {
    "entropy": (RepresentationEntropy, (FEATURES,), functional.representation_entropy(FEATURES)),
    "classes": (ClassDistanceRatio, (FEATURES, LABELS), functional.class_distance_ratio(FEATURES, LABELS)),
    "prediction": (PredictionEntropy, (LOGITS,), functional.prediction_entropy(LOGITS)),
    "churn": (PredictionChurn, (LOGITS, PREVIOUS), functional.prediction_churn(LOGITS, PREVIOUS)),
    "oscillation": (LossOscillation, (LOSSES,), functional.loss_oscillation(LOSSES)),
    "early": (partial(LossOscillation, num_losses=9), (LOSSES,), functional.loss_oscillation(LOSSES[:9])),
}


def in_batches(arguments):
    return list(zip(*(argument.split(SPLIT) for argument in arguments), strict=True))


@pytest.mark.parametrize(("factory", "arguments", "expected"), CASES.values(), ids=CASES)
def test_over_updates(factory, arguments, expected):
    assert not expected.isnan()
    check_metric(factory, in_batches(arguments), expected)


def test_on_two_ranks():
    cases = {}
    for name, (factory, arguments, _) in CASES.items():
        data = in_batches(arguments)
        replicated = factory().distribution == "replicated"
        cases[name] = (factory, data, data) if replicated else (factory, data[:1], data[1:])
    for result in metrics_on_two_ranks(cases):
        for name, (_, _, expected) in CASES.items():
            torch.testing.assert_close(result[name], expected, msg=name)


def test_losses_one_at_a_time():
    metric = LossOscillation(num_losses=9)
    for loss in LOSSES:
        metric.update(loss)
    torch.testing.assert_close(metric.compute(), functional.loss_oscillation(LOSSES[:9]))
    assert sum(len(held) for held in metric.losses) == 9


def test_state_is_a_copy():
    for name, (factory, arguments, expected) in CASES.items():
        copies = [argument.clone() for argument in arguments]
        metric = factory()
        metric.update(*copies)
        for copy in copies:
            copy.zero_()
        torch.testing.assert_close(metric.compute(), expected, msg=name)


def test_bad_arguments_are_refused_before_they_are_held():
    metric = ClassDistanceRatio()
    with pytest.raises(ValueError, match="labels"):
        metric.update(FEATURES, LABELS.double())
    with pytest.raises(ValueError, match="labels"):
        metric.update(FEATURES, LABELS[:-1])
    assert not metric.features
    with pytest.raises(ValueError, match="losses"):
        LossOscillation().update(torch.ones(2, 2))
    with pytest.raises(ValueError, match="num_losses"):
        LossOscillation(num_losses=4)
