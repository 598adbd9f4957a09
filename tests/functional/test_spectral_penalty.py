from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks.functional import spectral_entropy_penalty


def reference(matrix):
    probabilities = torch.linalg.svdvals(matrix)
    probabilities = probabilities / probabilities.sum()
    return -(probabilities * probabilities.log()).sum()


def with_spectrum(values, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(shape[0], len(values), dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], len(values), dtype=torch.float64, generator=generator)).Q
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def gradient(matrix):
    matrix = matrix.clone().requires_grad_()
    spectral_entropy_penalty(matrix).backward()
    return matrix.grad


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**16))
def test_value_and_gradient_are_those_of_autograd_at_generic_spectra(rows, columns, seed):
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain = matrix.clone().requires_grad_()
    expected = reference(plain)
    expected.backward()
    torch.testing.assert_close(spectral_entropy_penalty(matrix), expected.detach())
    torch.testing.assert_close(gradient(matrix), plain.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_finite_differences(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(spectral_entropy_penalty, matrix)


def test_finite_differences_at_repeated_singular_values():
    # H is differentiable there, though the singular vectors are not.
    matrix = with_spectrum([3.0, 2.0, 2.0, 2.0, 0.5], (6, 5)).requires_grad_()
    assert torch.autograd.gradcheck(spectral_entropy_penalty, matrix, atol=1e-4)


def test_finite_differences_within_the_matrices_of_a_rank():
    # Where some singular values are zero, directions that leave them zero have a finite slope: the formula's.
    matrix = with_spectrum([3.0, 1.0], (5, 4))
    direction = with_spectrum([3.0, 1.0], (5, 4)) @ torch.randn(4, 4, dtype=torch.float64)  # Stays in the column space.
    left = torch.linalg.svd(matrix, full_matrices=False).Vh[:2]
    direction = direction @ left.T @ left  # And in the row space.
    step = 1e-6
    difference = reference_of_rank_two(matrix + step * direction) - reference_of_rank_two(matrix - step * direction)
    torch.testing.assert_close((gradient(matrix) * direction).sum(), difference / (2 * step), rtol=1e-6, atol=1e-8)


def reference_of_rank_two(matrix):
    values = torch.linalg.svdvals(matrix)[:2]
    return torch.special.entr(values / values.sum()).sum()


def test_zero_singular_values_are_left_at_zero():
    matrix = with_spectrum([3.0, 1.0], (5, 4))
    slope = gradient(matrix)
    assert slope.isfinite().all()
    # Only the directions of the two singular pairs move.
    assert torch.linalg.matrix_rank(slope) <= 2
    moved = torch.linalg.svdvals(matrix - 0.1 * slope)
    assert moved[2] < 1e-12


def test_equal_singular_values_are_a_stationary_maximum():
    matrix = 2 * torch.eye(4, dtype=torch.float64)
    assert spectral_entropy_penalty(matrix).item() == pytest.approx(math.log(4))
    assert gradient(matrix).abs().max() < 1e-12


def test_invariant_to_scale_so_that_the_gradient_is_orthogonal_to_the_matrix():
    matrix = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(spectral_entropy_penalty(7 * matrix), spectral_entropy_penalty(matrix))
    assert abs((gradient(matrix) * matrix).sum()) < 1e-12


def test_tiny_and_huge_spectra_have_finite_gradients():
    for values in ([1.0, 1e-7], [1.0, 1e-12], [1.0, 1e-300], [1e200, 1e200], [1e-200, 1e-201]):
        assert gradient(with_spectrum(values, (3, 3))).isfinite().all(), values


def test_zero_matrix():
    assert spectral_entropy_penalty(torch.zeros(3, 2)).item() == 0
    assert torch.equal(gradient(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_gives_nan_and_does_not_raise(bad):
    matrix = torch.ones(3, 2)
    matrix[0, 0] = bad
    assert spectral_entropy_penalty(matrix).isnan()
    assert gradient(matrix).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    matrix = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    value = spectral_entropy_penalty(matrix)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference(matrix.double()).item(), abs=1e-5)
    slope = gradient(matrix)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope.double(), gradient(matrix.double()), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.long)])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="matrix"):
        spectral_entropy_penalty(bad)


def test_descent_lowers_the_entropy():
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    start = spectral_entropy_penalty(matrix).item()
    optimizer = torch.optim.SGD([matrix], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        spectral_entropy_penalty(matrix).backward()
        optimizer.step()
    assert spectral_entropy_penalty(matrix).item() < start - 0.5
    assert matrix.isfinite().all()
