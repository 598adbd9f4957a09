"""Spectra against float64 ``svdvals`` on every route, entropies against closed forms and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks.functional import effective_rank, singular_values, spectral, spectral_entropy
from grok_callbacks.functional.spectral import flatten_matrix, spectrum_entropy

# Large enough that each shape's low rank is split off and its full rank goes by the Gram matrix.
TALL = (6000, 136)
WIDE = (140, 5500)
LESS_TALL = (3000, 136)
SQUARE = (150, 170)


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of_rank(shape, rank, dtype=torch.float32):
    return (gaussian(shape[0], rank, seed=1) @ gaussian(rank, shape[1], seed=2)).to(dtype)


def with_spectrum(shape, values):
    rank = len(values)
    left = torch.linalg.qr(gaussian(shape[0], rank, seed=1)).Q
    right = torch.linalg.qr(gaussian(shape[1], rank, seed=2)).Q
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def slow_entropy(values):
    p = values / values.sum()
    p = p[p > 0]
    return -(p * np.log(p)).sum()


def check_against_svdvals(matrix):
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    values = singular_values(matrix)
    assert values.dtype == torch.float64
    assert values.shape == expected.shape
    assert (values >= 0).all()
    assert (values.diff() <= 0).all()
    assert np.abs(values.numpy() - expected).max() <= 1e-6 * expected[0]
    assert spectral_entropy(matrix).item() == pytest.approx(slow_entropy(expected), abs=1e-6)


def test_golden(golden):
    for case in ("weights", "low_rank"):
        matrix = torch.tensor(golden[case]["W"], dtype=torch.float64)
        assert spectral_entropy(matrix).item() == pytest.approx(golden[case]["spectral_entropy"], rel=1e-6)
        assert effective_rank(matrix).item() == pytest.approx(golden[case]["effective_rank"], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 8, 30, 75, 140])
@pytest.mark.parametrize("shape", [TALL, LESS_TALL, WIDE, SQUARE], ids=["tall", "less tall", "wide", "square"])
def test_every_shape_and_rank(shape, rank, dtype):
    check_against_svdvals(of_rank(shape, rank, dtype))


SPECTRA = {
    "equal": [1.0] * 136,
    "one large": [1.0] + [1e-4] * 135,
    "just resolved": [1.0] + [1.1e-5] * 135,
    "not resolved": [1.0] + [0.9e-5] * 135,
    "slow decay": [10 ** (-8 * i / 136) for i in range(136)],
    "fast decay": [10 ** (-60 * i / 136) for i in range(136)],
    "low rank with a tail": [1.0, 0.5, 0.25] + [3e-8] * 133,
    "low rank with an uneven tail": [1.0, 0.5, 0.25, 9e-8] + [1e-12] * 132,
    "low rank with a tail too large to split": [1.0] * 8 + [2e-7] * 128,
    "low rank with a middle": [1.0, 1e-5, 3e-6, 1e-7] + [1e-9] * 132,
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [TALL, LESS_TALL], ids=["tall", "less tall"])
@pytest.mark.parametrize("transposed", [False, True])
def test_spectra_that_a_gram_matrix_gets_wrong(name, shape, transposed):
    matrix = with_spectrum(shape, SPECTRA[name])
    check_against_svdvals(matrix.T if transposed else matrix)


def test_routes_taken(monkeypatch):
    """The matrices above do exercise each route: this fails when a threshold moves and one is no longer tested."""
    taken = []

    def watch(name):
        route = getattr(spectral, name)

        def watched(*args):
            result = route(*args)
            taken.append(name if result is not None else f"{name} failed")
            return result

        monkeypatch.setattr(spectral, name, watched)

    watch("_by_gram")
    watch("_by_splitting")

    def routes(matrix):
        taken.clear()
        singular_values(matrix)
        return list(taken)

    for shape in (TALL, WIDE):
        assert routes(gaussian(*shape)) == ["_by_gram"]
        assert routes(of_rank(shape, 8)) == ["_by_splitting"]
        assert routes(of_rank(shape, 75)) == ["_by_gram"]
    assert routes(of_rank(LESS_TALL, 75)) == []
    assert routes(gaussian(*SQUARE)) == []
    assert routes(with_spectrum(TALL, SPECTRA["just resolved"])) == ["_by_gram"]
    assert routes(with_spectrum(TALL, SPECTRA["not resolved"])) == ["_by_gram"]
    assert routes(with_spectrum(LESS_TALL, SPECTRA["not resolved"])) == ["_by_gram failed"]
    assert routes(with_spectrum(LESS_TALL, SPECTRA["low rank with a tail too large to split"])) == ["_by_splitting failed"]
    assert routes(gaussian(600, 64)) == []
    # The sampled rows are of rank two, the others are not.
    misleading = gaussian(*TALL)
    sampled = spectral._sample(torch.arange(TALL[0]).unsqueeze(1), 2 * (TALL[1] // 8) + 8).flatten().long()
    misleading[sampled] = of_rank((len(sampled), TALL[1]), 2, torch.float64)
    assert routes(misleading) == ["_by_splitting failed", "_by_gram"]
    check_against_svdvals(misleading)


UNEVEN = {
    "full rank": [1.0] * 136,
    "slow decay": SPECTRA["slow decay"],
    "rank 75": [1.0] * 75,
    "large uneven rest": [1.0] * 4 + [1e-2] * 4 + [1e-6] * 128,
    "small uneven rest": [1.0] * 4 + [1e-8] * 4 + [1e-12] * 128,
}


@pytest.mark.parametrize("name", UNEVEN)
def test_no_route_takes_what_it_gets_wrong(name):
    """Whatever the sample of rows says: a route's result is accurate, or there is none."""
    matrix = with_spectrum(TALL, UNEVEN[name])
    exact = torch.linalg.svd(matrix, full_matrices=False)
    rows = exact.Vh.T[:, :4]
    directions = {
        "dominant": rows,
        "off": torch.linalg.qr(rows + 1e-6 * gaussian(*rows.shape)).Q,
        "some": torch.linalg.qr(gaussian(*rows.shape)).Q,
    }
    results = {"gram": spectral._by_gram(matrix)}
    for which, basis in directions.items():
        results[which] = spectral._by_splitting(matrix, basis)
    for which, values in results.items():
        if values is not None:
            assert (values - exact.S).abs().max() <= 1e-6 * exact.S[0], which
            assert spectrum_entropy(values).item() == pytest.approx(slow_entropy(exact.S.numpy()), abs=1e-6), which
    assert results["gram"] is not None
    assert (spectral._by_gram(matrix[: LESS_TALL[0]]) is not None) == (name == "full rank")
    assert (results["dominant"] is not None) == (name == "small uneven rest")
    assert results["some"] is None


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1e-7, 1e14, 1e30, 1e250])
def test_scale_is_carried_through(scale):
    for matrix in (gaussian(*TALL), of_rank(TALL, 4, torch.float64)):
        torch.testing.assert_close(
            singular_values(matrix * scale), singular_values(matrix) * scale, rtol=1e-8, atol=1e-9 * scale
        )


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, (3, 3)])
def test_rank_one_is_zero_and_equal_values_are_their_logarithm(shape):
    assert spectral_entropy(with_spectrum(shape, [2.5])).item() == pytest.approx(0, abs=1e-9)
    assert effective_rank(with_spectrum(shape, [2.5])).item() == pytest.approx(1, abs=1e-9)
    for rank in (2, 3):
        assert spectral_entropy(with_spectrum(shape, [0.7] * rank)).item() == pytest.approx(math.log(rank), abs=1e-9)
        assert effective_rank(with_spectrum(shape, [0.7] * rank)).item() == pytest.approx(rank, abs=1e-8)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_invariances_and_bounds(m, n, seed, scale):
    matrix = gaussian(m, n, seed=seed)
    entropy = spectral_entropy(matrix).item()
    assert -1e-12 <= entropy <= math.log(min(m, n)) + 1e-9
    assert 1 - 1e-9 <= effective_rank(matrix).item() <= min(m, n) + 1e-9
    rotation = torch.linalg.qr(gaussian(m, m, seed=seed + 1)).Q
    for same in (matrix * -scale, matrix.T, rotation @ matrix, matrix.flip(0), torch.cat([matrix, matrix])):
        assert spectral_entropy(same).item() == pytest.approx(entropy, abs=1e-9)


def test_spectrum_entropy_takes_batches():
    spectra = torch.tensor([[2.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    entropies = spectrum_entropy(spectra)
    assert entropies.dtype == torch.float64
    torch.testing.assert_close(entropies, torch.tensor([math.log(2), 0, math.nan]).double(), equal_nan=True)


@pytest.mark.parametrize("shape", [TALL, SQUARE, (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_other_dtypes_are_computed_in_double(shape, dtype):
    matrix = (gaussian(*shape, seed=5) * 10).to(dtype)
    torch.testing.assert_close(
        singular_values(matrix), torch.linalg.svdvals(matrix.double()), rtol=0, atol=1e-9 * matrix.abs().max().item() * 100
    )


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, (2, 3), (1, 1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_nan_in_silence(shape, bad, capfd):
    matrix = gaussian(*shape, dtype=torch.float32)
    matrix[-1, shape[1] // 2] = bad
    values = singular_values(matrix)
    assert values.shape == (min(shape),)
    assert values.dtype == torch.float64
    assert values.isnan().all()
    assert spectral_entropy(matrix).isnan()
    assert effective_rank(matrix).isnan()
    # LAPACK's complaints go to the standard output, past Python's warnings.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, (2, 3)])
def test_a_matrix_of_zeros_has_no_distribution(shape):
    zeros = torch.zeros(shape)
    assert singular_values(zeros).tolist() == [0] * min(shape)
    assert spectral_entropy(zeros).isnan()
    assert effective_rank(zeros).isnan()


def test_rows_and_columns_of_zeros():
    """Embeddings of tokens that never occur, units that died."""
    for step in (2, 22):
        matrix = gaussian(*TALL)
        matrix[step // 2 :: step] = 0
        check_against_svdvals(matrix)
        matrix[:, ::3] = 0
        check_against_svdvals(matrix)


def test_strided_and_transposed_views():
    matrix = gaussian(2 * TALL[0], 2 * TALL[1], dtype=torch.float32)[::2, 1::2]
    check_against_svdvals(matrix)
    check_against_svdvals(matrix.T)


@pytest.mark.parametrize("has_mkl", [False, True])
def test_lower_matmul_precision_is_not_used(has_mkl, monkeypatch):
    """What a user allows the model's products, ours don't take, whoever multiplies."""
    monkeypatch.setattr(spectral, "_HAS_MKL", has_mkl)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for rank in (8, 75):
                check_against_svdvals(of_rank(TALL, rank))
            check_against_svdvals(gaussian(*TALL, dtype=torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)


def test_layouts_that_blas_does_not_take():
    row = gaussian(1, TALL[1])
    check_against_svdvals(row.expand(TALL))
    check_against_svdvals(row.T.expand(TALL[1], TALL[0]))
    both = gaussian(2 * TALL[0], 2 * TALL[1])[::2, ::2]
    check_against_svdvals(both)
    product = spectral._product(both[:50].T, both[:50])
    torch.testing.assert_close(product, both[:50].T @ both[:50])


def test_leaves_weights_alone():
    weight = torch.nn.Parameter(gaussian(*TALL, dtype=torch.float32))
    before = weight.detach().clone()
    assert not spectral_entropy(weight).requires_grad
    assert torch.equal(weight, before)
    with torch.inference_mode():
        assert spectral_entropy(weight) == spectral_entropy(before)


def test_flatten_matrix():
    weight = gaussian(4, 3, 2, 5)
    assert flatten_matrix(weight).shape == (4, 30)
    assert torch.equal(flatten_matrix(weight)[1], weight[1].flatten())
    assert flatten_matrix(gaussian(4, 3)).shape == (4, 3)
    with pytest.raises(ValueError, match="at least two dimensions"):
        flatten_matrix(torch.ones(4))
    with pytest.raises(ValueError, match="must be real"):
        flatten_matrix(torch.ones(4, 4, dtype=torch.complex64))


@pytest.mark.parametrize(
    "matrix", [torch.ones(4), torch.ones(2, 2, 2), torch.ones(0, 4), torch.ones(4, 0), torch.ones(2, 2, dtype=torch.complex64)]
)
@pytest.mark.parametrize("function", [singular_values, spectral_entropy, effective_rank])
def test_refuses_what_is_no_matrix(function, matrix):
    with pytest.raises(ValueError, match="matrix must be real"):
        function(matrix)
