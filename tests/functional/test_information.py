"""Matrix entropies against numpy and closed forms, both sides of the Gram matrix, and gradients against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grok_callbacks.functional import (
    feature_entropy,
    feature_mutual_information,
    gram_matrix,
    information,
    matrix_entropy,
    matrix_mutual_information,
    mean_squared_input_gradient,
)

ORDERS = [0.0, 0.3, 0.5, 0.999, 1.0, 1.001, 1.5, 2.0, 5.0, 60.0, math.inf]
quick = settings(max_examples=25, deadline=None, derandomize=True)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_entropy(gram, alpha):
    """By the definition, in numpy, on the eigenvalues that are not rounding."""
    eigenvalues = np.linalg.eigvalsh(gram.double().numpy()) / len(gram)
    shares = eigenvalues[eigenvalues > 1e-13]
    if alpha == 1:
        return -(shares * np.log(shares)).sum()
    if math.isinf(alpha):
        return -np.log(shares.max())
    return np.log((shares**alpha).sum()) / (1 - alpha)


class TestGram:
    def test_cosines(self):
        features = random(7, 4)
        reference = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
        torch.testing.assert_close(gram_matrix(features), reference)

    def test_unit_diagonal_exactly(self):
        assert (gram_matrix(random(200, 3)).diagonal() == 1).all()

    def test_zero_rows_are_alike_and_unlike_any_other(self):
        gram = gram_matrix(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [-3.0, -4.0]]))
        expected = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, -1], [1, 0, 1, 0], [0, -1, 0, 1]], dtype=torch.float64)
        torch.testing.assert_close(gram, expected)
        assert matrix_entropy(gram_matrix(torch.zeros(5, 3))) == 0

    @pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
    def test_scales_whose_squares_leave_the_range(self, scale):
        features = random(5, 3)
        torch.testing.assert_close(gram_matrix(features * scale), gram_matrix(features))

    def test_a_bad_row_spoils_its_own_row_and_column(self):
        features = random(4, 3)
        for bad in (math.nan, math.inf):
            features[1, 0] = bad
            spoilt = gram_matrix(features).isnan()
            assert spoilt[1].all()
            assert spoilt[:, 1].all()
            assert spoilt.sum() == 7

    def test_further_dimensions_are_flattened(self):
        features = random(6, 2, 3)
        assert torch.equal(gram_matrix(features), gram_matrix(features.flatten(1)))

    def test_integers_and_half(self):
        features = torch.tensor([[3, 4], [4, -3]])
        torch.testing.assert_close(gram_matrix(features), torch.eye(2, dtype=torch.float64))
        torch.testing.assert_close(gram_matrix(features.half()), torch.eye(2, dtype=torch.float64))

    @pytest.mark.parametrize("shape", [(), (0, 3), (3, 0)])
    def test_nothing_there(self, shape):
        for function in (gram_matrix, feature_entropy):
            with pytest.raises(ValueError, match="features"):
                function(torch.ones(shape))


class TestEntropy:
    @pytest.mark.parametrize(("alpha", "key"), [(1.0, "alpha1"), (2.0, "alpha2"), (0.5, "alpha_half")])
    def test_golden(self, golden, alpha, key):
        case = golden["matrix"]
        features = torch.tensor(case["Z1"], dtype=torch.float64)
        # The reference counts eigenvalues of 1e-17, which are rounding and weigh 1e-8 at order 1/2.
        expected = pytest.approx(case[f"entropy_{key}"], rel=1e-9 if alpha >= 1 else 1e-7)
        assert matrix_entropy(gram_matrix(features), alpha).item() == expected
        assert feature_entropy(features, alpha).item() == expected

    @pytest.mark.parametrize("alpha", ORDERS)
    def test_numpy_on_either_side(self, alpha):
        for seed, (n, d) in enumerate([(30, 5), (5, 30), (12, 12), (1, 4), (9, 1)]):
            features = random(n, d, seed=seed)
            gram = gram_matrix(features)
            expected = pytest.approx(slow_entropy(gram, alpha), rel=1e-9, abs=1e-12)
            assert matrix_entropy(gram, alpha).item() == expected
            assert feature_entropy(features, alpha).item() == expected

    @pytest.mark.parametrize("alpha", ORDERS)
    @pytest.mark.parametrize("n", [1, 2, 9])
    def test_closed_forms(self, n, alpha):
        assert matrix_entropy(torch.eye(n), alpha).item() == pytest.approx(math.log(n), abs=1e-12)
        assert matrix_entropy(torch.ones(n, n), alpha).item() == pytest.approx(0, abs=1e-12)
        # Three clusters of equal rows with shares 1/2, 1/3, 1/6.
        clusters = torch.tensor([0, 0, 0, 1, 1, 2])
        blocks = (clusters[:, None] == clusters).double()
        shares = torch.tensor([3, 2, 1], dtype=torch.float64).diag()
        expected = slow_entropy(shares / 2, alpha)
        assert matrix_entropy(blocks, alpha).item() == pytest.approx(expected, rel=1e-12)

    def test_never_minus_zero_or_below(self):
        for alpha in ORDERS:
            for n in (1, 7, 50):
                value = feature_entropy(torch.ones(n, 3), alpha)
                assert value >= 0
                assert not value.signbit()

    @quick
    @given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10**6), st.sampled_from(ORDERS))
    def test_bounds_and_invariants(self, n, d, seed, alpha):
        features = random(n, d, seed=seed)
        value = feature_entropy(features, alpha).item()
        assert 0 <= value <= math.log(min(n, d)) + 1e-9
        scales = torch.rand(n, 1, dtype=torch.float64) + 0.1
        rotation = torch.linalg.qr(random(d, d, seed=1))[0]
        for same in (features * scales, features @ rotation, features.flip(0), -features, features.repeat(3, 1)):
            # Weak orders see eigenvalues that are hardly there, and those are what rounding moves.
            assert feature_entropy(same, alpha).item() == pytest.approx(value, abs=1e-5 if alpha < 0.5 else 1e-7)

    def test_falls_with_the_order(self):
        gram = gram_matrix(random(20, 6))
        values = [matrix_entropy(gram, alpha).item() for alpha in ORDERS]
        assert values == sorted(values, reverse=True)

    def test_continuous_at_one(self):
        gram = gram_matrix(random(40, 9))
        shannon = matrix_entropy(gram).item()
        previous = math.inf
        for exponent in range(2, 17):
            gap = max(abs(matrix_entropy(gram, 1 + sign * 10.0**-exponent).item() - shannon) for sign in (-1, 1))
            assert gap <= max(10.0**-exponent, 1e-14)
            assert gap <= previous + 1e-14
            previous = gap

    def test_no_jump_between_the_two_ways_of_computing(self):
        gram = gram_matrix(random(40, 9))
        for border in (0.5, 1.5):
            below, above = (matrix_entropy(gram, border + shift).item() for shift in (-1e-12, 1e-12))
            assert below == pytest.approx(above, abs=1e-11)

    def test_small_orders_do_not_count_rounding_as_rank(self):
        features = random(200, 3, seed=5)
        assert feature_entropy(features, 0).item() == pytest.approx(math.log(3), abs=1e-12)
        assert matrix_entropy(gram_matrix(features), 0).item() == pytest.approx(math.log(3), abs=1e-12)
        assert matrix_entropy(gram_matrix(features), 0.1) <= math.log(3)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_bad_entries_give_nan(self, bad):
        features = random(5, 3)
        features[2, 1] = bad
        assert feature_entropy(features).isnan()
        assert matrix_entropy(gram_matrix(features)).isnan()
        assert feature_mutual_information(features, random(5, 2)).isnan()
        assert matrix_entropy(torch.zeros(3, 3)).isnan()

    @pytest.mark.parametrize(
        ("gram", "message"),
        [
            (torch.ones(3), "square"),
            (torch.ones(2, 3), "square"),
            (torch.ones(0, 0), "square"),
            (torch.tensor([[1.0, 0.5], [-0.5, 1.0]]), "symmetric"),
            (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "positive semi-definite"),
            (-torch.eye(3), "positive semi-definite"),
        ],
    )
    def test_not_a_gram_matrix(self, gram, message):
        with pytest.raises(ValueError, match=f"gram must be .*{message}"):
            matrix_entropy(gram)

    @pytest.mark.parametrize("alpha", [-0.1, math.nan])
    def test_wrong_order(self, alpha):
        with pytest.raises(ValueError, match="alpha"):
            matrix_entropy(torch.eye(2), alpha)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_low_precision(self, dtype):
        features = random(30, 4).to(dtype)
        assert feature_entropy(features) == feature_entropy(features.double())
        # A Gram matrix that was rounded is hardly positive semi-definite any more, but near enough.
        rounded = gram_matrix(features).to(dtype)
        assert matrix_entropy(rounded).item() == pytest.approx(feature_entropy(features).item(), abs=0.05)


class TestMutualInformation:
    @pytest.mark.parametrize("alpha", [1.0, 2.0])
    def test_golden(self, golden, alpha):
        case = golden["matrix"]
        first, second = (torch.tensor(case[key], dtype=torch.float64) for key in ("Z1", "Z2"))
        expected = pytest.approx(case[f"mutual_information_alpha{alpha:.0f}"], rel=1e-9)
        assert matrix_mutual_information(gram_matrix(first), gram_matrix(second), alpha).item() == expected
        assert feature_mutual_information(first, second, alpha).item() == expected

    @pytest.mark.parametrize("alpha", ORDERS)
    def test_closed_forms(self, alpha):
        gram = gram_matrix(random(8, 3))
        identity, ones = torch.eye(8), torch.ones(8, 8)
        entropy = matrix_entropy(gram, alpha).item()
        assert matrix_mutual_information(identity, gram, alpha).item() == pytest.approx(entropy, abs=1e-9)
        assert matrix_mutual_information(ones, gram, alpha).item() == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("alpha", ORDERS)
    @pytest.mark.parametrize(("n", "d1", "d2"), [(40, 3, 2), (40, 1, 4), (6, 3, 2), (7, 3, 2), (5, 9, 2), (1, 2, 2)])
    def test_features_and_gram_matrices_agree(self, n, d1, d2, alpha):
        first, second = random(n, d1, seed=1), random(n, d2, seed=2)
        direct = matrix_mutual_information(gram_matrix(first), gram_matrix(second), alpha).item()
        assert feature_mutual_information(first, second, alpha).item() == pytest.approx(direct, abs=1e-7)

    def test_products_are_added_up_in_parts(self, monkeypatch):
        first, second = random(300, 3, seed=1), random(300, 2, seed=2)
        whole = feature_mutual_information(first, second)
        monkeypatch.setattr(information, "_CHUNK_ELEMENTS", 50)
        torch.testing.assert_close(feature_mutual_information(first, second), whole)

    def test_zero_rows(self):
        first, second = random(30, 3, seed=1), random(30, 2, seed=2)
        first[::4] = 0
        second[::3] = 0
        direct = matrix_mutual_information(gram_matrix(first), gram_matrix(second))
        torch.testing.assert_close(feature_mutual_information(first, second), direct)
        assert feature_mutual_information(torch.zeros(30, 3), second).item() == pytest.approx(0, abs=1e-12)

    @quick
    @given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
    def test_not_negative_at_one_and_symmetric(self, n, d1, d2, seed):
        first, second = random(n, d1, seed=seed), random(n, d2, seed=seed + 1)
        value = feature_mutual_information(first, second).item()
        assert value >= -1e-12
        assert feature_mutual_information(second, first).item() == pytest.approx(value, abs=1e-12)
        order = torch.randperm(n)
        assert feature_mutual_information(first[order], second[order]).item() == pytest.approx(value, abs=1e-9)

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="gram1 and gram2"):
            matrix_mutual_information(torch.eye(2), torch.eye(3))
        with pytest.raises(ValueError, match="features1 and features2"):
            feature_mutual_information(torch.ones(2, 2), torch.ones(3, 2))


def network(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


class TestInputGradient:
    def test_finite_differences(self):
        model, inputs, step = network(), random(5, 4), 1e-5
        total = 0.0
        with torch.no_grad():
            for j in range(4):
                shift = step * torch.eye(4, dtype=torch.float64)[j]
                total += (((model(inputs + shift) - model(inputs - shift)) / (2 * step)) ** 2).sum().item()
        inputs.requires_grad_()
        result = mean_squared_input_gradient(model(inputs), inputs)
        assert result.mean.item() == pytest.approx(total / 15, rel=1e-8)
        assert result.standard_error == 0

    def test_probes_are_unbiased_and_their_error_is_stated(self):
        model, inputs = network(), random(6, 4).requires_grad_()
        outputs = model(inputs)
        exact = mean_squared_input_gradient(outputs, inputs).mean
        few = [mean_squared_input_gradient(outputs, inputs, num_probes=8, seed=seed) for seed in range(60)]
        # In units of their own stated error the estimates scatter about the exact value like a t variable (7 degrees).
        scores = torch.stack([(estimate.mean - exact) / estimate.standard_error for estimate in few])
        assert abs(scores.mean()) < 0.6
        assert 0.7 < scores.std() < 1.9
        many = mean_squared_input_gradient(outputs, inputs, num_probes=400)
        assert abs(many.mean - exact) < 4 * many.standard_error
        assert many.standard_error < 0.05 * exact

    def test_probes_know_a_diagonal_jacobian_exactly(self):
        inputs = random(5, 3).requires_grad_()
        estimate = mean_squared_input_gradient(2 * inputs, inputs, num_probes=3)
        assert estimate.mean.item() == pytest.approx(4, rel=1e-12)
        assert estimate.standard_error.item() == pytest.approx(0, abs=1e-12)

    def test_probes_depend_on_the_seed_alone(self):
        inputs = random(5, 4).requires_grad_()
        outputs = network()(inputs)
        state = torch.get_rng_state()
        values = [mean_squared_input_gradient(outputs, inputs, num_probes=2, seed=seed).mean for seed in (0, 0, 1)]
        assert values[0] == values[1] != values[2]
        assert torch.equal(torch.get_rng_state(), state)

    def test_one_probe_states_no_error(self):
        inputs = random(5, 4).requires_grad_()
        assert mean_squared_input_gradient(network()(inputs), inputs, num_probes=1).standard_error.isnan()

    def test_positions_and_embeddings(self):
        # Each position's output depends on all positions of its own sample.
        inputs = random(3, 2, 4).requires_grad_()
        mixing = random(2, 2, seed=7)
        outputs = mixing @ network()(inputs)
        rows = [torch.autograd.grad(outputs[i].flatten()[k], inputs, retain_graph=True)[0] for i in range(3) for k in range(6)]
        expected = torch.stack(rows).square().sum().item() / 18
        assert mean_squared_input_gradient(outputs, inputs).mean.item() == pytest.approx(expected, rel=1e-12)

    def test_leaves_gradients_and_graph_alone(self):
        model, inputs = network(), random(5, 4).requires_grad_()
        outputs = model(inputs)
        mean_squared_input_gradient(outputs, inputs)
        assert inputs.grad is None
        assert all(parameter.grad is None for parameter in model.parameters())
        outputs.sum().backward()

    def test_outputs_that_do_not_depend_on_the_inputs(self):
        inputs = random(5, 4).requires_grad_()
        outputs = network()(random(5, 4, seed=3))
        assert mean_squared_input_gradient(outputs, inputs).mean == 0
        assert mean_squared_input_gradient(outputs, inputs, num_probes=2).mean == 0

    def test_half_gradients_are_squared_in_double(self):
        inputs = torch.ones(2, 3).half().requires_grad_()
        assert mean_squared_input_gradient(1000 * inputs, inputs).mean.item() == pytest.approx(1e6)

    def test_nan(self):
        inputs = torch.full((2, 3), math.nan, requires_grad=True)
        assert mean_squared_input_gradient(inputs.square(), inputs).mean.isnan()

    def test_wrong_arguments(self):
        inputs = random(5, 4).requires_grad_()
        outputs = network()(inputs)
        with pytest.raises(ValueError, match="as many samples"):
            mean_squared_input_gradient(outputs[:3], inputs)
        with pytest.raises(ValueError, match="as many samples"):
            mean_squared_input_gradient(outputs[:0], inputs[:0])
        with pytest.raises(ValueError, match=r"^inputs must require"):
            mean_squared_input_gradient(outputs, inputs.detach())
        with pytest.raises(ValueError, match=r"^outputs must be computed"):
            mean_squared_input_gradient(outputs.detach(), inputs)
        with pytest.raises(ValueError, match="num_probes"):
            mean_squared_input_gradient(outputs, inputs, num_probes=0)
