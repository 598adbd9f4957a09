"""SpectralEntropy gives the mean of its matrices' entropies over updates and ranks."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from grok_callbacks.functional import singular_values, spectral_entropy
from grok_callbacks.metrics import SpectralEntropy
from tests.metrics._common import check_metric
from tests.metrics._ddp import metrics_on_two_ranks

GENERATOR = torch.Generator().manual_seed(0)
MATRICES = [torch.randn(shape, generator=GENERATOR) for shape in [(6, 4), (3, 8), (5, 2, 3, 3)]]
MEAN = torch.stack([spectral_entropy(matrix.flatten(1)) for matrix in MATRICES]).mean()


@pytest.mark.parametrize("distribution", ["replicated", "split"])
def test_metric(distribution):
    check_metric(partial(SpectralEntropy, distribution=distribution), MATRICES, MEAN)


def test_of_one_matrix_is_the_function():
    metric = SpectralEntropy()
    assert metric(MATRICES[0]) == spectral_entropy(MATRICES[0])


def test_known_spectra_are_taken_as_they_are():
    metric = SpectralEntropy()
    for matrix in MATRICES:
        metric.update(matrix, singular_values(matrix.flatten(1)))
    torch.testing.assert_close(metric.compute(), MEAN)
    metric.reset()
    metric.update(torch.zeros(4, 4), torch.ones(4))
    assert metric.compute().item() == pytest.approx(math.log(4))


def test_two_ranks():
    """Matrices split over ranks count once each, replicas too, however unevenly they are split."""
    cases = {
        "split": (partial(SpectralEntropy, distribution="split"), MATRICES[:1], MATRICES[1:]),
        "replicated": (SpectralEntropy, MATRICES, MATRICES),
    }
    for rank in metrics_on_two_ranks(cases):
        for name, value in rank.items():
            torch.testing.assert_close(value, MEAN, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("bad", [torch.zeros(3, 3), torch.tensor([[1.0, math.nan], [0.0, 1.0]])])
def test_a_matrix_without_a_spectrum_gives_nan_until_reset(bad):
    metric = SpectralEntropy()
    metric.update(bad)
    metric.update(torch.eye(2))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(torch.eye(2))
    assert metric.compute().item() == pytest.approx(math.log(2))


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="`distribution` must be"):
        SpectralEntropy(distribution="sharded")
    with pytest.raises(ValueError, match="at least two dimensions"):
        SpectralEntropy().update(torch.ones(3))
    with pytest.raises(ValueError, match="not empty"):
        SpectralEntropy().update(torch.ones(0, 3))
