"""LinearMappingNumber over updates and ranks gives what the functions give on all points at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from grok_callbacks.functional import linear_connectivity, linear_mapping_number
from grok_callbacks.metrics import LinearMappingNumber
from tests.metrics._common import check_metric
from tests.metrics._ddp import run_on_two_ranks


def network():
    generator = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    for parameter in layers.parameters():
        parameter.data = 2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layers


class AnyFormat:
    """Computes in float64 whatever comes, and pickles."""

    def __init__(self):
        self.network = network()

    def __call__(self, x):
        return self.network(x.double())


def batches(sizes=(4, 1, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def number(function, points):
    return linear_mapping_number(linear_connectivity(function, points))


def test_metric():
    # Half-precision points lie on a half-precision segment, hence the tolerance; the next test is sharp.
    expected = number(network(), torch.cat(batches()))
    assert expected > 1.5
    check_metric(partial(LinearMappingNumber, AnyFormat()), batches(), expected, rtol=2e-3)


def test_updates_add_up_exactly():
    metric = LinearMappingNumber(network(), num_interpolation=11, memory_limit=10_000)
    for batch in batches():
        metric.update(batch)
    connectivity = linear_connectivity(network(), torch.cat(batches()), 11)
    torch.testing.assert_close(metric.compute(), linear_mapping_number(connectivity), rtol=1e-12, atol=0)
    torch.testing.assert_close(metric.connectivity, connectivity, rtol=0, atol=1e-12)
    metric.reset()
    assert metric.connectivity is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_keep_the_format_that_the_function_needs(dtype):
    function = network().to(dtype)
    metric = LinearMappingNumber(function).half()
    metric.update(torch.cat(batches(dtype=dtype)))
    assert metric.compute() == number(function, torch.cat(batches(dtype=dtype)))


def test_the_network_is_no_part_of_the_metric():
    function = network()
    metric = LinearMappingNumber(function)
    metric.persistent(True)
    assert list(metric.parameters()) == []
    assert list(metric.state_dict()) == ["points"]
    metric.to(torch.float16)
    metric.train()
    assert function[0].weight.dtype == torch.float64


def test_the_function_is_measured_as_it_is_at_compute():
    function = network()
    metric = LinearMappingNumber(function)
    metric.update(torch.cat(batches()))
    with torch.no_grad():
        function[0].weight.mul_(1e-6)
        function[0].bias.zero_()
    assert metric.compute().item() == pytest.approx(1, abs=1e-6)


def test_updates_hold_no_graph():
    metric = LinearMappingNumber(network())
    metric.update(batches()[0].requires_grad_())
    assert not metric.points[0].requires_grad


@pytest.mark.parametrize("points", [torch.zeros(2, 3, dtype=torch.long), torch.zeros(0, 3)])
def test_bad_points(points):
    with pytest.raises(ValueError, match="points"):
        LinearMappingNumber(torch.sin).update(points)


class Counting(AnyFormat):
    def __init__(self):
        super().__init__()
        self.rows = 0

    def __call__(self, x):
        self.rows += len(x)
        return super().__call__(x)


def on_rank(rank):
    """Points split over the ranks, then all points on each."""
    first, second, third = batches()
    results = []
    for share in (([first, second], [third])[rank], [first, second, third]):
        function = Counting()
        metric = LinearMappingNumber(function)
        for batch in share:
            metric.update(batch)
        results.append((metric.compute(), metric.connectivity, function.rows, sum(len(points) for points in metric.points)))
    return results


def test_on_two_ranks():
    whole, alone = number(network(), torch.cat(batches())), Counting()
    number(alone, torch.cat(batches()))
    results = run_on_two_ranks(on_rank)
    for (value, connectivity, rows, points), (replicated, *_) in results:
        torch.testing.assert_close(value, whole, rtol=1e-9, atol=0)
        torch.testing.assert_close(replicated, whole, rtol=1e-9, atol=0)  # the number ignores how often a point occurs
        assert connectivity.shape == (10, 10)
        assert not (connectivity == 0).any()
        assert rows < 0.65 * alone.rows  # the pairs were split
        assert points == 5  # once the value is known, a rank has its own points again
    assert torch.equal(results[0][0][1], results[1][0][1])
