"""How far the cheap defaults of three monitors are from what they stand for, on networks in training.

``python -m benchmarks.precision --output benchmarks/results/precision.md``

Beside each deviation stands what the measure varies by anyway: with other samples, other noise or other masks.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks._common import markdown, parser, publish
from grok_callbacks import CircuitComplexityMonitor, LinearMappingNumberMonitor, Monitor, Probe, Recorder, RobustnessMonitor
from grok_callbacks.tasks.recipes import digits_recipe, one_hot_recipe, transformer_recipe

RUNS = {
    "one-hot MLP, addition": (one_hot_recipe, (50, 200, 600)),
    "MLP, digits": (digits_recipe, (300, 1500, 4000)),
    "transformer, addition": (transformer_recipe, (100, 400, 1000)),
}
REPEATS = 6


def moments(recipe: Callable[[], Any], steps: tuple[int, ...]) -> Iterator[tuple[int, nn.Module, Any]]:
    """The network at each step, and its training set."""
    made = recipe()
    network, data = made.module, made.data.train_set
    optimizer = network.configure_optimizers()
    for step in range(max(steps) + 1):
        if step in steps:
            yield step, network, data
        optimizer.zero_grad()
        network.compute_loss(network(data.inputs), data.targets).backward()
        optimizer.step()


def found(network: nn.Module, data: Any, monitor: Monitor, key: str, *, size: int, draw: int = 0) -> float:
    """What a monitor logs under the first key that begins so, on samples drawn by number."""
    chosen = torch.randperm(len(data.inputs), generator=torch.Generator().manual_seed(draw))[:size]
    probe = Probe(train=(data.inputs[chosen], data.targets[chosen]), size=size)
    values = Recorder(network, [monitor], probe).record(1)
    return next(value for name, value in values.items() if name.startswith(f"grok/{key}"))


def percent(value: float, reference: float) -> str:
    return f"{100 * (value / reference - 1):+.1f}%"


def spread(values: list[float]) -> str:
    return f"{100 * statistics.stdev(values) / abs(statistics.mean(values)):.1f}%"


def lmn(network: nn.Module, data: Any) -> list[str]:
    """Fewer inner points, and other samples."""

    def number(quadrature: int | None, draw: int = 0) -> float:
        return found(network, data, LinearMappingNumberMonitor(quadrature=quadrature), "lmn", size=32, draw=draw)

    exact = number(None)
    others = [number(None, draw) for draw in range(REPEATS)]
    return [f"{exact:.3f}", *(percent(number(points), exact) for points in (5, 3, 2)), spread(others)]


def circuit(network: nn.Module, data: Any) -> list[str]:
    """The default's 128 samples against 256, and other masks."""

    def complexity(size: int, *, draw: int = 0, seed: int = 0) -> float:
        monitor = CircuitComplexityMonitor(num_samples=size, seed=seed)
        return found(network, data, monitor, "circuit_complexity", size=size, draw=draw)

    means = [complexity(256, seed=seed) for seed in range(REPEATS)]
    few = [complexity(128, draw=draw) for draw in range(REPEATS)]
    return [f"{means[0]:.4g}", percent(few[0], means[0]), spread(few), spread(means)]


def robustness(network: nn.Module, data: Any) -> list[str]:
    """Two draws of noise and one probe of the gradient against many."""

    def both(draws: int, probes: int) -> list[float]:
        return [
            found(network, data, RobustnessMonitor(num_draws=draws, gradient_probes=probes), f"robustness/{name}", size=128)
            for name in ("pmi", "pe", "input_gradient")
        ]

    few, many = both(2, 1), both(32, 64)
    return [*(f"{one - other:+.4f}" for one, other in zip(few[:2], many[:2], strict=True)), percent(few[2], many[2])]


MEASURES: dict[str, tuple[Callable[[nn.Module, Any], list[str]], list[str]]] = {
    "Linear mapping number, 32 samples": (
        lmn, ["all 19 inner points", "5 instead", "3 instead (default)", "2 instead", "other samples, deviation"]
    ),
    "Circuit complexity": (
        circuit, ["256 samples", "128 (default)", "other 128 samples, deviation", "other masks, deviation"]
    ),
    "Robustness, 128 samples, default noise": (
        robustness, ["PMI, 2 draws less 32, nats", "PE, the same", "input gradient, 1 probe against 64"]
    ),
}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: dict[str, list[list[object]]] = {name: [] for name in MEASURES}
    for run, (recipe, steps) in RUNS.items():
        for step, network, data in moments(recipe, steps):
            for name, (measure, _) in MEASURES.items():
                rows[name].append([run, step, *measure(network, data)])
    parts = [f"## {name}\n\n{markdown(['network', 'step', *MEASURES[name][1]], rows[name])}" for name in MEASURES]
    publish("\n\n".join(parts), arguments.output, "python -m benchmarks.precision")


if __name__ == "__main__":
    main()
