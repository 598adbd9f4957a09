"""WeightEntropy gives over updates and ranks what the function gives on everything at once."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from grok_callbacks.functional import weight_entropy
from grok_callbacks.metrics import WeightEntropy
from tests.metrics._common import check_metric
from tests.metrics._ddp import metrics_on_two_ranks

WEIGHT = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
ROWS = [WEIGHT[:2], WEIGHT[2:3], WEIGHT[3:]]


@pytest.mark.parametrize("distribution", ["replicated", "sharded"])
def test_metric(distribution):
    check_metric(partial(WeightEntropy, distribution=distribution), ROWS, weight_entropy(WEIGHT))


def test_two_ranks():
    """Shards count once, replicas too."""
    cases = {
        "sharded": (partial(WeightEntropy, distribution="sharded"), ROWS[:1], ROWS[1:]),
        "replicated": (WeightEntropy, ROWS, ROWS),
    }
    for rank in metrics_on_two_ranks(cases):
        for name, value in rank.items():
            torch.testing.assert_close(value, weight_entropy(WEIGHT), rtol=1e-12, atol=0, msg=name)


def test_what_is_not_finite_stays_until_reset():
    metric = WeightEntropy()
    metric.update(torch.tensor([1.0, math.inf]))
    metric.update(torch.tensor([0.5]))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.tensor([0.5]))
    assert metric.compute().item() == pytest.approx(math.log(2) / 2)


def test_refuses_unknown_distributions():
    with pytest.raises(ValueError, match="`distribution` must be"):
        WeightEntropy(distribution="split")
