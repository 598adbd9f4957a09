"""The rivals' signals against slow references, closed forms and hostile inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks.functional.representation import (
    class_distance_ratio,
    loss_oscillation,
    prediction_churn,
    prediction_confidence,
    prediction_entropy,
    representation_entropy,
)


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol
    )


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- representation entropy ----------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 1000))
def test_representation_entropy_against_numpy(n, d, seed):
    features = draw(seed, n, d) * torch.logspace(0, -2, d) + 3
    eigenvalues = np.linalg.eigvalsh(np.cov(features.numpy().T)).clip(0)
    p = eigenvalues[eigenvalues > 1e-14] / eigenvalues.sum()
    close(representation_entropy(features), -(p * np.log(p)).sum() / np.log(d), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_representation_entropy_of_equal_directions(rank):
    centred = draw(rank, 30, rank)
    basis, _ = torch.linalg.qr(centred - centred.mean(0))
    rotation, _ = torch.linalg.qr(draw(9, 6, 6))
    features = torch.nn.functional.pad(basis, (0, 6 - rank)) @ rotation
    for scale in (1.0, 1e-160, 1e160):
        close(representation_entropy(scale * features + 2 * scale), math.log(rank) / math.log(6), atol=1e-9)


def test_representation_entropy_keeps_a_small_variance_beside_a_large_mean():
    features = draw(0, 50, 4)
    close(representation_entropy(features + 1e6), representation_entropy(features), rtol=1e-6)


def test_representation_entropy_is_undefined_without_variance():
    assert representation_entropy(draw(0, 1, 5)).isnan()
    assert representation_entropy(torch.full((7, 5), 0.1)).isnan()
    assert representation_entropy(torch.zeros(7, 5)).isnan()
    assert representation_entropy(draw(0, 7, 1)).isnan()


# --- class distance ratio ------------------------------------------------------------------------------------------


def slow_ratio(features, labels):
    """Loops over classes and samples, as one would say it."""
    groups = [features[labels == label] for label in np.unique(labels)]
    groups = [group for group in groups if len(group) > 1]
    centroids = [group.mean(0) for group in groups]
    between = [np.linalg.norm(a - b) for i, a in enumerate(centroids) for b in centroids[:i]]
    within = [np.linalg.norm(h - centre) for group, centre in zip(groups, centroids, strict=True) for h in group]
    return np.mean(between) / np.mean(within)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 1000))
def test_class_distance_ratio_against_loops(classes, d, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (30,), generator=generator) * 7 - 3
    features = draw(seed, 30, d) + labels[:, None]
    if len(torch.unique(labels)) > 1:
        close(class_distance_ratio(features, labels), slow_ratio(features.numpy(), labels.numpy()))


def test_class_distance_ratio_invariances():
    features, labels = draw(0, 24, 3), torch.arange(24) % 4
    reference = class_distance_ratio(features, labels)
    rotation, _ = torch.linalg.qr(draw(1, 3, 3))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    close(class_distance_ratio(5 * features @ rotation - 2, labels), reference)
    close(class_distance_ratio(features[order], labels[order]), reference)
    close(class_distance_ratio(features, torch.tensor([900, -5, 0, 31])[labels]), reference)
    close(class_distance_ratio(features.repeat(2, 1), labels.repeat(2)), reference)


def test_class_distance_ratio_leaves_out_single_samples():
    features, labels = draw(0, 12, 3), torch.arange(12) % 3
    with_single = class_distance_ratio(torch.cat([features, 100 * torch.ones(1, 3)]), torch.cat([labels, torch.tensor([9])]))
    close(with_single, class_distance_ratio(features, labels))


def test_class_distance_ratio_at_the_edges():
    features = draw(0, 6, 3)
    assert class_distance_ratio(features, torch.zeros(6, dtype=torch.long)).isnan()
    assert class_distance_ratio(features, torch.arange(6)).isnan()
    assert class_distance_ratio(torch.zeros(6, 3), torch.arange(6) % 2).isnan()
    assert class_distance_ratio(features[:1], torch.tensor([0])).isnan()
    assert class_distance_ratio(torch.eye(2).repeat(3, 1), torch.arange(6) % 2) == math.inf


# --- loss oscillation ----------------------------------------------------------------------------------------------


def test_loss_oscillation_against_polyfit():
    losses = (3 * torch.exp(-torch.arange(40.0) / 9) + 0.1 * draw(0, 40)).double()
    curve = losses.numpy() / losses.numpy().mean()
    steps = np.arange(40)
    trend = np.polynomial.Polynomial.fit(steps, curve, 3)(steps)
    close(loss_oscillation(losses), np.var(curve - trend))


def test_loss_oscillation_ignores_cubic_trends_and_scale():
    steps = torch.linspace(0, 1, 100, dtype=torch.float64)
    smooth = 4 - 3 * steps + 2 * steps**2 - steps**3
    close(loss_oscillation(smooth), 0.0, atol=1e-25)
    wave = 0.1 * torch.sin(40 * math.pi * steps)
    close(loss_oscillation(1e6 * (smooth + wave)), loss_oscillation(smooth + wave))
    # A wave of many periods is nearly orthogonal to the cubic: its activity is its mean square.
    close(loss_oscillation(smooth + wave), 0.1**2 / 2 / smooth.mean() ** 2, rtol=0.02)


def test_loss_oscillation_at_the_edges():
    assert loss_oscillation(torch.ones(4)).isnan()
    assert loss_oscillation(torch.ones(5)) < 1e-25
    assert loss_oscillation(torch.zeros(9)).isnan()


# --- predictions ---------------------------------------------------------------------------------------------------


def test_prediction_entropy():
    logits = 3 * draw(0, 9, 5)
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    close(prediction_entropy(logits), -(p * np.log(p)).sum(1).mean())
    close(prediction_entropy(torch.zeros(3, 8)), math.log(8))
    close(prediction_entropy(1e4 * torch.eye(4)), 0.0)
    close(prediction_entropy(torch.tensor([[0.0, 0.0, -math.inf]])), math.log(2))
    close(prediction_entropy(logits + 1e3), prediction_entropy(logits), rtol=1e-9)


def test_prediction_confidence():
    logits = 3 * draw(0, 9, 5)
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    close(prediction_confidence(logits), p.max(1).mean())
    close(prediction_confidence(torch.zeros(3, 8)), 1 / 8)
    close(prediction_confidence(1e4 * torch.eye(4)), 1.0)


def test_prediction_churn():
    before = torch.eye(4)
    close(prediction_churn(before, before), 0.0)
    close(prediction_churn(before.roll(1, 0), before), 1.0)
    close(prediction_churn(torch.eye(4)[[0, 1, 2, 2]], before), 0.25)
    close(prediction_churn(5 * before - 1, before), 0.0)


# --- all of them ---------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 0, 1])
MEASURES = {
    "features": representation_entropy,
    "features by class": lambda x: class_distance_ratio(x, LABELS),
    "losses": lambda x: loss_oscillation(x.flatten()),
    "logits": prediction_entropy,
    "logits again": prediction_confidence,
    "both logits": lambda x: prediction_churn(x, x.flip(0)),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_nan_comes_through(measure):
    poisoned = draw(0, 4, 3)
    poisoned[1, 2] = math.nan
    assert measure(poisoned).isnan()


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_integers_and_halves_are_widened(measure):
    values = torch.tensor([[1, 0, 3], [4, 1, 1], [2, 7, 5], [0, 2, 9]])
    for dtype in (torch.int32, torch.float16, torch.bfloat16, torch.float32):
        result = measure(values.to(dtype))
        assert result.dtype == torch.float64
        close(result, measure(values.double()))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: representation_entropy(torch.zeros(3)), "features"),
        (lambda: representation_entropy(torch.zeros(0, 3)), "features"),
        (lambda: class_distance_ratio(torch.zeros(3, 2), torch.zeros(3)), "labels"),
        (lambda: class_distance_ratio(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long)), "labels"),
        (lambda: loss_oscillation(torch.zeros(2, 2)), "losses"),
        (lambda: loss_oscillation(torch.zeros(0)), "losses"),
        (lambda: prediction_entropy(torch.zeros(3, 0)), "logits"),
        (lambda: prediction_entropy(torch.zeros(3, 2, dtype=torch.cfloat)), "logits must be real"),
        (lambda: prediction_churn(torch.zeros(3, 2), torch.zeros(2, 2)), "previous_logits"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
