"""What the benchmarks share: paired timing, the machine's description, Markdown tables."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--output", type=Path, help="also write the printed tables to this Markdown file")
    result.add_argument("--repeats", type=int, default=5, help="paired repetitions; medians are printed")
    return result


def machine() -> str:
    """One line: processor, cores, threads, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} torch thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def paired(functions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each function, run in turn (A B A B ...) after one warm-up each: one list of ``repeats`` per function."""
    for function in functions:
        function()
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for timings, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            function()
            timings.append(time.perf_counter() - start)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the pairwise ratios, which a machine's drifting speed disturbs least."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def publish(text: str, output: Path | None, command: str | None = None) -> None:
    """Print ``text`` under the command and the machine, and write it to ``output`` if given."""
    command = command or "python " + " ".join(sys.argv)
    document = f"`{command}`  \n{machine()}\n\n{text}\n"
    print(document)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(document)
