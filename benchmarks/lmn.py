"""Linear connectivity against a loop over pairs and against one batch of everything; and the estimate's bias and error."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._common import markdown, median_ratio, parser, publish
from grok_callbacks.functional import linear_connectivity, linear_mapping_number, linear_mapping_number_estimate

OUTPUTS = 31
LOOP_SECONDS = 1.0  # the loop over pairs is timed on as many pairs as it gets through in about this time
BATCH_BYTES = 4 * 2**30  # the batch of everything is run where its activations take less
REPEATED_SEGMENTS = 1_000_000  # larger cases are timed once


def tail(width: int, hidden_layers: int, activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(hidden_layers):
        layers += [nn.Linear(width, width), activation()]
    network = nn.Sequential(*layers, nn.Linear(width, OUTPUTS))
    for parameter in network.parameters():
        parameter.requires_grad_(False).mul_(2)
    return network


def paired(functions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """CPU seconds of each function, run in turn; CPU and not wall time, so that a busy machine counts less."""
    for function in functions if repeats > 1 else functions[:1]:
        function()  # warm
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for timings, function in zip(seconds, functions, strict=True):
            start = time.process_time()
            function()
            timings.append(time.process_time() - start)
    return seconds


def squared_correlation(times: Tensor, outputs: Tensor) -> Tensor:
    """Mean over outputs (..., T, C) of their squared correlation with times."""
    outputs, times = outputs - outputs.mean(-2, keepdim=True), times - times.mean()
    covariance = (times[:, None] * outputs).sum(-2)
    return (covariance**2 / (times.square().sum() * outputs.square().sum(-2))).mean(-1)


def one_pair(function: Callable[[Tensor], Tensor], points: Tensor, i: int, j: int) -> Tensor:
    times = torch.linspace(0, 1, 21)
    return squared_correlation(times, function(points[i] + times[:, None] * (points[j] - points[i])))


def loop(function: Callable[[Tensor], Tensor], points: Tensor, pairs: list[list[int]]) -> Tensor:
    return torch.stack([one_pair(function, points, i, j) for i, j in pairs])


def loop_over_outputs(function: Callable[[Tensor], Tensor], points: Tensor, pairs: list[list[int]]) -> list[float]:
    times = torch.linspace(0, 1, 21)
    result = []
    for i, j in pairs:
        outputs = function(points[i] + times[:, None] * (points[j] - points[i])).numpy()
        result.append(np.mean([np.corrcoef(times, output)[0, 1] ** 2 for output in outputs.T]))
    return result


def batch(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    times = torch.linspace(0, 1, 21)
    i, j = torch.triu_indices(len(points), len(points), 1)
    path = points[i, None] + times[:, None] * (points[j] - points[i])[:, None]
    values = squared_correlation(times, function(path.flatten(0, 1)).unflatten(0, path.shape[:2]))
    result = torch.eye(len(points))
    result[i, j] = result[j, i] = values
    return result


def peak_mebibytes(function: Callable[[Tensor], object], points: Tensor) -> float:
    """Largest growth of the resident memory of a forked process that calls ``function`` on ``points``."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_report_peak, args=(function, points, sender))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def _report_peak(function: Callable[[Tensor], object], points: Tensor, sender: Connection) -> None:
    function(points[:3])  # what libraries allocate once
    ctypes.CDLL(None).malloc_trim(0)  # free memory that would be taken before any from the system
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = _status("VmRSS")
    function(points)
    sender.send((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def speed_row(network: nn.Sequential, kind: str, count: int, repeats: int) -> list[str]:
    width = network[0].in_features
    points = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    function = network if kind == "Sequential" else lambda x: network(x)  # noqa: PLW0108 (hides the structure)
    every = torch.combinations(torch.arange(count))
    start = time.process_time()
    loop(function, points, every[:10].tolist())
    size = min(len(every), max(10, int(10 * LOOP_SECONDS / (time.process_time() - start))))
    sample = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:size]]

    ours, plain = partial(linear_connectivity, function), partial(batch, function)
    few = sample[: len(sample) // 10 + 1].tolist()
    loops = [partial(loop_over_outputs, function, points, few), partial(loop, function, points, sample.tolist())]
    functions: list[Callable[[], object]] = [*loops, partial(ours, points)]
    fits = len(every) * 21 * width * 4 * 3 < BATCH_BYTES
    memory, batch_memory = peak_mebibytes(ours, points), peak_mebibytes(plain, points) if fits else 0
    if fits:
        functions.append(partial(plain, points))
    by_output, sampled, own, *batched = paired(functions, repeats if len(every) < REPEATED_SEGMENTS else 1)
    ratio = median_ratio(sampled, own) * len(every) / size
    slow_ratio = median_ratio(by_output, own) * len(every) / len(few)
    difference = (ours(points[:64])[:10, :10] - batch(function, points[:64])[:10, :10]).abs().max()
    hidden = sum(isinstance(layer, nn.Linear) for layer in network) - 1
    return [
        f"{hidden} x {width} {type(network[1]).__name__}",
        kind,
        f"{count:,}",
        f"{statistics.median(own):.3g}",
        f"{statistics.median(own) / len(every) * 1e6:.2f}",
        f"**{slow_ratio:.0f}x**",
        f"{ratio:.0f}x",
        f"{len(few):,}, {size:,} of {len(every):,}",
        f"**{median_ratio(batched[0], own):.1f}x**" if batched else "-",
        f"{memory:.1f}",
        f"{batch_memory:.0f} ({batch_memory / memory:.0f}x)" if batched else "-",
        f"{difference:.0e}",
    ]


SPEED_HEADER = (
    "tail", "seen as", "N", "CPU seconds", "us a pair", "loop (a) / ours", "loop (a') / ours",
    "pairs (a), (a') were timed on", "batch (b) / ours", "peak MiB, ours", "peak MiB, (b)", "largest difference",
)  # fmt: skip


def speed(sizes: list[int], widths: list[int], repeats: int) -> str:
    rows = []
    for width in widths:
        network = tail(width, 1, nn.SiLU)
        rows += [speed_row(network, "Sequential", count, repeats) for count in sizes]
    small, narrow = min(sizes), min(widths)
    rows.append(speed_row(tail(narrow, 1, nn.ReLU), "Sequential", small, repeats))
    for width in widths[:2]:
        rows.append(speed_row(tail(width, 2, nn.SiLU), "Sequential", small, repeats))
        rows.append(speed_row(tail(width, 1, nn.SiLU), "black box", small, repeats))
    return markdown(SPEED_HEADER, rows)


def shares(count: int, repeats: int) -> str:
    """What a rank takes when the pairs are split."""
    network = tail(100, 1, nn.SiLU)
    points = torch.randn(count, 100, generator=torch.Generator().manual_seed(0))
    sizes = (1, 2, 4, 8)
    seconds = paired([partial(linear_connectivity, network, points, world_size=size) for size in sizes], repeats)
    ratios = [median_ratio(seconds[0], own) for own in seconds]
    rows = [[size, f"{min(own):.3f}", f"{ratio:.1f}x"] for size, own, ratio in zip(sizes, seconds, ratios, strict=True)]
    return markdown(["ranks", "CPU seconds of rank 0", "faster"], rows)


def estimates(count: int, seeds: int) -> str:
    """The estimate over many seeds, beside what it estimates and the number of all points."""
    network = tail(100, 1, nn.SiLU)
    points = torch.randn(count, 100, generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    connectivity = linear_connectivity(network, points)
    whole = linear_mapping_number(connectivity).item()
    whole_seconds = time.process_time() - start
    rows = []
    for size, repeats in ((50, 8), (100, 8), (200, 4), (200, 8)):
        generator = torch.Generator().manual_seed(12345)
        subsets = [torch.randperm(count, generator=generator)[:size] for _ in range(1000)]
        truth = torch.stack([linear_mapping_number(connectivity[s][:, s]) for s in subsets])
        start = time.process_time()
        found = [linear_mapping_number_estimate(network, points, size, repeats, seed=seed) for seed in range(seeds)]
        seconds = (time.process_time() - start) / seeds
        values = torch.stack([estimate.value for estimate in found])
        errors = torch.stack([estimate.standard_error for estimate in found])
        bias = values.mean() - truth.mean()
        doubt = (values.var() / seeds + truth.var() / len(truth)).sqrt()
        within = ((values - truth.mean()).abs() < 2 * errors).double().mean()
        rows.append([
            size, repeats, f"{truth.mean():.3f}", f"{values.mean():.3f}", f"{bias:+.3f} +- {doubt:.3f}",
            f"{values.std():.3f}", f"{errors.mean():.3f}", f"{within:.0%}", f"{seconds:.3f}",
        ])  # fmt: skip
    header = (
        "n", "subsets", "mean LMN of 1,000 subsets of n", f"mean of {seeds} estimates", "bias", "spread of the estimates",
        "mean stated error", "within 2 stated errors", "CPU seconds",
    )  # fmt: skip
    return f"{markdown(header, rows)}\n\nAll {count:,} points: LMN {whole:.2f} in {whole_seconds:.1f} CPU seconds."


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[64, 512, 2048])
    arguments.add_argument("--widths", type=int, nargs="+", default=[100, 512, 2048])
    arguments.add_argument("--seeds", type=int, default=40, help="repetitions of the estimate")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = f"""\
# Linear connectivity

Random networks in float32: `Linear, activation` as often as the tail says, then a linear layer to {OUTPUTS} outputs.
(a) is the definition as a loop over pairs i < j (the 21 points of a pair at once) and outputs, with `numpy.corrcoef`;
(a') the same loop over pairs with all outputs at once, in torch. Loops over all (i, j) would take twice as long. Both are
timed on a random sample of the pairs and extrapolated in proportion. (b)
evaluates all pairs i < j and all 21 points in one call, where that takes less than {BATCH_BYTES >> 30} GiB.
Peak memory is the growth of the resident set, the (N, N) float64 result included. Ratios are medians of times taken in
turn (one round where there are more than {REPEATED_SEGMENTS:,} pairs).

{speed(options.sizes, options.widths, options.repeats)}

# Pairs split over ranks

N = 1,024, width 100.

{shares(1024, options.repeats)}

# The estimate from random subsets

{estimates(1024, options.seeds)}

The estimate has no visible bias against what it estimates, the mean over subsets of n points. Against the number of all
points it would be far too low, at any n below N: numbers are to be compared at one n."""
    publish(text, options.output, "python -m benchmarks.lmn")


if __name__ == "__main__":
    main()
