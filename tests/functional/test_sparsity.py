"""Activation sparsity against counting by hand, its invariants, and hostile activations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks.functional import activation_sparsity

random_values = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=24)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def test_golden(golden):
    case = golden["sparsity"]
    activations = torch.tensor(case["activations"], dtype=torch.float64)
    assert activation_sparsity(activations, case["threshold"]).item() == case["activation_sparsity"]


@quick
@given(random_values, st.floats(-1, 1, width=32))
def test_counts(values, threshold):
    reference = sum(value < threshold for value in values) / len(values)
    assert activation_sparsity(torch.tensor(values), threshold).item() == pytest.approx(reference, abs=1e-12)


@quick
@given(random_values, st.floats(-1, 1, width=32))
def test_relative_counts_against_the_root_mean_square(values, threshold):
    scale = math.sqrt(sum(value**2 for value in values) / len(values)) or 1.0
    # A value that stands exactly at the threshold may fall on either side of it by rounding.
    if any(math.isclose(value / scale, threshold, rel_tol=1e-9, abs_tol=1e-9) for value in values):
        return
    reference = sum(value / scale < threshold for value in values) / len(values)
    result = activation_sparsity(torch.tensor(values), threshold, relative=True)
    assert result.item() == pytest.approx(reference, abs=1e-12)


@quick
@given(random_values)
def test_never_falls_as_the_threshold_rises(values):
    thresholds = torch.linspace(-4, 4, 17).tolist()
    sparsities = [activation_sparsity(torch.tensor(values), threshold).item() for threshold in thresholds]
    assert sparsities == sorted(sparsities)
    assert (sparsities[0], sparsities[-1]) == (0, 1)


def test_does_not_depend_on_order():
    activations = torch.randn(13, 7, generator=torch.Generator().manual_seed(0)).relu()
    shuffled = activations[torch.randperm(13)][:, torch.randperm(7)]
    for relative in (False, True):
        assert activation_sparsity(shuffled, relative=relative) == activation_sparsity(activations, relative=relative)


def test_zero_threshold_on_relu_sees_nothing():
    assert activation_sparsity(torch.randn(20, 20).relu(), threshold=0.0) == 0


def test_relative_threshold_ignores_scale_and_the_absolute_one_does_not():
    activations = torch.rand(50, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    small = activations * 2.0**-8
    assert activation_sparsity(small, relative=True) == activation_sparsity(activations, relative=True)
    assert activation_sparsity(small) == 1
    assert activation_sparsity(activations) < 0.2


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_relative_threshold_survives_scales_whose_squares_do_not(scale):
    activations = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * scale
    assert activation_sparsity(activations, threshold=0.7, relative=True).item() == pytest.approx(1 / 3)


def test_silent_layer_is_wholly_sparse_by_either_threshold():
    zeros = torch.zeros(5, 3)
    assert activation_sparsity(zeros) == 1
    assert activation_sparsity(zeros, relative=True) == 1
    assert activation_sparsity(zeros, threshold=0.0, relative=True) == 0


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_activation_spoils_the_value(bad, relative):
    activations = torch.ones(4, 4)
    activations[1, 2] = bad
    assert activation_sparsity(activations, relative=relative).isnan()


def test_low_precision_and_integers():
    assert activation_sparsity(torch.tensor([0, 1, 2, 0])) == 0.5
    values = torch.tensor([0.05, 0.2, 60000.0])
    for dtype in (torch.float16, torch.bfloat16):
        assert activation_sparsity(values.to(dtype)).item() == pytest.approx(1 / 3)
        # The square of 60000 is beyond float16.
        assert activation_sparsity(values.to(dtype), relative=True).item() == pytest.approx(2 / 3)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="activations"):
        activation_sparsity(torch.empty(0, 5))
    for threshold in (math.nan, math.inf):
        with pytest.raises(ValueError, match="threshold"):
            activation_sparsity(torch.ones(2), threshold)
