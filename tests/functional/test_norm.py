"""The parameter norm against numpy, closed forms and numbers that overflow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks.functional import parameter_norm

INF = float("inf")


def test_golden(golden):
    weights = torch.tensor(golden["weights"]["W"], dtype=torch.float64)
    assert parameter_norm(weights).item() == pytest.approx(golden["weights"]["parameter_norm"], rel=1e-9)


@pytest.mark.parametrize("ord", [0.5, 1, 1.5, 2, 3, 10, INF])
def test_is_the_norm_of_the_concatenated_entries(ord):  # noqa: A002
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in [(3, 4), (5,), (), (2, 2, 2)]]
    flat = np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])
    expected = np.abs(flat).max() if ord == INF else (np.abs(flat) ** ord).sum() ** (1 / ord)
    named = {str(i): tensor for i, tensor in enumerate(tensors)}
    for given_as in (tensors, iter(tensors), named, torch.tensor(flat)):
        result = parameter_norm(given_as, ord)
        assert result.dtype == torch.float64
        assert result.shape == ()
        assert result.item() == pytest.approx(expected, rel=1e-12)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=8),
    st.sampled_from([1.0, 2.0, 3.5, INF]),
    st.floats(-1e3, 1e3),
    st.integers(0, 7),
)
def test_scales_and_ignores_order_and_grouping(entries, order, factor, cut):
    tensor = torch.tensor(entries, dtype=torch.float64)
    norm = parameter_norm(tensor, order).item()
    assert parameter_norm(tensor * factor, order).item() == pytest.approx(abs(factor) * norm, rel=1e-9, abs=1e-300)
    assert parameter_norm([tensor[:cut], tensor[cut:]], order).item() == pytest.approx(norm, rel=1e-12)
    assert parameter_norm(-tensor.flip(0), order).item() == pytest.approx(norm, rel=1e-12)


def test_known_values():
    assert parameter_norm(torch.full((10, 10), -2.0)).item() == pytest.approx(20)
    assert parameter_norm(torch.full((10, 10), -2.0), ord=1).item() == pytest.approx(200)
    assert parameter_norm(torch.full((10, 10), -2.0), ord=INF).item() == 2
    assert parameter_norm(torch.full((4,), -2.0), ord=0.5).item() == pytest.approx(32)


@pytest.mark.parametrize("ord", [1, 2, 50, INF])
@pytest.mark.parametrize("size", [1e-300, 1e-12, 1e300])
def test_neither_overflows_nor_vanishes(size, ord):  # noqa: A002
    tensors = [torch.full((8,), size, dtype=torch.float64), torch.full((8,), -size, dtype=torch.float64)]
    expected = size * (1 if ord == INF else 16 ** (1 / ord))
    assert parameter_norm(tensors, ord).item() == pytest.approx(expected, rel=1e-12)


def test_half_precision_and_integers():
    half = torch.full((100, 100), 60000.0, dtype=torch.float16)
    assert parameter_norm(half).item() == pytest.approx(100 * half[0, 0].item(), rel=1e-12)
    assert parameter_norm(torch.full((4,), 3.0, dtype=torch.bfloat16)).item() == pytest.approx(6)
    assert parameter_norm(torch.tensor([3, -4], dtype=torch.int8)).item() == pytest.approx(5)
    assert parameter_norm(torch.tensor([-128], dtype=torch.int8), ord=INF).item() == 128
    assert parameter_norm([torch.ones(9).half(), torch.zeros(3).double()]).item() == pytest.approx(3)


@pytest.mark.parametrize("ord", [1, 2, 3, INF])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_what_is_not_finite_gives_nan(bad, ord):  # noqa: A002
    for entries in ([1.0, bad], [bad, 1.0], [bad], [bad, -bad, 0.0]):
        assert parameter_norm([torch.ones(2), torch.tensor(entries)], ord).isnan()


def test_zeros_and_empty_tensors():
    for order in (1, 2, INF):
        assert parameter_norm(torch.zeros(3), order).item() == 0
        assert parameter_norm([torch.zeros(0, 4)], order).item() == 0
        assert parameter_norm([torch.zeros(0), torch.tensor([-3.0])], order).item() == pytest.approx(3)


def test_leaves_parameters_alone():
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    result = parameter_norm([parameter])
    assert not result.requires_grad
    assert parameter.tolist() == [3, 4]


@pytest.mark.parametrize("ord", [0, -1, math.nan, -INF, "abc", True, None])
def test_refuses_orders(ord):  # noqa: A002
    with pytest.raises(ValueError, match="`ord` must be a positive number"):
        parameter_norm(torch.ones(2), ord)


def test_refuses_nothing_and_complex():
    with pytest.raises(ValueError, match="at least one tensor"):
        parameter_norm([])
    with pytest.raises(ValueError, match="at least one tensor"):
        parameter_norm({})
    with pytest.raises(ValueError, match="must be real"):
        parameter_norm(torch.ones(2, dtype=torch.complex64))
