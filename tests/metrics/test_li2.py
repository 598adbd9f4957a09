"""FeatureLearning gives over updates and ranks what the functions give on everything at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from grok_callbacks.functional import li2
from grok_callbacks.metrics import FeatureLearning
from tests.metrics._common import check_metric
from tests.metrics._ddp import metrics_on_two_ranks


def batches(rows=(5, 1, 9), units=6, classes=3):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(units, classes, generator=generator, dtype=torch.float64)
    result = []
    for n in rows:
        features = torch.randn(n, units, generator=generator, dtype=torch.float64).square()
        targets = torch.eye(classes, dtype=torch.float64)[torch.randint(classes, (n,), generator=generator)]
        result.append((features, targets, targets - features @ weight, weight))
    return result


def expected(data, ridge=0.0):
    features, targets, residual = (torch.cat([batch[i] for batch in data]) for i in range(3))
    weight = data[0][3]
    gradient = li2.feature_gradient(residual, weight)
    energy = li2.feature_energy(features, targets).sort().values
    return {
        "cos_lazy": li2.lazy_alignment(gradient, features, targets),
        "cos_residual": li2.residual_alignment(gradient, features, targets, residual),
        "gradient_norm": gradient.square().sum().sqrt(),
        "residual_ratio": li2.residual_ratio(residual, targets),
        "ridge_distance": li2.ridge_distance(weight, features, targets, ridge * len(features)),
        "participation_ratio": li2.participation_ratio(features),
        "feature_cosine": li2.largest_feature_cosine(features),
        "energy_top": energy[-1],
        "energy_median": (energy[2] + energy[3]) / 2,
    }


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_over_updates(ridge):
    # Through halves the residual is rounded, and the cosines with it: the helper compares halves with halves.
    check_metric(partial(FeatureLearning, ridge=ridge), batches(), expected(batches(), ridge))


def test_on_two_ranks():
    data = batches(rows=(5, 3, 9, 2))
    for result in metrics_on_two_ranks({"li2": (partial(FeatureLearning, ridge=0.01), data[:1], data[1:])}):
        for key, value in expected(data, 0.01).items():
            torch.testing.assert_close(result["li2"][key], value)


def test_gradient_of_autograd_is_taken_as_it_is():
    data = batches()
    gradients = [torch.randn(features.shape, dtype=torch.float64) for features, *_ in data]
    metric = FeatureLearning()
    for batch, gradient in zip(data, gradients, strict=True):
        metric.update(*batch, gradient)
    features, targets, residual = (torch.cat([batch[i] for batch in data]) for i in range(3))
    result, gradient = metric.compute(), torch.cat(gradients)
    torch.testing.assert_close(result["cos_lazy"], li2.lazy_alignment(gradient, features, targets))
    torch.testing.assert_close(result["cos_residual"], li2.residual_alignment(gradient, features, targets, residual))
    torch.testing.assert_close(result["gradient_norm"], torch.linalg.norm(gradient - gradient.mean(0)))


def test_weight_must_stay_the_same():
    (first,) = batches(rows=(5,))
    metric = FeatureLearning()
    metric.update(*first)
    metric.update(*first[:3], first[3] + 1)
    with pytest.raises(ValueError, match="weight"):
        metric.compute()


def test_state_is_a_copy():
    data = batches()
    metric = FeatureLearning()
    for batch in data:
        metric.update(*batch)
    before = expected(data)
    for batch in data:
        for tensor in batch:
            tensor.add_(7)
    torch.testing.assert_close(metric.compute(), before)


def test_misfits_are_refused_before_they_are_held():
    features, targets, residual, weight = batches(rows=(5,))[0]
    metric = FeatureLearning()
    for arguments in [
        (features[:-1], targets, residual, weight),
        (features, targets[:-1], residual, weight),
        (features, targets, residual, weight.T),
        (features, targets, residual, weight, features[1:]),
        (features, targets, residual, weight, features[:, 1:]),
    ]:
        with pytest.raises(ValueError, match=r"rows|weight|gradient"):
            metric.update(*arguments)
    assert not metric.features
    with pytest.raises(ValueError, match="ridge"):
        FeatureLearning(ridge=-1.0)


def test_nan_gives_nan():
    features, targets, residual, weight = batches(rows=(5,))[0]
    weight[0, 0] = torch.nan
    metric = FeatureLearning()
    metric.update(features, targets, residual, weight)
    metric.update(features, targets, residual, weight)
    result = metric.compute()
    assert result["cos_lazy"].isnan()
    assert result["ridge_distance"].isnan()
    assert not result["participation_ratio"].isnan()
