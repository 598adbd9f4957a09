"""Commutativity over updates gives the share over all samples."""

from __future__ import annotations

import math

import pytest
import torch

from grok_callbacks.functional import commutativity
from grok_callbacks.metrics import Commutativity
from tests.metrics._common import check_metric


def batches():
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, n, 3, generator=generator)) for n in (5, 1, 9)]


def test_over_updates():
    logits, mirrored = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    expected = commutativity(logits, mirrored)
    assert 0 < expected < 1
    check_metric(Commutativity, batches(), expected)


def test_one_bad_batch_spoils_the_value():
    metric = Commutativity()
    metric.update(torch.ones(2, 2), torch.ones(2, 2))
    metric.update(torch.tensor([[math.nan, 1.0]]), torch.ones(1, 2))
    assert metric.compute().isnan()


def test_wrong_shapes():
    with pytest.raises(ValueError, match="mirrored_logits"):
        Commutativity().update(torch.ones(2, 3), torch.ones(2, 4))
