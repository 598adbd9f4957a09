"""Linear connectivity and mapping number against a slow per-pair reference, closed forms and invariants."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from grok_callbacks.functional import (
    LinearMappingEstimate,
    linear_connectivity,
    linear_mapping_number,
    linear_mapping_number_estimate,
)
from grok_callbacks.functional.lmn import _pairs, _rule, _subsets


def reference(function, points, num_interpolation=21):
    """The definition, one segment and one output at a time."""
    result = np.eye(len(points))
    times = np.linspace(0, 1, num_interpolation)
    for i, j in itertools.combinations(range(len(points)), 2):
        path = torch.stack([points[i] + float(t) * (points[j] - points[i]) for t in times])
        with torch.no_grad():
            outputs = function(path).double().reshape(num_interpolation, -1).numpy()
        values = []
        for output in outputs.T:
            constant = output.std() <= 1e-14 * np.abs(output).max()
            values.append(1.0 if constant else np.corrcoef(output, times)[0, 1] ** 2)
        result[i, j] = result[j, i] = np.mean(values)
    return torch.tensor(result)


def reference_number(connectivity):
    eigenvalues = np.abs(np.linalg.eigvalsh(connectivity.numpy()))
    p = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return 2.0 ** -(p * np.log2(p)).sum()


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build(*layers, seed=0, gain=2.0):
    """A Sequential in float64 with weights large enough to bend."""
    network = nn.Sequential(*layers).double().eval()
    for index, parameter in enumerate(network.parameters()):
        parameter.data = gain * randn(*parameter.shape, seed=1000 * seed + index) / parameter.shape[-1] ** 0.5
    return network


def mlp(activation=nn.SiLU, width=12, inputs=5, outputs=4):
    return build(nn.Linear(inputs, width), activation(), nn.Linear(width, outputs))


class Mixer(nn.Module):
    """Attention-like: samples are sequences, and outputs are too."""

    def forward(self, x):
        return torch.softmax(x @ x.mT, -1) @ x


def black_box(function):
    """The same function with no structure to see."""

    def call(x):
        return function(x)

    return call


NETWORKS = {
    "head and readout": (mlp(), (5,)),
    "no head": (build(nn.Tanh(), nn.Linear(5, 6)), (5,)),
    "no readout": (build(nn.Linear(5, 6), nn.Softplus()), (5,)),
    "deep and nested": (build(nn.Linear(5, 8), nn.Sequential(nn.SiLU(), nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)), (5,)),
    "per position": (build(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 2)), (4, 3)),
    "sequence": (Mixer(), (4, 3)),
    "convolution": (build(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Flatten(), nn.Linear(18, 3)), (1, 5, 5)),
    "scalars": (torch.sin, ()),
    "one output": (build(nn.SiLU(), nn.Linear(5, 1)), (5,)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_interpolation", [3, 21])
def test_against_reference(name, num_interpolation):
    function, shape = NETWORKS[name]
    points = 2 * randn(9, *shape)
    expected = reference(function, points, num_interpolation)
    for measured in (function, black_box(function)):
        result = linear_connectivity(measured, points, num_interpolation)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert expected.min() < 0.99  # it did bend
    assert linear_mapping_number(result).item() == pytest.approx(reference_number(expected), rel=1e-9)


@pytest.mark.parametrize("quadrature", [1, 2, 3, 5])
def test_the_rule_is_exact_for_polynomials(quadrature):
    times, weights = _rule(21, quadrature)
    assert len(times) == quadrature + 2
    assert times[0] == 0
    assert times[-1] == 1
    assert weights.min() > 0
    uniform = torch.linspace(0, 1, 21, dtype=torch.float64)
    for degree in range(2 * quadrature + 2):
        assert float(weights @ times**degree) == pytest.approx(float((uniform**degree).sum()), rel=1e-12)


def test_the_rule_measures_polynomials_as_all_points_do():
    points = torch.tensor([[-1.0], [0.3], [1.2]], dtype=torch.float64)
    everywhere = linear_connectivity(lambda x: torch.cat([x**2, x**3], 1), points)
    assert everywhere.min() < 0.8
    torch.testing.assert_close(
        linear_connectivity(lambda x: torch.cat([x**2, x**3], 1), points, quadrature=3), everywhere, rtol=1e-10, atol=1e-12
    )


def test_a_rule_with_as_many_points_is_all_points():
    points = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    everywhere = linear_connectivity(torch.tanh, points)
    assert torch.equal(linear_connectivity(torch.tanh, points, quadrature=19), everywhere)
    assert torch.equal(linear_connectivity(torch.tanh, points, quadrature=100), everywhere)


def test_golden(golden):
    case = {key: torch.tensor(value, dtype=torch.float64) for key, value in golden["lmn"].items() if key != "network"}
    connectivity = linear_connectivity(lambda x: nn.functional.silu(x @ case["W1"].T + case["b1"]) @ case["W2"].T, case["x"])
    torch.testing.assert_close(connectivity, case["connectivity"], rtol=0, atol=1e-9)
    torch.testing.assert_close(linear_mapping_number(connectivity), case["lmn"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, nn.Tanh])
def test_float32_network(activation):
    network, points = mlp(activation, width=100, inputs=100, outputs=31), randn(12, 100)
    expected = reference(network, points)
    network.float()
    for function in (network, black_box(network)):
        result = linear_connectivity(function, points.float())
        torch.testing.assert_close(result, expected, rtol=0, atol=3e-6)
        assert linear_mapping_number(result).item() == pytest.approx(reference_number(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_network(dtype):
    network, points = mlp(width=100, inputs=100, outputs=31).to(dtype), randn(12, 100).to(dtype)
    seen = []
    result = linear_connectivity(lambda x: (seen.append(x.dtype), network(x))[1], points)
    structured = linear_connectivity(network, points)
    expected = reference(network.double(), points.double())
    assert set(seen) == {dtype}
    for measured in (result, structured):
        assert (measured - expected).abs().max() < 0.02
        assert (measured - expected).mean().abs() < 1e-3
        assert linear_mapping_number(measured).item() == pytest.approx(reference_number(expected), rel=5e-3)


def test_outputs_under_autocast_count_as_half_precision():
    network, points = mlp().float(), randn(8, 5, dtype=torch.float32)

    def ones(x):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x).softmax(1).to(torch.bfloat16).float().sum(1, keepdim=True)  # 1 up to rounding

    assert linear_mapping_number(linear_connectivity(ones, points)).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda t: torch.relu(t - 0.5), 0.798913),
        (lambda t: torch.relu(t - 0.25), 0.959700),
        (lambda t: torch.relu(t - 0.75), 0.495601),
        (lambda t: t**2, 0.932111),
        (lambda t: (t - 0.5) ** 2, 0.0),
        (lambda t: (t - 0.5).abs(), 0.0),
        (lambda t: 3 - 2 * t, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_squared_correlations_of_known_curves(function, expected, dtype):
    connectivity = linear_connectivity(function, torch.tensor([[0.0], [1.0]], dtype=dtype))
    assert connectivity[0, 1].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(connectivity, connectivity.T)


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 1000), st.sampled_from([torch.relu, torch.sin, torch.square]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_bounds(count, dimensions, seed, function):
    connectivity = linear_connectivity(function, 3 * randn(count, dimensions, seed=seed))
    assert torch.equal(connectivity, connectivity.T)
    assert torch.equal(connectivity.diagonal(), torch.ones(count, dtype=torch.float64))
    assert connectivity.min() >= 0
    assert connectivity.max() <= 1
    assert 1 - 1e-12 <= linear_mapping_number(connectivity).item() <= count + 1e-12


# --- The number of known matrices


@pytest.mark.parametrize("clusters", [1, 2, 5])
def test_equal_clusters_count(clusters):
    matrix = torch.block_diag(*[torch.ones(6, 6)] * clusters)
    assert linear_mapping_number(matrix).item() == pytest.approx(clusters, rel=1e-9)


def test_known_matrices():
    blocks = torch.block_diag(torch.ones(28, 28), torch.ones(1, 1), torch.ones(1, 1))
    assert linear_mapping_number(blocks).item() == pytest.approx(1.33795, abs=5e-6)
    assert linear_mapping_number(torch.eye(17)).item() == pytest.approx(17, rel=1e-12)
    uniform = torch.full((961, 961), 0.5).fill_diagonal_(1)
    assert linear_mapping_number(uniform).item() == pytest.approx(61.7467, abs=5e-5)


def test_negative_eigenvalues_count_by_their_size():
    matrix = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    assert torch.linalg.eigvalsh(matrix).min() < -0.4
    assert linear_mapping_number(matrix).item() == pytest.approx(reference_number(matrix), rel=1e-12)


def test_batch_of_matrices():
    matrices = torch.stack([torch.eye(4), torch.ones(4, 4), torch.full((4, 4), torch.nan)])
    numbers = linear_mapping_number(matrices)
    torch.testing.assert_close(numbers, torch.tensor([4, 1, torch.nan], dtype=torch.float64), equal_nan=True)


# --- Invariances


def test_order_of_samples_permutes_the_matrix():
    network, points, order = mlp(), randn(8, 5), torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])
    expected = linear_connectivity(network, points)[order][:, order]
    torch.testing.assert_close(linear_connectivity(network, points[order]), expected, rtol=0, atol=1e-12)


def test_affine_change_of_the_input():
    network, points = mlp(), randn(8, 5)
    change, shift = randn(5, 5, seed=7) + 2 * torch.eye(5), randn(5, seed=8)
    moved = points @ torch.linalg.inv(change) - shift
    result = linear_connectivity(lambda x: network((x + shift) @ change), moved)
    torch.testing.assert_close(result, linear_connectivity(network, points), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, -1.0, 1e25])
def test_scale_of_each_output(scale, dtype):
    network, points = mlp().to(dtype), randn(8, 5, dtype=dtype)
    scales = torch.tensor([1.0, scale, 1.0, -3 * scale], dtype=dtype)
    result = linear_connectivity(lambda x: network(x) * scales, points)
    torch.testing.assert_close(result, linear_connectivity(network, points), rtol=0, atol=2e-6)


def test_shift_of_each_output():
    network, points = mlp(), randn(8, 5)
    result = linear_connectivity(lambda x: network(x) + 1e3 * torch.arange(4), points)
    torch.testing.assert_close(result, linear_connectivity(network, points), rtol=0, atol=1e-9)


def test_a_large_bias_loses_no_digits_of_a_sequential():
    network, points = mlp().float(), randn(8, 5, dtype=torch.float32)
    expected = linear_connectivity(network, points)
    with torch.no_grad():
        network[-1].bias += 1e6
    assert torch.equal(linear_connectivity(network, points), expected)


def test_repeated_samples():
    network, points = mlp(), randn(6, 5)
    once = linear_mapping_number(linear_connectivity(network, points))
    thrice = linear_mapping_number(linear_connectivity(network, points.repeat(3, 1)))
    torch.testing.assert_close(once, thrice, rtol=1e-9, atol=0)


def test_preactivations_measure_as_the_layer_before():
    network, points = mlp(), randn(8, 5)
    after = linear_connectivity(network[1:], network[0](points).detach())
    torch.testing.assert_close(after, linear_connectivity(network, points), rtol=0, atol=1e-12)


# --- What is linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [
        nn.Linear(5, 3),
        nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)),
        nn.Identity(),
        lambda x: 7 - 3 * x,
        lambda x: torch.full_like(x, 1e4),
        torch.zeros_like,
        lambda x: torch.arange(3, device=x.device).expand(len(x), 3),  # integers, and always the same memory
    ],
)
def test_affine_and_constant_functions_are_one_map(function, dtype):
    if isinstance(function, nn.Module):
        function = function.to(dtype)
    connectivity = linear_connectivity(function, randn(10, 5).to(dtype))
    assert linear_mapping_number(connectivity).item() == pytest.approx(1, abs=1e-9)


def test_from_the_last_hidden_layer_it_is_exactly_one():
    network = mlp(width=100, outputs=31).float()
    hidden = network[:2](randn(60, 5, dtype=torch.float32)).detach()
    assert linear_mapping_number(linear_connectivity(network[2:], hidden)).item() == pytest.approx(1, abs=1e-9)


def test_constant_outputs_count_as_linear():
    network, points = mlp(outputs=2), randn(8, 5)
    with_constants = linear_connectivity(lambda x: torch.cat([network(x), torch.full((len(x), 2), 3.0)], 1), points)
    expected = (linear_connectivity(network, points) + 1) / 2
    torch.testing.assert_close(with_constants, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "noisy_constant",
    [
        lambda x: torch.softmax(5 * x, 1).sum(1, keepdim=True),
        lambda x: torch.sin(x) ** 2 + torch.cos(x) ** 2,
        lambda x: (x + 1e3) - x,
        lambda x: torch.exp(x) * torch.exp(-x),
        lambda x: 1 - 1e-5 * torch.finfo(x.dtype).eps * x,
    ],
)
def test_rounding_noise_on_a_constant_is_no_nonlinearity(noisy_constant, dtype):
    connectivity = linear_connectivity(noisy_constant, randn(20, 30, dtype=dtype))
    assert linear_mapping_number(connectivity).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_a_small_bend_on_a_large_constant_is_seen(size):
    points = torch.tensor([[0.0], [1.0]])
    connectivity = linear_connectivity(lambda t: 1 + size * torch.relu(t - 0.5), points)
    assert connectivity[0, 1].item() == pytest.approx(0.798913, abs=2e-7 / size)


def test_a_dead_output_elsewhere_does_not_hide_a_bend():
    """Scales are per output: one huge output must not make the others constant."""
    points = torch.tensor([[0.0], [1.0]])
    connectivity = linear_connectivity(lambda t: torch.cat([torch.relu(t - 0.5), 1e12 * t], 1), points)
    assert connectivity[0, 1].item() == pytest.approx((0.798913 + 1) / 2, abs=1e-6)


# --- Few, equal and broken points


def test_one_point():
    connectivity = linear_connectivity(mlp(), randn(1, 5))
    assert torch.equal(connectivity, torch.ones(1, 1, dtype=torch.float64))
    assert linear_mapping_number(connectivity).item() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_points(dtype):
    network, points = mlp().to(dtype), randn(2, 5, dtype=dtype)
    connectivity = linear_connectivity(network, points)
    r2 = connectivity[0, 1].item()
    eigenvalues = torch.tensor([1 + r2, 1 - r2], dtype=torch.float64) / 2
    assert linear_mapping_number(connectivity).item() == pytest.approx(
        torch.special.entr(eigenvalues).sum().exp().item(), rel=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_points_are_linearly_connected(dtype):
    network = mlp(width=100, outputs=31).to(dtype)
    points = randn(3, 5, dtype=dtype)[[0, 1, 0, 2, 1]]
    connectivity = linear_connectivity(network, points)
    assert connectivity[0, 2].item() == 1
    assert connectivity[1, 4].item() == 1
    torch.testing.assert_close(connectivity[0], connectivity[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("structured", [True, False])
def test_a_point_that_is_not_finite_gives_nan(broken, structured):
    network, points = mlp(), randn(5, 5)
    expected = linear_connectivity(network, points)
    points[2, 0] = broken
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        connectivity = linear_connectivity(network if structured else black_box(network), points)
        assert linear_mapping_number(connectivity).isnan()
    assert connectivity[2].isnan().all()
    assert connectivity[:, 2].isnan().all()
    rest = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(connectivity[rest][:, rest], expected[rest][:, rest], rtol=0, atol=1e-12)


def test_one_broken_point_alone_gives_nan():
    assert linear_mapping_number(linear_connectivity(torch.log, -torch.ones(1, 2))).isnan()


def test_function_that_breaks_within_a_segment_gives_nan():
    connectivity = linear_connectivity(lambda x: torch.sqrt(x**2 - 0.25), torch.tensor([[-1.0], [1.0], [2.0]]))
    assert connectivity.isnan().tolist() == [[False, True, True], [True, False, False], [True, False, False]]


# --- Memory, shares, and the function's own life


class Recorder:
    """Remembers how many rows it was called with."""

    def __init__(self, function):
        self.function = function
        self.rows = []

    def __call__(self, x):
        self.rows.append(len(x))
        return self.function(x)


@pytest.mark.parametrize("limit", [1, 100_000, 1_000_000])
def test_chunks_keep_the_memory_limit_and_change_nothing(limit):
    width = 200
    recorder = Recorder(lambda x: torch.tanh(x.repeat(1, width))[:, :3])
    points = randn(40, 1)
    result = linear_connectivity(recorder, points, memory_limit=limit)
    torch.testing.assert_close(result, linear_connectivity(recorder.function, points), rtol=0, atol=1e-12)
    bytes_of_row = 2 * width * 8  # repeat and tanh live together
    assert max(recorder.rows) <= max(19, limit // bytes_of_row)
    assert max(recorder.rows) >= min(19, limit // (2 * bytes_of_row))  # and it makes use of the limit


def test_weights_and_freed_activations_do_not_count_as_memory_of_a_row():
    deep = nn.Sequential(*[layer for _ in range(10) for layer in (nn.Linear(64, 64), nn.SiLU())]).double()
    recorder = Recorder(deep)
    limit = 19 * 64 * 8 * 50
    linear_connectivity(recorder, randn(40, 64), memory_limit=limit)
    assert max(recorder.rows) >= 19 * 6


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 100])
def test_shares_sum_to_the_whole(world_size):
    network, points = mlp(), randn(9, 5)
    shares = [linear_connectivity(network, points, rank=rank, world_size=world_size) for rank in range(world_size)]
    torch.testing.assert_close(torch.stack(shares).sum(0), linear_connectivity(network, points), rtol=0, atol=1e-12)
    assert (torch.stack(shares).count_nonzero(0) <= 1).all()


def test_broken_points_survive_the_sum_over_shares():
    points = randn(4, 5)
    points[1] = torch.nan
    whole = sum(linear_connectivity(mlp(), points, rank=rank, world_size=3) for rank in range(3))
    assert whole.isnan().tolist() == [[i == 1 or j == 1 for j in range(4)] for i in range(4)]


@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_pairs_are_all_pairs_once(count, chunk):
    chunks = list(_pairs(count, chunk, 0, 1, torch.device("cpu")))
    found = [pair for first, second in chunks for pair in zip(first.tolist(), second.tolist(), strict=True)]
    assert found == list(itertools.combinations(range(count), 2))
    assert all(len(first) <= chunk for first, _ in chunks)


def test_the_function_and_the_points_are_left_alone():
    network = build(nn.ReLU(inplace=True), nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    points = randn(8, 5).requires_grad_()
    before, state = points.detach().clone(), torch.get_rng_state()
    expected = reference(lambda x: network(x.clone()), before)
    result = linear_connectivity(network, points)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert not result.requires_grad
    assert torch.equal(points, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_function_that_returns_its_input():
    points = torch.tensor([[0.0, 1.0], [1.0, 3.0], [2.0, 2.0]])
    assert torch.equal(linear_connectivity(lambda x: x, points), torch.ones(3, 3, dtype=torch.float64))
    torch.testing.assert_close(
        linear_connectivity(lambda x: x.square_(), points), reference(lambda x: x**2, points), rtol=0, atol=1e-6
    )


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


class Squared(nn.Sequential):
    def forward(self, x):
        return super().forward(x) ** 2


def hooked(layer, kind):
    network = mlp()
    getattr(network[layer], f"register_forward_{kind}")(
        (lambda m, i: (i[0] ** 2,)) if kind == "pre_hook" else (lambda m, i, o: o**2)
    )
    return network


@pytest.mark.parametrize(
    "function",
    [
        hooked(0, "hook"),
        hooked(0, "pre_hook"),
        hooked(2, "hook"),
        hooked(2, "pre_hook"),
        build(Shifted(5, 6), nn.Tanh(), Shifted(6, 3)),
        Squared(*mlp()),
        build(parametrizations.weight_norm(nn.Linear(5, 6)), nn.SiLU(), nn.Linear(6, 3)),
        build(nn.LayerNorm(5), nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 3)),
    ],
)
def test_no_shortcut_around_hooks_and_subclasses(function):
    points = randn(7, 5)
    torch.testing.assert_close(linear_connectivity(function, points), reference(function, points), rtol=0, atol=1e-12)


def test_inside_inference_mode():
    network, points = mlp(), randn(6, 5)
    expected = linear_connectivity(network, points)
    with torch.inference_mode():
        assert torch.equal(linear_connectivity(network, points), expected)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"points": torch.zeros(0, 3)}, "points"),
        ({"points": torch.tensor(1.0)}, "points"),
        ({"points": torch.zeros(3, 2, dtype=torch.long)}, "points"),
        ({"num_interpolation": 2}, "num_interpolation"),
        ({"quadrature": 0}, "quadrature"),
        ({"memory_limit": 0}, "memory_limit"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"rank": -1}, "rank"),
        ({"function": lambda x: x.sum()}, "function"),
        ({"function": lambda x: x[:1]}, "function"),
        ({"function": lambda x: (x, x)}, "function"),
        ({"function": lambda x: x[:, :0]}, "function"),
        ({"function": lambda x: x.to(torch.complex64)}, "function"),
    ],
)
def test_bad_arguments(arguments, name):
    arguments = {"function": torch.sin, "points": torch.zeros(3, 2)} | arguments
    with pytest.raises(ValueError, match=name):
        linear_connectivity(**arguments)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 0)])
def test_bad_matrix(shape):
    with pytest.raises(ValueError, match="connectivity"):
        linear_mapping_number(torch.ones(shape))


# --- The estimate


def exact_mean(function, points, size, num_interpolation):
    """Mean number over all subsets of a size."""
    connectivity = linear_connectivity(function, points, num_interpolation)
    subsets = itertools.combinations(range(len(points)), size)
    return torch.stack([linear_mapping_number(connectivity[list(s)][:, list(s)]) for s in subsets]).mean().item()


def test_estimate_is_unbiased_and_its_error_honest():
    points, size, repeats = 2 * randn(9, 2), 4, 3
    target = exact_mean(torch.relu, points, size, 5)
    estimates = [
        linear_mapping_number_estimate(torch.relu, points, size, repeats, seed=seed, num_interpolation=5) for seed in range(200)
    ]
    values = torch.stack([estimate.value for estimate in estimates])
    spread = values.std().item()
    assert abs(values.mean().item() - target) < 3 * spread / len(values) ** 0.5
    stated = torch.stack([estimate.standard_error for estimate in estimates]).square().mean().sqrt().item()
    assert 0.85 * spread < stated < 2 * spread
    # It is not the number of all points, which is larger.
    assert linear_mapping_number(linear_connectivity(torch.relu, points, 5)).item() > target + 0.1


def test_estimate_of_all_points_is_exact():
    network, points = mlp(), randn(7, 5)
    estimate = linear_mapping_number_estimate(network, points, 7, 2)
    whole = linear_mapping_number(linear_connectivity(network, points))
    torch.testing.assert_close(estimate.samples, whole.expand(2), rtol=1e-9, atol=0)
    assert estimate.standard_error.item() == pytest.approx(0, abs=1e-9)


def test_estimate_by_seed_and_shares():
    network, points = mlp(), randn(20, 5)
    state = torch.get_rng_state()
    whole = linear_mapping_number_estimate(network, points, 6, 5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole.samples, linear_mapping_number_estimate(network, points, 6, 5, seed=3).samples)
    assert not torch.equal(whole.samples, linear_mapping_number_estimate(network, points, 6, 5, seed=4).samples)
    shares = [linear_mapping_number_estimate(network, points, 6, 5, seed=3, rank=r, world_size=2).samples for r in (0, 1)]
    assert torch.equal(shares[0] + shares[1], whole.samples)
    assert [share.count_nonzero().item() for share in shares] == [3, 2]


def test_mean_and_standard_error():
    estimate = LinearMappingEstimate(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert estimate.value.item() == 3
    assert estimate.standard_error.item() == pytest.approx(7**0.5 / 3**0.5)
    assert LinearMappingEstimate(torch.tensor([2.0])).standard_error.isnan()


def test_subsets_are_disjoint_as_long_as_they_can_be():
    subsets = [subset.tolist() for subset in _subsets(10, 3, 5, seed=0)]
    assert len({index for subset in subsets[:3] for index in subset}) == 9
    assert all(len(set(subset)) == 3 for subset in subsets)
    assert len(subsets) == 5


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 4}, "num_samples"),
        ({"repeats": 0}, "repeats"),
        ({"rank": 1}, "rank"),
        ({"points": torch.zeros(3, 2, dtype=torch.long)}, "points"),
    ],
)
def test_bad_estimate(arguments, name):
    arguments = {"points": torch.zeros(3, 2), "num_samples": 2} | arguments
    with pytest.raises(ValueError, match=name):
        linear_mapping_number_estimate(torch.sin, **arguments)
