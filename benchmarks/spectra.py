"""Time and error of ``singular_values`` against ``torch.linalg.svdvals``, by shape, rank and the baseline's precision.

Each row is one float32 matrix. Times are medians of repetitions in turn, ratios medians of the pairwise ratios: above 1,
``singular_values`` is the faster. With one thread, processor time is measured, which other load on the machine disturbs
less than the wall clock; with more, the wall clock. Errors are against float64 ``svdvals``: of the spectral entropy in
nats, and of the singular values relative to the largest.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

# Before NumPy and torch are imported: NumPy's BLAS takes its number of threads from here alone.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import _common
import torch
from torch import Tensor

from grok_callbacks.functional.spectral import singular_values, spectrum_entropy

SHAPES = {
    "square": (512, 512),
    "square, 113 x 128": (113, 128),
    "wide": (768, 3072),
    "wide, flat": (64, 4096),
    "tall": (3072, 768),
    "tall, thin": (4096, 64),
    "embedding": (10000, 128),
    "embedding, long": (50000, 64),
}
RANKS = ("full", "half", "8", "1", "decay")


def matrix(shape: tuple[int, int], rank: str) -> Tensor:
    """A float32 matrix of independent normal entries, of a product of two, or with singular values over eight decades."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    smaller = min(shape)
    if rank == "full":
        return torch.randn(shape, generator=generator)
    inner = {"half": smaller // 2, "decay": smaller}.get(rank) or int(rank)
    left = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    right = torch.randn(inner, columns, generator=generator, dtype=torch.float64)
    if rank == "decay":
        left = torch.linalg.qr(left).Q * torch.logspace(0, -8, smaller, dtype=torch.float64)
        right = torch.linalg.qr(right.T).Q.T
    return (left @ right).float()


def paired(functions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """As ``_common.paired``, by the clock that suits the number of threads, and more often where little takes long."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for function in functions:
        function()
    repeats = max(repeats, min(10 * repeats, int(0.3 / (clock() - start))))
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for times, function in zip(seconds, functions, strict=True):
            start = clock()
            function()
            times.append(clock() - start)
    return seconds


def row(name: str, rank: str, repeats: int) -> list[object]:
    """One line of the table."""
    weight = matrix(SHAPES[name], rank)
    baselines = [lambda: torch.linalg.svdvals(weight.double()), lambda: torch.linalg.svdvals(weight)]
    # Each baseline in turn with ours alone: who follows whom decides what is in the cache.
    (ours_seconds, double_seconds), (again, single_seconds) = (
        paired([lambda: singular_values(weight), baseline], repeats) for baseline in baselines
    )
    exact = torch.linalg.svdvals(weight.double())
    values_of_ours, single = singular_values(weight), torch.linalg.svdvals(weight).double()
    milliseconds = [f"{1e3 * statistics.median(times):.2f}" for times in (ours_seconds, double_seconds, single_seconds)]
    ratios = [
        f"{_common.median_ratio(baseline, ours):.2f}"
        for baseline, ours in ((double_seconds, ours_seconds), (single_seconds, again))
    ]
    errors = [
        error
        for values in (values_of_ours, single)
        for error in (
            f"{(spectrum_entropy(values) - spectrum_entropy(exact)).abs().item():.0e}",
            f"{((values - exact).abs().max() / exact[0]).item():.0e}",
        )
    ]
    rows, columns = SHAPES[name]
    return [name.partition(",")[0], f"{rows} x {columns}", rank, *milliseconds, *ratios, *errors]


HEADER = (
    "shape",
    "size",
    "rank",
    "ours, ms",
    "svdvals float64, ms",
    "svdvals float32, ms",
    "ratio to float64",
    "ratio to float32",
    "our entropy's error",
    "our values' error",
    "float32 entropy's error",
    "float32 values' error",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of torch threads, a table for each")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments = parser.parse_args(argv)
    tables = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        rows = [row(name, rank, arguments.repeats) for name in arguments.shapes for rank in RANKS]
        tables.append(f"## {threads} torch thread{'s' * (threads > 1)}\n\n{_common.markdown(HEADER, rows)}")
    text = (
        "Ratios above 1: `singular_values` is faster than `svdvals`. `half` is of half the full rank; `decay` has singular "
        "values\nover eight decades, down to the rounding of the float32 entries. Times are of the processor with one thread, "
        "of the wall clock with more.\nNumPy's BLAS has one thread throughout (`OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1`, "
        "set by the benchmark). An SVD\nstays, after a sample of the rows, where other routes don't pay: square matrices, "
        "and `half` and `decay`\nunless one side is 32 times the other.\n\n" + "\n\n".join(tables)
    )
    _common.publish(text, arguments.output)


if __name__ == "__main__":
    main()
