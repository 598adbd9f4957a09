"""CircuitComplexity over updates gives the complexity over all samples."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from grok_callbacks.functional import circuit_complexity
from grok_callbacks.metrics import CircuitComplexity
from tests.metrics._common import check_metric


def batches(repeats=None):
    generator = torch.Generator().manual_seed(0)
    lead = () if repeats is None else (repeats,)
    sizes = (5, 1, 9)
    return [(torch.randn(n, 4, generator=generator), torch.randn(*lead, n, 4, generator=generator)) for n in sizes]


@pytest.mark.parametrize("repeats", [None, 1, 3])
def test_over_updates(repeats):
    logits, pruned = (torch.cat(parts, -2) for parts in zip(*batches(repeats), strict=True))
    # torchmetrics makes a scalar of a result with one element.
    check_metric(partial(CircuitComplexity, repeats), batches(repeats), circuit_complexity(logits, pruned).squeeze())


def test_wrong_arguments():
    with pytest.raises(ValueError, match="repeats"):
        CircuitComplexity(0)
    with pytest.raises(ValueError, match="no leading dimension"):
        CircuitComplexity().update(torch.ones(2, 3), torch.ones(5, 2, 3))
    with pytest.raises(ValueError, match="a leading dimension of 2"):
        CircuitComplexity(2).update(torch.ones(2, 3), torch.ones(5, 2, 3))
    with pytest.raises(ValueError, match="a leading dimension of 1"):
        CircuitComplexity(1).update(torch.ones(2, 3), torch.ones(2, 3))


def test_a_refused_batch_leaves_no_trace():
    metric = CircuitComplexity(2)
    good = torch.randn(3, 4), torch.randn(2, 3, 4)
    metric.update(*good)
    with pytest.raises(ValueError, match="leading dimension"):
        metric.update(torch.ones(2, 3), torch.ones(5, 2, 3))
    torch.testing.assert_close(metric.compute(), circuit_complexity(*good))


def test_masks_may_come_in_parts():
    logits, pruned = torch.randn(7, 4), torch.randn(5, 7, 4)
    parts = [CircuitComplexity(5) for _ in range(3)]
    whole = CircuitComplexity(5)
    for rank, part in enumerate(parts):
        share = slice(rank, None, 3)
        for metric in (part, whole):
            metric.update(logits, pruned[share], share)
        assert torch.equal(part.compute().isnan(), torch.arange(5) % 3 != rank)
    torch.testing.assert_close(whole.compute(), circuit_complexity(logits, pruned))
    # What ranks do: the sum of their states is the whole's.
    for state in ("total", "count"):
        torch.testing.assert_close(sum(getattr(part, state) for part in parts), getattr(whole, state))
    whole.reset()
    assert not whole.total.any()
    with pytest.raises(ValueError, match="a leading dimension of 2"):
        whole.update(logits, pruned, slice(0, 2))
