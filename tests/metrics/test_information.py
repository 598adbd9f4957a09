"""MatrixEntropy and MatrixMutualInformation over updates and ranks give what the functions give on everything at once."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from grok_callbacks.functional import (
    activation_sparsity,
    circuit_complexity,
    commutativity,
    feature_entropy,
    feature_mutual_information,
    gram_matrix,
    matrix_entropy,
)
from grok_callbacks.metrics import (
    ActivationSparsity,
    CircuitComplexity,
    Commutativity,
    MatrixEntropy,
    MatrixMutualInformation,
)
from tests.metrics._common import check_metric
from tests.metrics._ddp import metrics_on_two_ranks


def batches(d, sizes=(5, 1, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    result = [torch.randn(n, d, generator=generator) for n in sizes]
    result[0][1] = 0  # a row without a direction
    return result


def pairs(sizes=(5, 1, 9)):
    return list(zip(batches(4, sizes), batches(3, sizes, seed=1), strict=True))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("d", [3, 20])
def test_entropy_over_updates(d, alpha):
    expected = matrix_entropy(gram_matrix(torch.cat(batches(d))), alpha)
    check_metric(partial(MatrixEntropy, d, alpha), batches(d), expected)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_mutual_information_over_updates(alpha):
    expected = feature_mutual_information(torch.cat(batches(4)), torch.cat(batches(3, seed=1)), alpha)
    check_metric(partial(MatrixMutualInformation, alpha), pairs(), expected)


def test_entropy_s_state_does_not_grow():
    metric = MatrixEntropy(4)
    for _ in range(3):
        metric.update(torch.randn(100, 2, 2))
        assert metric.moment.shape == (5, 5)


def test_on_two_ranks():
    """All metrics of this project's information, sparsity, circuit and symmetry families: processes start slowly."""
    first, second = torch.cat(batches(4)), torch.cat(batches(3, seed=1))
    logits = batches(3, seed=2)
    pruned = [torch.randn(2, len(part), 3, generator=torch.Generator().manual_seed(3)) for part in logits]
    both = list(zip(logits, pruned, strict=True))
    mirrored = list(zip(logits, (repeat[0] for repeat in pruned), strict=True))
    everything, everything_pruned = torch.cat(logits), torch.cat(pruned, 1)

    cases = {
        "entropy": (partial(MatrixEntropy, 4), batches(4), feature_entropy(first)),
        "information": (MatrixMutualInformation, pairs(), feature_mutual_information(first, second)),
        "sparsity": (ActivationSparsity, batches(4), activation_sparsity(first)),
        "relative sparsity": (
            partial(ActivationSparsity, relative=True),
            batches(4),
            activation_sparsity(first, relative=True),
        ),
        "circuit": (partial(CircuitComplexity, 2), both, circuit_complexity(everything, everything_pruned)),
        "commutativity": (Commutativity, mirrored, commutativity(everything, everything_pruned[0])),
    }
    shared = {name: (factory, data[:1], data[1:]) for name, (factory, data, _) in cases.items()}
    for result in metrics_on_two_ranks(shared):
        for name, (_, _, expected) in cases.items():
            torch.testing.assert_close(result[name], expected, msg=name)


def test_bad_features_give_nan():
    metric = MatrixEntropy(2)
    metric.update(torch.tensor([[1.0, 2.0], [math.nan, 1.0]]))
    assert metric.compute().isnan()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_features"):
        MatrixEntropy(0)
    for metric in (partial(MatrixEntropy, 3), MatrixMutualInformation):
        with pytest.raises(ValueError, match="alpha"):
            metric(alpha=-1.0)
    with pytest.raises(ValueError, match="features must have 3"):
        MatrixEntropy(3).update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="features1 and features2"):
        MatrixMutualInformation().update(torch.ones(2, 4), torch.ones(3, 4))
