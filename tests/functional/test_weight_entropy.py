"""The absolute weight entropy against a plain loop, its bounds and its scaling law."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks.functional import weight_entropy


def slow(weight):
    return -sum(abs(w) * math.log(abs(w)) for w in weight.double().flatten().tolist() if w != 0)


def test_golden(golden):
    weight = torch.tensor(golden["weights"]["W"], dtype=torch.float64)
    assert weight_entropy(weight).item() == pytest.approx(golden["weights"]["weight_entropy"], rel=1e-9)


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (2, 3, 3, 3)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_against_a_plain_loop(shape, scale):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    result = weight_entropy(weight)
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx(slow(weight), rel=1e-10)


weights = st.lists(st.floats(-50, 50), min_size=1, max_size=9)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(weights, st.floats(1e-3, 1e3))
def test_bound_and_scaling_law(entries, factor):
    weight = torch.tensor(entries, dtype=torch.float64)
    entropy, total = weight_entropy(weight).item(), weight.abs().sum().item()
    assert entropy <= len(entries) / math.e + 1e-9
    expected = factor * entropy - factor * math.log(factor) * total
    assert weight_entropy(factor * weight).item() == pytest.approx(expected, rel=1e-9, abs=1e-9 * (1 + factor * total))
    assert weight_entropy(-weight.flip(0)).item() == pytest.approx(entropy, rel=1e-12, abs=1e-12)


def test_bound_is_met_at_one_over_e():
    weight = torch.full((6, 5), -1 / math.e, dtype=torch.float64)
    assert weight_entropy(weight).item() == pytest.approx(30 / math.e, rel=1e-12)


def test_uniform_weights_give_the_expectation():
    a, m, n = 0.3, 400, 500
    weight = (2 * torch.rand(m, n, generator=torch.Generator().manual_seed(0)) - 1) * a
    expected = m * n * (a / 4 - a / 2 * math.log(a))
    assert weight_entropy(weight).item() == pytest.approx(expected, rel=5e-3)


def test_sign_and_zeros():
    assert weight_entropy(torch.tensor([2.0, -3.0])).item() < 0
    assert weight_entropy(torch.zeros(3, 3)).item() == 0
    assert weight_entropy(torch.ones(3, 3)).item() == 0
    assert weight_entropy(torch.zeros(0, 3)).item() == 0
    assert weight_entropy(torch.tensor([0.0, 0.5, 0.0])).item() == pytest.approx(math.log(2) / 2)


def test_half_precision_and_integers():
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)).half()
    assert weight_entropy(weight).item() == pytest.approx(slow(weight), rel=1e-10)
    large = torch.full((100, 100), -60000.0, dtype=torch.float16)
    assert weight_entropy(large).item() == pytest.approx(slow(large), rel=1e-10)
    assert weight_entropy(torch.tensor([2, -2])).item() == pytest.approx(-4 * math.log(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_nan(bad):
    assert weight_entropy(torch.tensor([[0.5, bad], [1.0, 2.0]])).isnan()


def test_leaves_parameters_alone_and_refuses_complex():
    assert not weight_entropy(torch.nn.Parameter(torch.ones(2))).requires_grad
    with pytest.raises(ValueError, match="`weight` must be real"):
        weight_entropy(torch.ones(2, dtype=torch.complex64))
