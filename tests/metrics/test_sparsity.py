"""ActivationSparsity over updates gives the sparsity of everything at once."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from grok_callbacks.functional import activation_sparsity
from grok_callbacks.metrics import ActivationSparsity
from tests.metrics._common import check_metric


def batches():
    generator = torch.Generator().manual_seed(0)
    # Scales that differ between batches: a relative threshold must know all of them.
    return [scale * torch.randn(n, 6, generator=generator).relu() for n, scale in ((5, 1.0), (1, 0.1), (9, 3.0))]


@pytest.mark.parametrize("relative", [False, True])
def test_over_updates(relative):
    expected = activation_sparsity(torch.cat(batches()), 0.3, relative=relative)
    assert 0 < expected < 1
    check_metric(partial(ActivationSparsity, 0.3, relative=relative), batches(), expected)


def test_batches_of_several_shapes():
    for relative in (False, True):
        metric = ActivationSparsity(relative=relative)
        metric.update(torch.ones(2, 3, 4))
        metric.update(torch.zeros(8))
        assert metric.compute() == 0.25


def test_one_bad_batch_spoils_the_value():
    for relative in (False, True):
        metric = ActivationSparsity(relative=relative)
        metric.update(torch.ones(2, 2))
        metric.update(torch.tensor([math.nan]))
        assert metric.compute().isnan()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="threshold"):
        ActivationSparsity(math.nan)
    with pytest.raises(ValueError, match="activations"):
        ActivationSparsity().update(torch.empty(0))
