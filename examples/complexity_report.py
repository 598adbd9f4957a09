"""Tables and figures from the runs of ``reproduce_complexity.py``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from report_tables import put_between_markers
from reproduce_complexity import BETA, CONTROL, NOISE, PARTS, REGULARISERS, SIZES, TASKS

Result = dict[str, Any]
Results = dict[tuple[str, str], list[Result]]

BITS = "grok/complexity/bits"
TOTAL, TIGHT_TOTAL = "grok/complexity/total_bits", "tight/complexity/total_bits"
SYMBOLS = {"add": "+", "sub": "-", "mul": "x", "div": "/", CONTROL: "random labels"}
NAMES = {
    "none": "none",
    "weight decay": "weight decay",
    "spectral": "spectral entropy, noise, weight decay",
    "entropy": "spectral entropy, weight decay",
    "noise": "noise, weight decay",
}
COLORS = {"none": "#4c4c4c", "weight decay": "#1b6ca8", "spectral": "#d95f02"}


def read(folder: Path, size: str) -> Results:
    """Runs by task and regulariser, the parts included, in the order of seeds."""
    results: Results = {}
    for path in sorted(folder.glob(f"{size}-*.json")):
        result = json.loads(path.read_text())
        results.setdefault((result["task"], result["regulariser"]), []).append(result)
    return results


def only(results: Results, tasks: tuple[str, ...], names: tuple[str, ...]) -> Results:
    """The runs of some tasks and regularisers, in order."""
    return {(task, name): results[task, name] for task in tasks for name in names if (task, name) in results}


# --- one run --------------------------------------------------------------------------------------------------------


def first_step(result: Result, key: str, level: float) -> float:
    """The first of two consecutive looks at or above a level; NaN if there is none."""
    steps, values = result["curves"][key]
    looks = zip(steps, values, values[1:], strict=False)
    return next((step for step, value, after in looks if min(value, after) >= level), math.nan)


def until(result: Result, key: str, end: int) -> float:
    """Mean of a curve over the last tenth of its steps up to an end: complexity moves by a tenth between measurements."""
    return statistics.fmean(v for step, v in zip(*result["curves"][key], strict=True) if 0.9 * end <= step <= end)


def last(result: Result, key: str) -> float:
    """Mean of a curve over the last tenth of the run."""
    return until(result, key, result["curves"][key][0][-1])


def at_memorisation(result: Result) -> float:
    """Bits at the first measurement after 99% of the training set are right."""
    step = first_step(result, "train_acc", 0.99)
    return next((bits for at, bits in zip(*result["curves"][BITS], strict=True) if at >= step), math.nan)


def peak(result: Result) -> float:
    """The largest complexity of a run, in bits."""
    return max(result["curves"][BITS][1])


def kept(result: Result) -> float:
    """Complexity at the end over that at memorisation."""
    return last(result, BITS) / at_memorisation(result)


def fallen_at_onset(result: Result) -> float:
    """The share of the fall from the peak which is done when validation accuracy reaches 20%; NaN if it never does."""
    onset = first_step(result, "val_acc", 0.2)
    bits = next((bits for at, bits in zip(*result["curves"][BITS], strict=True) if at >= onset), math.nan)
    return (peak(result) - bits) / (peak(result) - last(result, BITS))


def peak_step(result: Result) -> float:
    """Step of the largest complexity."""
    steps, values = result["curves"][BITS]
    return steps[values.index(max(values))]


def ratio(result: Result, prefix: str = "grok") -> float:
    """How many times smaller the description is at the end than the raw weights after bzip2."""
    return last(result, "grok/complexity/naive_bits") / last(result, f"{prefix}/complexity/bits")


def trivial(result: Result) -> float:
    """Bits of the training targets without a network."""
    return result["samples"] * math.log2(result["classes"])


# --- tables ---------------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 0) -> str:
    """Mean and range over seeds."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "never"
    text = f"{statistics.fmean(finite):,.{digits}f}"
    if f"{min(finite):.{digits}f}" != f"{max(finite):.{digits}f}":
        text += f" ({min(finite):,.{digits}f} to {max(finite):,.{digits}f})"
    return text + (f", {len(values) - len(finite)} never" if len(finite) < len(values) else "")


def table(results: Results, columns: dict[str, tuple[Callable[[Result], float], int]]) -> list[str]:
    """A row for each task and regulariser, a column for each number."""
    lines = ["| " + " | ".join(["task", "regulariser", "runs", *columns]) + " |", "|" + "---|" * (len(columns) + 3)]
    for (task, name), runs in results.items():
        cells = [spread([number(run) for run in runs], digits) for number, digits in columns.values()]
        lines.append("| " + " | ".join([SYMBOLS[task], NAMES[name], str(len(runs)), *cells]) + " |")
    return lines


def dynamics(results: Results) -> list[str]:
    """When, and how complexity rises and falls, in bytes at an epsilon of 1."""
    return table(
        results,
        {
            "memorised at": (lambda run: first_step(run, "train_acc", 0.99), 0),
            "generalised at": (lambda run: first_step(run, "val_acc", 0.95), 0),
            "validation accuracy at the end": (lambda run: last(run, "val_acc"), 2),
            "bytes at the start": (lambda run: run["curves"][BITS][1][0] / 8, 0),
            "at memorisation": (lambda run: at_memorisation(run) / 8, 0),
            "peak": (lambda run: peak(run) / 8, 0),
            "step of the peak": (peak_step, 0),
            "end": (lambda run: last(run, BITS) / 8, 0),
            "memorisation / end": (lambda run: 1 / kept(run), 2),
            "share of the fall before 20% validation accuracy": (fallen_at_onset, 2),
        },
    )


def lengths(results: Results) -> list[str]:
    """What is left at the end."""
    return table(
        results,
        {
            "bare targets, bytes": (lambda run: trivial(run) / 8, 0),
            "total description, bytes": (lambda run: last(run, TOTAL) / 8, 0),
            "weights at epsilon 0.1": (lambda run: last(run, "grok/complexity/bits_0.1") / 8, 0),
            "total in `tight`": (lambda run: last(run, TIGHT_TOTAL) / 8, 0),
            "raw, bzip2": (lambda run: last(run, "grok/complexity/naive_bits") / 8, 0),
            "times smaller": (ratio, 1),
            "times smaller, `tight`": (lambda run: ratio(run, "tight"), 1),
            "bound": (lambda run: last(run, "grok/complexity/bound"), 2),
            "bound, `tight`": (lambda run: last(run, "tight/complexity/bound"), 2),
        },
    )


def parts(results: Results) -> list[str]:
    """What each part of the last regulariser does alone, over all tasks and seeds."""
    numbers: dict[str, tuple[Callable[[Result], float], int]] = {
        "memorised at": (lambda run: first_step(run, "train_acc", 0.99), 0),
        "generalised at": (lambda run: first_step(run, "val_acc", 0.95), 0),
        "total description, bytes": (lambda run: last(run, TOTAL) / 8, 0),
        "in `tight`": (lambda run: last(run, TIGHT_TOTAL) / 8, 0),
        "at epsilon 0.1, weights": (lambda run: last(run, "grok/complexity/bits_0.1") / 8, 0),
        "training loss": (lambda run: last(run, "train_loss"), 6),
    }
    lines = ["| regulariser | runs | " + " | ".join(numbers) + " |", "|" + "---|" * (len(numbers) + 2)]
    for name in ("weight decay", "noise", "entropy", "spectral"):
        runs = [run for (_, other), group in results.items() if other == name for run in group]
        if runs:
            cells = [spread([number(run) for run in runs], digits) for number, digits in numbers.values()]
            lines.append("| " + " | ".join([NAMES[name], str(len(runs)), *cells]) + " |")
    return lines


def claims(results: Results) -> list[str]:
    """In how many runs each claim holds."""
    tests: list[tuple[str, Callable[[Result], bool]]] = [
        ("memorises: 99% of the training set", lambda run: math.isfinite(first_step(run, "train_acc", 0.99))),
        ("generalises: 95% of the rest", lambda run: math.isfinite(first_step(run, "val_acc", 0.95))),
        ("complexity rises tenfold up to memorisation", lambda run: at_memorisation(run) > 10 * run["curves"][BITS][1][0]),
        ("ends a tenth or more below its value at memorisation", lambda run: kept(run) <= 0.9),
        ("ends at half of that or less", lambda run: kept(run) <= 0.5),
        ("weights 30 times smaller than raw ones after bzip2", lambda run: ratio(run) >= 30),
        ("the same in `tight`", lambda run: ratio(run, "tight") >= 30),
        ("total description below that of the bare targets", lambda run: last(run, TOTAL) < trivial(run)),
        ("the same in `tight`", lambda run: last(run, TIGHT_TOTAL) < trivial(run)),
        ("bound below 1", lambda run: last(run, "grok/complexity/bound") < 1),
    ]
    present = [name for name in REGULARISERS if any(key[1] == name for key in results)]
    lines = ["| | " + " | ".join(NAMES[name] for name in present) + " |", "|" + "---|" * (len(present) + 1)]
    for title, test in tests:
        cells = []
        for name in present:
            runs = [run for (_, other), group in results.items() if other == name for run in group]
            cells.append(f"{sum(map(test, runs))} of {len(runs)}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def order(results: Results, size: str) -> list[str]:
    """In how many tasks and seeds each regulariser leaves the least total description, at several moments of the runs."""
    groups = [group for group in by_run(results).values() if len(group) == len(REGULARISERS)]
    ends = [SIZES[size].steps * part // 3 for part in (1, 2, 3)]
    looks = [(key, end) for key in (TOTAL, TIGHT_TOTAL) for end in ends]
    names = {TOTAL: "", TIGHT_TOTAL: "`tight`, "}
    lines = ["| | " + " | ".join(f"{names[key]}step {end:,}" for key, end in looks) + " |", "|" + "---|" * (len(looks) + 1)]
    for name in REGULARISERS:
        cells = []
        for key, end in looks:
            wins = sum(min(group, key=lambda other: until(group[other], key, end)) == name for group in groups)
            mean = statistics.fmean(until(group[name], key, end) / 8 for group in groups)
            cells.append(f"{wins} of {len(groups)} ({mean:,.0f})")
        lines.append("| " + " | ".join([NAMES[name], *cells]) + " |")
    return lines


def by_run(results: Results) -> dict[tuple[str, int], dict[str, Result]]:
    """Results by task and seed, then by regulariser."""
    found: dict[tuple[str, int], dict[str, Result]] = {}
    for (task, name), runs in results.items():
        for run in runs:
            found.setdefault((task, run["seed"]), {})[name] = run
    return found


def settings(results: Results, size: str) -> list[str]:
    """What was run, in a sentence each."""
    used = SIZES[size]
    samples = {task: runs[0]["samples"] for (task, _), runs in sorted(results.items(), key=lambda item: item[0][0] == CONTROL)}
    counts = ", ".join(f"{count} ({SYMBOLS[task]})" for task, count in samples.items())
    seconds = sum(run["cpu_seconds"] for runs in results.values() for run in runs)
    noise = ", ".join(f"{delta:g} ({SYMBOLS[task]})" for task, delta in NOISE.items())
    return [
        f"`{used.network.__name__}`, embedding {used.width}, {used.hidden} hidden units, modulo {used.modulus}; training "
        f"samples: {counts}; batches of {used.batch_size or 'all of them'}; AdamW, learning rate {used.learning_rate:g}, "
        f"weight decay 1, without a regulariser 0; {used.steps:,} steps, measured at least every {used.every}, "
        f"in `tight` every {used.steps // 20}; beta {BETA:g}; "
        f"noise {noise}. "
        f"{sum(map(len, results.values()))} runs, {seconds / 60:.0f} CPU-minutes of a busy machine.",
    ]


# --- figures --------------------------------------------------------------------------------------------------------


def caption(task: str) -> str:
    """What a panel calls a task."""
    return SYMBOLS[task] if task == CONTROL else f"a {SYMBOLS[task]} b"


def curves_figure(results: Results) -> Figure:
    """Complexity and validation accuracy of every run."""
    tasks = [task for task in (*TASKS, CONTROL) if any(key[0] == task for key in results)]
    figure = Figure(figsize=(3.0 * len(tasks), 5.0), layout="constrained")
    axes = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
    for column, task in enumerate(tasks):
        for name, color in COLORS.items():
            for index, run in enumerate(results.get((task, name), [])):
                label = NAMES[name] if index == 0 else None
                steps, bits = run["curves"][BITS]
                axes[0, column].plot(steps, [value / 8000 for value in bits], color=color, lw=1.2, alpha=0.85, label=label)
                axes[1, column].plot(*run["curves"]["val_acc"], color=color, lw=1.2, alpha=0.85)
        axes[0, column].set_title(caption(task), fontsize=10)
        axes[1, column].set(xscale="log", xlabel="steps", xlim=(5, None), ylim=(-0.02, 1.02))
    axes[0, 0].set_ylabel("complexity (kB, epsilon 1)")
    axes[0, 0].set_ylim(0, None)
    axes[1, 0].set_ylabel("validation accuracy")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=len(labels))
    return figure


def lengths_figure(results: Results) -> Figure:
    """Total description length at the end, in both encodings, beside the targets without a network."""
    tasks = [task for task in TASKS if any(key[0] == task for key in results)]
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, key) in zip(panels, {"paper's encoding": TOTAL, "tight": TIGHT_TOTAL}.items(), strict=True):
        for place, task in enumerate(tasks):
            for shift, (name, color) in zip((-0.25, 0.0, 0.25), COLORS.items(), strict=True):
                values = [last(run, key) / 8000 for run in results.get((task, name), [])]
                if values:
                    label = NAMES[name] if place == 0 else None
                    axes.bar(place + shift, statistics.fmean(values), 0.22, color=color, alpha=0.75, label=label)
                    axes.plot([place + shift] * len(values), values, ".", color="black", ms=4)
            runs = next(results[task, name] for name in COLORS if (task, name) in results)
            label = "targets without a network" if place == 0 else None
            axes.hlines(trivial(runs[0]) / 8000, place - 0.4, place + 0.4, color="black", ls=":", lw=1.3, label=label)
        axes.set_xticks(range(len(tasks)), [caption(task) for task in tasks])
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("total description length (kB)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=len(labels))
    return figure


def write(folder: Path, size: str, report: Path) -> None:
    """Print the tables, put them between the markers of ``complexity.md``, and draw the figures."""
    results = read(folder, size)
    if not results:
        raise SystemExit(f"no runs of size {size!r} in {folder}")
    everything, control = results, only(results, (CONTROL,), REGULARISERS + PARTS)
    results = only(results, TASKS, REGULARISERS)
    tables = {
        "settings": settings(everything, size),
        "parts": parts(only(everything, TASKS, REGULARISERS + PARTS)),
        "control": dynamics(control),
        "dynamics": dynamics(results),
        "lengths": lengths(results),
        "order": order(results, size),
        "claims": claims(results),
    }
    put_between_markers(report / "complexity.md", tables)
    figures = {
        "curves": curves_figure(only(everything, (*TASKS, CONTROL), REGULARISERS)),
        "lengths": lengths_figure(results),
    }
    for name, figure in figures.items():
        figure.savefig(report / f"complexity_{name}.png", dpi=90)
