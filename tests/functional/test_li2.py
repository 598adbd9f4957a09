"""Li2: every identity of the theory against closed forms, and inputs made to break it."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from grok_callbacks.functional import li2
from grok_callbacks.functional.li2 import (
    Li2Stage,
    center,
    feature_energy,
    feature_gradient,
    gradient_scale,
    largest_feature_cosine,
    lazy_alignment,
    participation_ratio,
    relative_change,
    residual_alignment,
    residual_ratio,
    ridge_distance,
    ridge_solution,
    ridge_strength,
)


def close(actual, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=atol,
        equal_nan=True,
    )


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(n=12, units=7, classes=4, seed=0):
    """Features with means far from zero, as those of x^2 are, so that a forgotten centring shows."""
    features = draw(seed, n, units).square() + 1
    targets = one_hot(torch.arange(n) % classes, classes).double()
    weight = draw(seed + 1, units, classes)
    residual = center(targets) - center(features) @ weight
    return features, targets, weight, residual


sizes = st.tuples(st.integers(2, 9), st.integers(1, 9), st.integers(2, 5), st.integers(0, 10**6))


# --- golden values -------------------------------------------------------------------------------------------------


def test_golden(golden):
    case = golden["li2"]
    features, targets, weight = (torch.tensor(case[key], dtype=torch.float64) for key in ("F", "Y", "V"))
    residual = center(targets) - center(features) @ weight
    gradient = feature_gradient(residual, weight)
    close(lazy_alignment(gradient, features, targets), case["cos_lazy"])
    close(residual_alignment(gradient, features, targets, residual), case["cos_residual"])
    close(torch.linalg.norm(gradient), case["grad_norm"])
    close(residual_ratio(residual, targets), case["residual_ratio"])
    close(feature_energy(features, targets), case["energy"])
    close(participation_ratio(features), case["participation_ratio"])


# --- identities of the theory --------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=25)
@given(sizes)
def test_columns_of_the_gradient_sum_to_zero(shape):
    features, _, weight, residual = setting(*shape)
    gradient = feature_gradient(residual + 5.0, weight)
    close(gradient.sum(0), torch.zeros(features.shape[1]), atol=1e-9)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(sizes)
def test_gradient_along_the_features_is_the_residual_along_the_weight(shape):
    features, _, weight, residual = setting(*shape)
    gradient = feature_gradient(residual, weight)
    close((gradient * center(features)).sum(), ((center(features).T @ residual) * weight).sum(), atol=1e-9)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(sizes, st.sampled_from([1e-3, 0.5, 20.0]))
def test_ridge_identity(shape, strength):
    features, targets, _, _ = setting(*shape)
    f, y = center(features), center(targets)
    solution = ridge_solution(features, targets, strength)
    gradient = feature_gradient(y - f @ solution, solution)
    over_samples = torch.linalg.inv(f @ f.T + strength * torch.eye(f.shape[0]))
    over_units = torch.linalg.inv(f.T @ f + strength * torch.eye(f.shape[1]))
    close(gradient, strength * over_samples @ y @ y.T @ f @ over_units, rtol=1e-6, atol=1e-8)


def test_energy_of_square_units_is_homogeneous_of_degree_four():
    inputs, targets = draw(0, 15, 6), one_hot(torch.arange(15) % 5, 5).double()
    weight = draw(1, 6, 3).requires_grad_()
    energy = feature_energy((inputs @ weight).square(), targets)
    (slope,) = torch.autograd.grad(energy.sum(), weight)
    close((weight * slope).sum(0).detach(), 4 * energy.detach())


def test_energy_climbs_along_the_lazy_direction():
    """The gradient of the summed energy with respect to the features is the direction that cos_lazy compares with."""
    features, targets, _, _ = setting()
    features.requires_grad_()
    (slope,) = torch.autograd.grad(feature_energy(features, targets).sum(), features)
    close(lazy_alignment(slope, features.detach(), targets), 1.0)
    close(lazy_alignment(-3 * slope, features.detach(), targets), -1.0)


def test_zero_last_layer_sends_no_gradient():
    features, targets, _, _ = setting()
    weight = torch.zeros(features.shape[1], targets.shape[1])
    gradient = feature_gradient(targets, weight)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert lazy_alignment(gradient, features, targets).isnan()
    assert residual_alignment(gradient, features, targets, targets).isnan()


def test_no_weight_decay_leaks_no_gradient():
    """At the least-squares point of full-rank features over more samples than units, F~^T R = 0, but R and G are not."""
    features, targets, _, _ = setting(n=30, units=3)
    solution = ridge_solution(features, targets, 0.0)
    residual = center(targets) - center(features) @ solution
    close(center(features).T @ residual, torch.zeros(3, 4), atol=1e-9)
    # With as many units as samples the fit is exact and nothing at all is sent back.
    features, targets, _, _ = setting(n=8, units=12)
    solution = ridge_solution(features, targets, 0.0)
    gradient = feature_gradient(center(targets) - center(features) @ solution, solution)
    close(gradient, torch.zeros(8, 12), atol=1e-8)


# --- autograd against the closed form ------------------------------------------------------------------------------


def half_squared(outputs, labels):
    return 0.5 * (outputs - one_hot(labels, outputs.shape[1])).square().sum(1).mean()


def squared(outputs, labels):
    return 2 * half_squared(outputs, labels)


def elements(outputs, labels):
    return mse_loss(outputs, one_hot(labels, outputs.shape[1]).double())


def summed(outputs, labels):
    return mse_loss(outputs, one_hot(labels, outputs.shape[1]).double(), reduction="sum")


def summed_cross_entropy(outputs, labels):
    return cross_entropy(outputs, labels, reduction="sum")


@pytest.mark.parametrize(
    ("loss", "expected_scale"),
    [
        (half_squared, 1 / 12),
        (squared, 2 / 12),
        (elements, 2 / (12 * 4)),
        (summed, 2.0),
        (cross_entropy, 1 / 12),
        (summed_cross_entropy, 1.0),
    ],
)
def test_autograd_agrees_with_the_closed_form(loss, expected_scale):
    features, targets, weight, _ = setting()
    labels, bias = targets.argmax(1), draw(9, 4)
    features.requires_grad_()
    outputs = features @ weight + bias
    by_features, by_outputs = torch.autograd.grad(loss(outputs, labels), (features, outputs))
    outputs = outputs.detach()
    predicted = outputs.softmax(1) if "cross_entropy" in loss.__name__ else outputs
    scale = gradient_scale(by_outputs, targets - predicted)
    close(scale, expected_scale)
    close(center(-by_features / scale), feature_gradient(targets - predicted, weight))


@pytest.mark.parametrize("loss", [half_squared, squared, elements, summed])
@pytest.mark.parametrize(("n", "units"), [(12, 7), (7, 12)])
def test_ridge_point_is_where_the_decayed_loss_is_stationary(loss, n, units):
    features, targets, _, _ = setting(n, units)
    f, labels, decay = center(features), targets.argmax(1), 2e-2
    bias = targets.mean(0)  # the best bias for centred features
    outputs = torch.zeros(n, 4, dtype=torch.float64, requires_grad=True)
    (by_outputs,) = torch.autograd.grad(loss(outputs, labels), outputs)
    strength = ridge_strength(decay, gradient_scale(by_outputs, targets))
    weight = ridge_solution(features, targets, strength).requires_grad_()
    objective = loss(f @ weight + bias, labels) + decay / 2 * weight.square().sum()
    (slope,) = torch.autograd.grad(objective, weight)
    close(slope, torch.zeros_like(slope), atol=1e-9)


def test_ridge_strengths_of_the_usual_reductions():
    n, c, decay = 50, 7, 2e-4
    assert ridge_strength(decay, 1 / n) == pytest.approx(n * decay)
    assert ridge_strength(decay, 2 / n) == pytest.approx(n * decay / 2)
    assert ridge_strength(decay, torch.tensor(2 / (n * c))) == pytest.approx(n * c * decay / 2)
    assert ridge_strength(0.0, 1.0) == 0.0


# --- each function against a slow, obvious one ---------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.tuples(st.integers(3, 9), st.integers(1, 9), st.integers(2, 5), st.integers(0, 10**6)))
def test_against_explicit_numpy(shape):
    features, targets, weight, residual = setting(*shape)
    f, y, v, r = (tensor.numpy() for tensor in (features, targets, weight, residual))
    n = len(f)
    project = np.eye(n) - np.ones((n, n)) / n
    f, y, r = project @ f, project @ y, project @ r
    gradient = r @ v.T
    kernel = f @ f.T

    def cosine(a, b):
        return (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b))

    close(feature_gradient(residual, weight), gradient, atol=1e-9)
    close(
        residual_alignment(feature_gradient(residual, weight), features, targets, residual),
        cosine(gradient, r @ y.T @ f),
        atol=1e-9,
    )
    close(participation_ratio(features), np.trace(kernel) ** 2 / (kernel**2).sum(), atol=1e-9)
    close(feature_energy(features, targets), [0.5 * ((y.T @ f[:, k]) ** 2).sum() for k in range(f.shape[1])])
    if f.shape[1] > 1:
        pairs = [cosine(f[:, k], f[:, j]) for k in range(f.shape[1]) for j in range(k)]
        close(largest_feature_cosine(features), max(pairs), atol=1e-9)


@pytest.mark.parametrize(("n", "units"), [(20, 5), (5, 20), (9, 9)])
@pytest.mark.parametrize("strength", [0.0, 1e-13, 1e-3, 1e6])
def test_ridge_solution_in_either_size(n, units, strength):
    features, targets, _, _ = setting(n, units)
    f, y = center(features).numpy(), center(targets).numpy()
    expected = np.linalg.pinv(f) @ y
    if strength > 1e-6:
        expected = np.linalg.solve(f.T @ f + strength * np.eye(units), f.T @ y)
    close(ridge_solution(features, targets, strength), expected, rtol=1e-6, atol=1e-9)


def test_ridge_distance():
    features, targets, weight, _ = setting()
    solution = ridge_solution(features, targets, 0.3)
    close(ridge_distance(solution, features, targets, 0.3), 0.0)
    close(ridge_distance(3 * solution, features, targets, 0.3), 2.0)
    expected = torch.linalg.norm(weight - solution) / torch.linalg.norm(solution)
    close(ridge_distance(weight, features, targets, 0.3), expected)


def test_ridge_of_rank_deficient_features_is_of_smallest_norm():
    base, targets = draw(0, 10, 1), draw(1, 10, 2)
    features = torch.cat([base, base, torch.ones(10, 1)], 1)
    solution = ridge_solution(features, targets, 0.0)
    alone = ridge_solution(base, targets, 0.0)
    close(solution, torch.cat([alone / 2, alone / 2, torch.zeros(1, 2)]))


def test_largest_cosine_sees_pairs_across_blocks(monkeypatch):
    features = draw(3, 40, 11)
    expected = np.corrcoef(features.numpy().T)
    np.fill_diagonal(expected, -1)
    for block in (1, 2, 4, 5, 11, 50):
        monkeypatch.setattr(li2, "_BLOCK", block)
        close(largest_feature_cosine(features), expected.max())


def test_largest_cosine_is_signed_and_skips_dead_units():
    column = draw(0, 9, 1)
    close(largest_feature_cosine(torch.cat([column, 4 - 2 * column], 1)), -1.0)
    dead = torch.full((9, 2), 0.1)
    close(largest_feature_cosine(torch.cat([dead, column, 4 - 2 * column], 1)), -1.0)
    assert largest_feature_cosine(torch.cat([dead, column], 1)).isnan()
    close(largest_feature_cosine(1e-200 * torch.cat([column, column], 1)), 1.0)


def test_participation_ratio_counts_directions():
    for rank in (1, 3, 6):
        basis, _ = torch.linalg.qr(center(draw(rank, 20, rank)))
        rotation, _ = torch.linalg.qr(draw(7, 8, 8))
        features = torch.nn.functional.pad(basis, (0, 8 - rank)) @ rotation
        for scale in (1.0, 1e-150, 1e150):
            close(participation_ratio(scale * features + scale), rank)


def test_relative_change():
    first, second = draw(0, 3, 4), draw(1, 5)
    close(relative_change([2 * first, 2 * second], [first, second]), 1.0)
    close(relative_change(first, first), 0.0)
    assert relative_change(first, torch.zeros(3, 4)).isnan()
    with pytest.raises(ValueError, match="same shapes"):
        relative_change([first], [second])
    with pytest.raises(ValueError, match="at least one"):
        relative_change([], [])


def test_alignments_ignore_scale_and_shift():
    features, targets, weight, residual = setting()
    gradient = feature_gradient(residual, weight)
    reference = residual_alignment(gradient, features, targets, residual)
    close(residual_alignment(1e200 * gradient, 1e-3 * features + 4, 2 * targets - 1, residual + 3), reference)


# --- hostile inputs ------------------------------------------------------------------------------------------------


def every_measure(features, targets, weight, residual):
    gradient = feature_gradient(residual, weight)
    return {
        "gradient": gradient,
        "cos_lazy": lazy_alignment(gradient, features, targets),
        "cos_residual": residual_alignment(gradient, features, targets, residual),
        "residual_ratio": residual_ratio(residual, targets),
        "energy": feature_energy(features, targets),
        "participation": participation_ratio(features),
        "cosine": largest_feature_cosine(features),
        "ridge": ridge_distance(weight, features, targets, 0.1),
        "least_squares": ridge_distance(weight, features, targets, 0.0),
    }


def undefined(values):
    return {name for name, value in values.items() if value.isnan().any()}


def test_one_sample_has_no_direction():
    values = every_measure(draw(0, 1, 5), torch.eye(3)[:1], draw(1, 5, 3), draw(2, 1, 3))
    assert undefined(values) == set(values) - {"gradient", "energy"}
    assert not values["gradient"].any()


def test_one_class_has_nothing_to_align_with():
    targets = torch.eye(3)[[0] * 6]
    values = every_measure(draw(0, 6, 5), targets, draw(1, 5, 3), draw(2, 6, 3))
    assert undefined(values) == {"cos_lazy", "cos_residual", "residual_ratio", "ridge", "least_squares"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_constant_features_have_no_direction(dtype):
    features = torch.full((7, 4), 0.1, dtype=dtype)  # 0.1 is no binary fraction: its mean is rounded
    targets = torch.eye(7)
    values = every_measure(features, targets, draw(1, 4, 7), draw(2, 7, 7))
    assert undefined(values) == {"cos_lazy", "cos_residual", "participation", "cosine", "ridge", "least_squares"}
    assert not values["energy"].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_no_numbers_give_nan(bad):
    features, targets, weight, residual = setting()
    features[2, 3] = bad
    values = every_measure(features, targets, weight, residual)
    assert undefined(values) == set(values) - {"gradient", "residual_ratio"}
    assert values["energy"].isnan().sum() == 1
    features, targets, weight, residual = setting()
    residual[0, 0] = bad
    assert undefined(every_measure(features, targets, weight, residual)) == {
        "gradient",
        "cos_lazy",
        "cos_residual",
        "residual_ratio",
    }


def test_integers_and_halves_are_widened():
    features, weight = torch.tensor([[1, 2], [3, 5], [0, 7]]), torch.tensor([[1, 0, 2], [0, 1, 1]])
    targets = torch.eye(3)
    wide = every_measure(features.double(), targets, weight.double(), targets)
    for convert in (torch.Tensor.int, torch.Tensor.half, torch.Tensor.bfloat16):
        narrow = every_measure(convert(features), convert(targets), convert(weight), convert(targets))
        for name, value in wide.items():
            close(narrow[name], value)


def test_inputs_are_left_alone():
    inputs = setting()
    copies = [tensor.clone() for tensor in inputs]
    every_measure(*inputs)
    for tensor, copy in zip(inputs, copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda f, y, v, r: center(torch.zeros(3)), "matrix"),
        (lambda f, y, v, r: center(torch.zeros(0, 3)), "matrix"),
        (lambda f, y, v, r: participation_ratio(f + 1j), "features must be real"),
        (lambda f, y, v, r: feature_gradient(r, v.T), "weight"),
        (lambda f, y, v, r: lazy_alignment(f, f, y[:-1]), "targets"),
        (lambda f, y, v, r: lazy_alignment(f[:, :-1], f, y), "gradient"),
        (lambda f, y, v, r: residual_alignment(f, f, y, r[:, :-1]), "residual"),
        (lambda f, y, v, r: residual_ratio(r[:-1], y), "residual"),
        (lambda f, y, v, r: feature_energy(f, y[:-1]), "targets"),
        (lambda f, y, v, r: ridge_solution(f, y, -1.0), "strength"),
        (lambda f, y, v, r: ridge_solution(f, y, math.nan), "strength"),
        (lambda f, y, v, r: ridge_distance(v[:-1], f, y, 1.0), "weight"),
        (lambda f, y, v, r: ridge_distance(v[:, :-1], f, y, 1.0), "weight"),
        (lambda f, y, v, r: ridge_strength(-1.0, 1.0), "weight_decay"),
        (lambda f, y, v, r: ridge_strength(1.0, 0.0), "scale"),
        (lambda f, y, v, r: gradient_scale(r, r[:-1]), "logit_gradient"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call(*setting())


# --- stages --------------------------------------------------------------------------------------------------------


def walk(stage, *pairs):
    stages = []
    for pair in pairs:
        stage = stage.update(*pair)
        stages.append(stage.stage)
    return stages


def test_stages_need_two_measurements_in_a_row():
    lazy, independent, interactive = (0.1, 0.1), (0.6, 0.6), (0.5, 0.8)
    assert walk(Li2Stage(), lazy, independent, lazy, independent, independent) == [1, 1, 1, 1, 2]
    assert walk(Li2Stage(stage=2), interactive, independent, interactive, interactive) == [2, 2, 2, 3]
    assert walk(Li2Stage(patience=1), independent, interactive) == [2, 3]


def test_stage_three_needs_stage_two_first_and_holds():
    assert walk(Li2Stage(), *[(0.1, 0.9)] * 5) == [1] * 5
    assert walk(Li2Stage(), *[(0.6, 0.9)] * 4) == [1, 2, 2, 3]
    assert walk(Li2Stage(stage=3), (0.1, 0.1), (math.nan, math.nan), (0.9, 0.9)) == [3, 3, 3]


def test_undefined_alignments_speak_for_nothing():
    nan = math.nan
    assert walk(Li2Stage(), (0.6, 0.6), (nan, nan), (0.6, 0.6), (0.6, nan)) == [1, 1, 1, 2]
    assert walk(Li2Stage(stage=2), (0.3, 0.9), (0.3, nan), (0.3, 0.9), (0.3, 0.9)) == [2, 2, 2, 3]


def test_targets_that_are_not_fitted_keep_the_first_stage():
    assert walk(Li2Stage(), *[(0.9, 0.9, 0.8)] * 3, (0.9, 0.9, 0.1), (0.9, 0.9, 0.1)) == [1, 1, 1, 1, 2]
    assert walk(Li2Stage(), *[(0.9, 0.9, math.nan)] * 3) == [1, 1, 1]
    assert walk(Li2Stage(fit_threshold=0.9), *[(0.9, 0.9, 0.8)] * 2) == [1, 2]
    assert walk(Li2Stage(stage=2), *[(0.5, 0.9, 0.8)] * 2) == [2, 3]  # only the first change asks for it


def test_stage_thresholds_are_arguments():
    assert walk(Li2Stage(lazy_threshold=0.9), *[(0.8, 0.8)] * 3) == [1, 1, 1]
    assert walk(Li2Stage(stage=2, gap_threshold=0.05), *[(0.8, 0.86)] * 2) == [2, 3]


def test_stage_goes_through_plain_data():
    stage = Li2Stage(patience=3).update(0.6, 0.6).update(0.6, 0.6)
    saved = json.loads(json.dumps(dataclasses.asdict(stage)))
    restored = Li2Stage(**saved)
    assert restored == stage
    assert restored.update(0.6, 0.6).name == "independent"


def test_stage_refuses_nonsense():
    with pytest.raises(ValueError, match="patience"):
        Li2Stage(patience=0)
    with pytest.raises(ValueError, match="stage"):
        Li2Stage(stage=4)
