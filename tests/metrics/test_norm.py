"""ParameterNorm gives over updates and ranks what the function gives on everything at once."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from grok_callbacks.functional import parameter_norm
from grok_callbacks.metrics import ParameterNorm
from tests.metrics._common import check_metric
from tests.metrics._ddp import metrics_on_two_ranks

ORDERS = [1.0, 2.0, 3.0, math.inf]


def batches():
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(shape, generator=generator) for shape in [(3, 4), (5,), (2, 2, 2), ()])
    return [[a, b], {"c": c}, d]


def everything(data):
    parts = [list(part.values()) if isinstance(part, dict) else part for part in data]
    return torch.cat([tensor.flatten() for part in parts for tensor in (part if isinstance(part, list) else [part])])


@pytest.mark.parametrize("distribution", ["replicated", "sharded"])
@pytest.mark.parametrize("ord", ORDERS)
def test_metric(ord, distribution):  # noqa: A002
    data = batches()
    check_metric(partial(ParameterNorm, ord=ord, distribution=distribution), data, parameter_norm(everything(data), ord))


def test_two_ranks():
    """Shards count once, replicas too."""
    data = batches()
    cases = {}
    for order in ORDERS:
        cases[f"sharded {order}"] = (partial(ParameterNorm, ord=order, distribution="sharded"), data[:1], data[1:])
        cases[f"replicated {order}"] = (partial(ParameterNorm, ord=order), data, data)
    for rank in metrics_on_two_ranks(cases):
        for name, value in rank.items():
            order = float(name.split()[1])
            torch.testing.assert_close(value, parameter_norm(everything(data), order), rtol=1e-12, atol=0, msg=name)


def test_what_is_not_finite_stays_until_reset():
    metric = ParameterNorm()
    metric.update(torch.tensor([1.0, math.inf]))
    metric.update(torch.tensor([1.0]))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.tensor([-2.0]))
    assert metric.compute() == 2


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="`ord` must be a positive number"):
        ParameterNorm(ord=0)
    with pytest.raises(ValueError, match="`distribution` must be"):
        ParameterNorm(distribution="summed")
    with pytest.raises(ValueError, match="at least one tensor"):
        ParameterNorm().update([])
