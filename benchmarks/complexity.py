"""Rate-distortion complexity against Algorithm 1 of DeMoss et al. by Bayesian optimisation of 60 evaluations.

An embedding MLP and a one-layer transformer learn addition modulo 59 until they grok; four moments of each are described at
two allowances. The yardstick follows the paper: bin sizes in [1e-3, 1], thresholds in [0, 1], float32 arrays through bzip2,
one SVD per matrix, one loss and one compression per evaluation. Sizes are all of the same kind, header included. Times are
processor seconds of one thread.
"""

from __future__ import annotations

import bz2
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bayes_opt import BayesianOptimization
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks._common import markdown, parser, publish
from grok_callbacks.functional import encode, naive_size, rate_distortion

MODULUS = 59
FRACTION = 0.4
EPSILONS = (0.1, 1.0)
EVALUATIONS = 60
MOMENTS = ("init", "memorised", "mid", "grokked")
KINDS: dict[str, dict[str, Any]] = {
    "paper": {},
    "paper, per layer": {"per_layer": True},
    "tight": {"encoding": "tight"},
    "tight, one bin size": {"encoding": "tight", "per_layer": False},
}


EXPLANATION = """An embedding MLP and a one-layer pre-norm transformer learn addition modulo 59 from 40% of the pairs. The loss
is that of the whole training set; it may rise by epsilon nats (one-sided, as in the paper's code). `Bayesian` is
Algorithm 1 with 60 evaluations of the `bayesian-optimization` package, three seeds; its best bin size and threshold are then
written by the same `encode`, so that sizes include the same header. `paper` is ours in its encoding: the same arrays through
the same bzip2. `tight` is whole numbers through the best of several coders, with bin sizes by tensor by default. Of a search's
seconds on the transformer half (`paper`) and a third (`tight`) are losses of the network, which no search can do without."""


class EmbeddingMLP(nn.Module):
    """Two embedded operands side by side, one hidden layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(MODULUS, width)
        self.hidden = nn.Linear(2 * width, 4 * width)
        self.out = nn.Linear(4 * width, MODULUS)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.out(F.relu(self.hidden(self.embedding(x).flatten(1))))


class Transformer(nn.Module):
    """One pre-norm layer over ``a b =``, read at the last position."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Parameter(torch.randn(MODULUS + 1, width) / math.sqrt(width))
        self.position = nn.Parameter(torch.randn(3, width) / math.sqrt(width))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.out = nn.Linear(width, MODULUS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.cat([x, torch.full_like(x[:, :1], MODULUS)], 1)
        h = self.embedding[x] + self.position
        n, length, width = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = (q[:, :, -1:] @ k.mT / math.sqrt(width // self.heads)).softmax(-1) @ v
        h = h[:, -1] + self.project(attended.transpose(1, 2).reshape(n, width))
        h = h + self.down(F.relu(self.up(self.norm2(h))))
        return self.out(self.norm3(h))


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], float]] = {
    "MLP": (EmbeddingMLP, 1e-2),
    "transformer": (Transformer, 1e-3),
}


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    count = int(FRACTION * len(pairs))
    train, test = pairs[order[:count]], pairs[order[count:]]
    return train, train.sum(1) % MODULUS, test, test.sum(1) % MODULUS


def snapshots(name: str, width: int, max_steps: int = 20_000) -> tuple[nn.Module, dict[str, tuple[int, dict[str, Tensor]]]]:
    """The network and its weights at four moments of a run, kept in the temporary folder between runs."""
    factory, learning_rate = NETWORKS[name]
    torch.manual_seed(0)
    model = factory(width)
    cache = Path(tempfile.gettempdir()) / f"grok-callbacks-complexity-{name}-{width}.pt"
    if cache.exists():
        return model, torch.load(cache)
    inputs, targets, test_inputs, test_targets = data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=1.0)
    found: dict[str, tuple[int, dict[str, Tensor]]] = {}
    end = math.inf
    for step in range(max_steps + 1):
        logits = model(inputs)
        if step % 10 == 0:
            with torch.no_grad():
                train = float((logits.argmax(1) == targets).float().mean())
                test = float((model(test_inputs).argmax(1) == test_targets).float().mean())
            now = (step, {key: value.detach().clone() for key, value in model.named_parameters()})
            for moment, reached in zip(MOMENTS, (True, train > 0.999, test > 0.6, step >= end), strict=True):
                if reached and moment not in found:
                    found[moment] = now
            if test > 0.99:
                end = min(end, 1.3 * step)
            if "grokked" in found:
                torch.save(found, cache)
                return model, found
        optimizer.zero_grad()
        F.cross_entropy(logits, targets).backward()
        optimizer.step()
    raise RuntimeError(f"{name} did not grok in {max_steps} steps")


def coarse(weights: dict[str, Tensor], threshold: float, bin_size: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Algorithm 1's coarse weights and the arrays to be compressed."""

    def rounded(tensor: Tensor) -> Tensor:
        return (tensor / bin_size).round() * bin_size + 0.0

    result, arrays = {}, []
    for name, weight in weights.items():
        if weight.ndim > 1:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            kept = min(int((s.cumsum(0) < threshold * s.sum()).sum()) + 1, len(s)) if threshold > 0 else 0
            if kept * sum(weight.shape) < weight.numel():
                left, right = rounded(u[:, :kept] * s[:kept]), rounded(vh[:kept])
                result[name] = left @ right
                arrays += [left, right]
                continue
        result[name] = rounded(weight)
        arrays.append(result[name])
    return result, arrays


def bayesian(
    weights: dict[str, Tensor], loss: Callable[[dict[str, Tensor]], float], epsilon: float, seed: int
) -> tuple[float, float]:
    """The best threshold and bin size of 60 evaluations."""
    limit = loss(weights) + epsilon
    worst = -8.0 * sum(tensor.numel() for tensor in weights.values())

    def objective(bin_size: float, threshold: float) -> float:
        candidate, arrays = coarse(weights, threshold, 1e-3 ** (1 - bin_size))
        if not loss(candidate) < limit:
            return worst
        return -float(len(bz2.compress(b"".join(array.numpy().tobytes() for array in arrays))))

    optimizer = BayesianOptimization(objective, {"bin_size": (0.0, 1.0), "threshold": (0.0, 1.0)}, random_state=seed, verbose=0)
    optimizer.probe({"bin_size": 0.0, "threshold": 1.0}, lazy=False)
    optimizer.probe({"bin_size": 0.1, "threshold": 0.98}, lazy=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the Gaussian process's own about its fit
        optimizer.maximize(init_points=10, n_iter=EVALUATIONS - 12)
    best = optimizer.max["params"]
    return float(best["threshold"]), 1e-3 ** (1 - float(best["bin_size"]))


def seconds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    start = time.process_time()
    result = function(*args, **kwargs)
    return result, time.process_time() - start


def mean_seconds(repeats: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, float]:
    """The result, which is the same each time, and the mean of the times: as many as the yardstick has seeds."""
    runs = [seconds(function, *args, **kwargs) for _ in range(repeats)]
    return runs[0][0], statistics.mean(taken for _, taken in runs)


@dataclass
class Summary:
    """Ratios over all networks and moments."""

    sizes: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in KINDS})
    later: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in KINDS})
    worst: list[float] = field(default_factory=list)
    faster: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in ("paper", "tight")})
    faster_alone: list[float] = field(default_factory=list)
    layers: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add_layers(self, network: str, bits: dict[str, float]) -> None:
        """Sizes with bin sizes by tensor against those with one, after init."""
        for encoding, own, one in (("paper", "paper, per layer", "paper"), ("tight", "tight", "tight, one bin size")):
            self.layers.setdefault((network, encoding), []).append(bits[own] / bits[one])

    def text(self) -> str:
        """Means and extremes."""
        lines = []
        for name, ratios in (("all", self.sizes), ("all but the zeros of init", self.later)):
            means = ", ".join(f"{key} {statistics.mean(values):.3f}" for key, values in ratios.items())
            lines.append(f"Mean size against the mean of the seeds, {name}: {means}.")
        mean, largest = statistics.mean(self.worst), max(self.worst)
        lines.append(f"Size in the paper's encoding against the best of the seeds: mean {mean:.3f}, largest {largest:.3f}.")
        for (network, encoding), ratios in self.layers.items():
            mean, extremes = statistics.mean(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
            lines.append(
                f"Size with bin sizes by tensor against one, after init, {network}, {encoding}: {mean:.2f}, {extremes}."
            )
        for key, values in (*self.faster.items(), ("paper, epsilon 1 alone", self.faster_alone)):
            mean = math.exp(statistics.mean(map(math.log, values)))
            fewer = f"below 20 at {sum(value < 20 for value in values)} of {len(values)} moments"
            lines.append(f"Times faster, {key}: {mean:.0f} (geometric mean), {min(values):.0f} to {max(values):.0f}, {fewer}.")
        return "  \n".join(lines)


def measure(name: str, width: int, seeds: int, summary: Summary) -> tuple[list[list[object]], list[list[object]]]:
    """Rows of the two tables."""
    model, moments = snapshots(name, width)
    inputs, targets, _, _ = data()

    def loss(weights: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(functional_call(model, weights, (inputs,)), targets))

    sizes: list[list[object]] = []
    times: list[list[object]] = []
    for moment in MOMENTS:
        step, weights = moments[moment]
        naive = naive_size(weights) / 8
        results, spent, yardstick = {}, {}, []
        for kind, settings in KINDS.items():
            results[kind], spent[kind] = mean_seconds(seeds, rate_distortion, weights, loss, EPSILONS, **settings)
        one, one_seconds = mean_seconds(seeds, rate_distortion, weights, loss, EPSILONS[-1])
        for place, epsilon in enumerate(EPSILONS):
            runs = [seconds(bayesian, weights, loss, epsilon, seed) for seed in range(seeds)]
            yardstick.append(statistics.mean(taken for _, taken in runs))
            bytes_used = [len(encode(weights, bin_size, threshold)) for (threshold, bin_size), _ in runs]
            cells = []
            for kind, result in results.items():
                ratio = result[place].bits / 8 / statistics.mean(bytes_used)
                summary.sizes[kind].append(ratio)
                if moment != MOMENTS[0]:
                    summary.later[kind].append(ratio)
                cells.append(f"{result[place].bits / 8:,.0f} ({ratio:.2f})")
            if moment != MOMENTS[0]:
                summary.add_layers(name, {kind: result[place].bits for kind, result in results.items()})
            summary.worst.append(results["paper"][place].bits / 8 / min(bytes_used))
            runs_cell = " / ".join(f"{run:,}" for run in bytes_used)
            row = [f"{name}, {moment} ({step})", epsilon, f"{naive:,.0f}", runs_cell]
            sizes.append([*row, *cells, f"{summary.worst[-1]:.3f}"])
        both = sum(yardstick)
        times_row: list[object] = [f"{name}, {moment}", f"{both:.2f}"]
        for kind, ratios in summary.faster.items():
            ratios.append(both / spent[kind])
            times_row += [f"{spent[kind]:.2f}", f"{ratios[-1]:.0f}x", results[kind][0].evaluations]
        summary.faster_alone.append(yardstick[-1] / one_seconds)
        times.append([*times_row, f"{summary.faster_alone[-1]:.0f}x", one.evaluations])
    return sizes, times


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=3)  # seeds of the Bayesian optimisation
    options.add_argument("--width", type=int, default=64, help="of the embedding; the paper's transformer has 128")
    options.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    arguments = options.parse_args()
    torch.set_num_threads(1)
    summary = Summary()
    sizes: list[list[object]] = []
    times: list[list[object]] = []
    for name in arguments.networks:
        more_sizes, more_times = measure(name, arguments.width, arguments.repeats, summary)
        sizes += more_sizes
        times += more_times
    size_table = markdown(
        ["network, moment (step)", "epsilon", "raw, bzip2", "Bayesian, by seed", *KINDS, "paper / best seed"], sizes
    )
    columns = [column for kind in summary.faster for column in (kind, "faster", "losses")]
    time_table = markdown(["network, moment", "Bayesian", *columns, "epsilon 1 alone: faster", "losses"], times)
    publish(
        f"{EXPLANATION}\n\n"
        f"## Bytes\n\nIn parentheses the ratio to the mean of the seeds.\n\n{size_table}\n\n"
        f"## Processor seconds\n\nFor both epsilons: two Bayesian optimisations ({len(EPSILONS) * EVALUATIONS} losses) against "
        f"one search, the means of as many runs as there are seeds.\n\n{time_table}\n\n## Together\n\n{summary.text()}",
        arguments.output,
        "python -m benchmarks.complexity",
    )


if __name__ == "__main__":
    main()
