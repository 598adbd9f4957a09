"""Tables and figures from the runs of ``reproduce_robustness.py``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from report_tables import put_between_markers
from reproduce_robustness import EVERY, METHODS, SETTINGS, Cell, prepare

Run = dict[str, Any]
Runs = dict[tuple[str, str], list[Run]]

RESAMPLES = 10_000
PATIENCE = 3  # consecutive measurements outside its band with which a signal has moved
SIGNALS = {
    "norm": "grok/norm",
    "PMI": "grok/robustness/pmi",
    "PE": "grok/robustness/pe",
    "MID": "grok/robustness/mid",
    "ED": "grok/robustness/ed",
    "input gradient": "grok/robustness/input_gradient",
    "commutativity, both orders unseen": "grok/commutativity/both_unseen",
    "validation accuracy itself": "val_acc",
}
LAWS = ("identity", "inverse", "associativity")
COLORS = {
    "baseline": "#4c4c4c",
    "noise": "#d95f02",
    "small noise": "#fdae6b",
    "penalty": "#1b6ca8",
    "small penalty": "#74add1",
    "mirrored data": "#7b3294",
}


def read(folder: Path) -> Runs:
    """Runs by setting and method, in the order of seeds."""
    runs: Runs = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        add_hard_accuracy(result)
        runs.setdefault((result["setting"], result["method"]), []).append(result)
    return {key: sorted(group, key=lambda run: run["seed"]) for key, group in runs.items()}


# --- statistics -----------------------------------------------------------------------------------------------------


def bootstrap(values: Sequence[float], statistic: Callable[..., Any] = np.mean) -> tuple[float, float, float]:
    """A statistic and its 95% percentile interval over resampled seeds."""
    sample = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).integers(len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.percentile(statistic(sample[drawn], axis=1), [2.5, 97.5])
    return float(statistic(sample, axis=0)), float(low), float(high)


def steps_to_generalise(run: Run) -> int:
    """Or the steps of the whole run, a lower bound."""
    return run["last_step"] if run["grokked_step"] is None else run["grokked_step"]


def seconds_to_generalise(run: Run) -> float:
    """CPU time of training up to then, measuring left out."""
    return at(run, "seconds", steps_to_generalise(run))


def at(run: Run, key: str, step: int) -> float:
    """A curve's value at a step."""
    steps, values = run["curves"][key]
    return values[steps.index(step)]


def speedup(baseline: list[Run], runs: list[Run], cost: Callable[[Run], float]) -> tuple[float, float, float]:
    """How many times less a method needs than the baseline of the same seed: geometric mean and interval."""
    by_seed = {run["seed"]: run for run in baseline}
    logs = [math.log(cost(by_seed[run["seed"]]) / cost(run)) for run in runs if run["seed"] in by_seed]
    mean, low, high = bootstrap(logs)
    return math.exp(mean), math.exp(low), math.exp(high)


def verdict(baseline: list[Run], runs: list[Run]) -> str:
    """Help is fewer steps with 95% confidence, and no fewer runs that generalise."""

    def share(group: list[Run]) -> float:
        return sum(run["grokked_step"] is not None for run in group) / len(group)

    if share(runs) < share(baseline):
        return "harm: fewer runs generalise"
    if share(runs) == share(baseline) == 0:
        last, without = ([run["curves"]["val_acc"][1][-1] for run in group] for group in (runs, baseline))
        worse = "harm" if max(last) < min(without) else "none generalises"
        return f"{worse}: final accuracy {np.mean(last):.0%} against {np.mean(without):.0%}"
    _, low, high = speedup(baseline, runs, steps_to_generalise)
    return "helps" if low > 1 else "harm: slower" if high < 1 else "no clear difference"


def move(steps: list[int], values: list[float], start: int, onset: int) -> int | None:
    """When a signal leaves the band of its own plateau for ``PATIENCE`` measurements, to one side.

    The plateau is the first third of the time from memorisation to onset. The band is three times as wide as the range of its
    values, with that range in the middle.
    """
    end = start + (onset - start) / 3
    plateau = [value for step, value in zip(steps, values, strict=True) if start <= step <= end]
    if len(plateau) < PATIENCE:
        return None
    low, high = min(plateau), max(plateau)
    band = (low - (high - low), high + (high - low))
    later = [(step, value) for step, value in zip(steps, values, strict=True) if step > end]
    for index in range(len(later) - PATIENCE + 1):
        window = [value for _, value in later[index : index + PATIENCE]]
        if all(value > band[1] for value in window) or all(value < band[0] for value in window):
            return later[index][0]
    return None


def add_hard_accuracy(run: Run) -> None:
    """Add the curve of the accuracy on validation pairs of which neither order was trained on, of a commutative task.

    Where the training pairs are known, their agreement with unseen mirror images is the accuracy on these; the rest follows.
    """
    curves = run["curves"]
    if SETTINGS[run["setting"]].task != "add" or "grok/commutativity/unseen" not in curves:
        return
    data = prepare(Cell(run["setting"], "baseline", run["seed"])).data
    seen = {tuple(pair) for pair in data.train_set.inputs.tolist()}
    share = sum((b, a) in seen for a, b in data.val_set.inputs.tolist()) / len(data.val_set)
    points = zip(
        curves["val_acc"][0], curves["val_acc"][1], curves["grok/commutativity/unseen"][1], curves["train_acc"][1], strict=True
    )
    known = [
        (step, (accuracy - share * mirrored) / (1 - share)) for step, accuracy, mirrored, trained in points if trained >= 0.99
    ]
    curves["hard_acc"] = [[step for step, _ in known], [value for _, value in known]]


def steps_on_hard_pairs(run: Run) -> int:
    """Steps to 90% on pairs of which neither order was trained on."""
    step = first_at_least(run, "hard_acc", 0.9)
    return run["last_step"] if step is None else step


def first_at_least(run: Run, key: str, level: float) -> int | None:
    """The first of two consecutive measurements at or above a level."""
    steps, values = run["curves"].get(key, ([], []))
    pairs = zip(steps, values, values[1:], strict=False)
    return next((step for step, value, after in pairs if min(value, after) >= level), None)


# --- tables ---------------------------------------------------------------------------------------------------------


def interval(value: float, low: float, high: float, digits: int = 0) -> str:
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def methods_table(runs: Runs) -> list[str]:
    lines = [
        "| task and network | method | runs | memorised | onset | generalised: runs | steps [95%] | times fewer steps | "
        "times less CPU | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting, method in ((s, m) for s in SETTINGS for m in METHODS):
        group, baseline = runs.get((setting, method)), runs.get((setting, "baseline"))
        if not group or not baseline or setting == "mlp random":
            continue
        solved = sum(run["grokked_step"] is not None for run in group)
        bound = "" if solved == len(group) else "at least "
        row = [SETTINGS[setting].title, method, str(len(group)), median_event(group, "memorized_step")]
        row += [median_event(group, "onset_step"), str(solved)]
        row += [bound + interval(*bootstrap([steps_to_generalise(run) for run in group]))]
        if method == "baseline":
            row += ["1", "1", ""]
        else:
            row += [interval(*speedup(baseline, group, cost), 2) for cost in (steps_to_generalise, seconds_to_generalise)]
            row += [verdict(baseline, group)]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def median_event(group: list[Run], event: str) -> str:
    happened = [run[event] for run in group if run[event] is not None]
    text = f"{np.median(happened):.0f}" if happened else "never"
    return text if len(happened) in (0, len(group)) else f"{text} ({len(happened)} of {len(group)})"


def hard_table(runs: Runs) -> list[str]:
    lines = ["| method | runs | steps to 90% on all validation pairs [95%] | on pairs of which neither order was trained on |"]
    lines += ["|---|---|---|---|"]
    for method in METHODS:
        group = [run for run in runs.get(("mlp add", method), []) if first_at_least(run, "hard_acc", 0.9) is not None]
        if group:
            columns = [
                interval(*bootstrap([cost(run) for run in group])) for cost in (steps_to_generalise, steps_on_hard_pairs)
            ]
            lines.append(f"| {method} | {len(group)} | {' | '.join(columns)} |")
    return lines


def signals_table(runs: Runs) -> list[str]:
    grokking = [run for run in runs.get(("mlp add", "baseline"), []) if run["onset_step"] is not None]
    control = [run for run in runs.get(("mlp random", "baseline"), []) if run["memorized_step"] is not None]
    gap = int(np.median([run["onset_step"] - run["memorized_step"] for run in grokking]))
    lines = [
        "| signal | moves before the onset in | steps before the onset, median [95%] | direction | "
        f"in the control, {len(control)} runs |",
        "|---|---|---|---|---|",
    ]
    for name, key in SIGNALS.items():
        moved = [(run, move(*run["curves"][key], run["memorized_step"], run["onset_step"])) for run in grokking]
        leads = [run["onset_step"] - step for run, step in moved if step is not None]
        signs = {"up" if at(run, key, step) > at(run, key, run["memorized_step"]) else "down" for run, step in moved if step}
        # Random labels have no onset: as much time after memorisation as the grokking runs have.
        false = [
            move(*run["curves"][key], run["memorized_step"], run["memorized_step"] + gap)
            for run in control
            if key in run["curves"]
        ]
        early = [
            step for step, run in zip(false, control, strict=False) if step is not None and step < run["memorized_step"] + gap
        ]
        cells = [name, f"{sum(lead > 0 for lead in leads)} of {len(grokking)}"]
        cells += [interval(*bootstrap(leads, np.median)) if leads else "never moves", ", ".join(sorted(signs))]
        cells += [f"moves in {len(early)}" if false else "not measured"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def laws_table(runs: Runs) -> list[str]:
    group = [run for run in runs.get(("mlp add", "baseline"), []) if run["onset_step"] is not None]
    keys = {"validation accuracy": "val_acc", "commutativity, mirror unseen": "grok/commutativity/unseen"}
    keys["commutativity, both orders unseen"] = "grok/commutativity/both_unseen"
    keys |= {f"{law}, unseen": f"grok/group_law/{law}/unseen" for law in LAWS}
    lines = [
        "| law | value at the onset, median | steps from the onset to 50%, median [95%] | at the end |",
        "|---|---|---|---|",
    ]
    for name, key in keys.items():
        values, delays, last = [], [], []
        for run in group:
            steps, curve = run["curves"].get(key, ([], []))
            before = [value for step, value in zip(steps, curve, strict=True) if step <= run["onset_step"]]
            half = first_at_least(run, key, 0.5)
            values += before[-1:]
            delays += [half - run["onset_step"]] if half is not None else []
            last += curve[-1:]
        reached = interval(*bootstrap(delays, np.median)) if delays else "never"
        lines.append(f"| {name} | {np.median(values):.2f} | {reached} | {np.median(last):.2f} |")
    return lines


# --- figures --------------------------------------------------------------------------------------------------------


def mean_curve(group: list[Run], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over runs, each going on at its last value."""
    curves = [dict(zip(*run["curves"][key], strict=True)) for run in group if key in run["curves"]]
    steps = sorted(set().union(*curves))
    filled = []
    for curve in curves:
        value, values = math.nan, []
        for step in steps:
            value = curve.get(step, value)
            values.append(value)
        filled.append(values)
    return np.array(steps), np.nanmean(np.array(filled), 0)


def accuracy_figure(runs: Runs) -> Figure:
    settings = [setting for setting in SETTINGS if setting != "mlp random" and (setting, "baseline") in runs]
    figure = Figure(figsize=(4.2 * len(settings), 3.4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), sharey=True, squeeze=False)[0], settings, strict=True):
        for method, color in COLORS.items():
            group = runs.get((setting, method), [])
            for index, run in enumerate(group):
                axes.plot(*run["curves"]["val_acc"], color=color, alpha=0.7, lw=1, label=method if index == 0 else None)
        axes.set_xscale("symlog", linthresh=10)
        axes.set(title=SETTINGS[setting].title, xlabel="steps", xlim=(0, None))
        axes.title.set_fontsize(9)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("validation accuracy")
    return figure


def commutativity_figure(runs: Runs) -> Figure:
    curves = {
        "validation accuracy": ("val_acc", "-"),
        "agreement, training pairs": ("grok/commutativity", ":"),
        "agreement, mirror unseen": ("grok/commutativity/unseen", "--"),
        "agreement, both orders unseen": ("grok/commutativity/both_unseen", "-"),
    }
    shown = [
        (s, m) for s in ("mlp add", "mlp sub") for m in ("baseline", "noise", "penalty", "small penalty") if (s, m) in runs
    ]
    rows = math.ceil(len(shown) / 4)
    figure = Figure(figsize=(15, 3.3 * rows), layout="constrained")
    grid = figure.subplots(rows, 4, sharey=True, squeeze=False).flat
    for axes, (setting, method) in zip(grid, shown, strict=False):
        for (name, (key, style)), color in zip(curves.items(), ("black", "#9e9e9e", "#d95f02", "#1b6ca8"), strict=True):
            axes.plot(*mean_curve(runs[setting, method], key), style, color=color, label=name, lw=1.6)
        axes.set(title=f"{SETTINGS[setting].task}, {method}", xlabel="steps", ylim=(-0.02, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(figure.axes)[len(shown) :]:
        axes.remove()
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def signals_figure(runs: Runs) -> Figure:
    grokking = [run for run in runs[("mlp add", "baseline")] if run["onset_step"] is not None]
    control = runs.get(("mlp random", "baseline"), [])
    names = [name for name in SIGNALS if name != "validation accuracy itself"] + ["validation accuracy itself"]
    figure = Figure(figsize=(14, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 4).flat, names, strict=True):
        for index, run in enumerate(control):
            if SIGNALS[name] in run["curves"]:
                axes.plot(*run["curves"][SIGNALS[name]], color="#bdbdbd", lw=0.8, label="random labels" if index == 0 else None)
        for index, run in enumerate(grokking):
            steps, values = run["curves"][SIGNALS[name]]
            axes.plot(steps, values, color="#1b6ca8", lw=0.9, label="x + y" if index == 0 else None)
            axes.axvline(run["onset_step"], color="#d95f02", lw=0.6, alpha=0.6, label="onset" if index == 0 else None)
            step = move(steps, values, run["memorized_step"], run["onset_step"])
            if step is not None:
                axes.plot(step, at(run, SIGNALS[name], step), "o", ms=4, color="black")
        if name == "input gradient":
            axes.set_yscale("log")
        axes.plot([], [], "o", ms=4, color="black", label="moves")
        axes.set(title=name, xlabel="steps")
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def write(folder: Path, report: Path) -> None:
    """Print the tables, put them between the markers of ``robustness.md``, and draw the figures."""
    runs = read(folder)
    tables = {
        "methods": methods_table(runs),
        "hard": hard_table(runs),
        "signals": signals_table(runs),
        "laws": laws_table(runs),
    }
    put_between_markers(report / "robustness.md", tables)
    figures = {"accuracy": accuracy_figure, "commutativity": commutativity_figure, "signals": signals_figure}
    for name, draw in figures.items():
        draw(runs).savefig(report / f"robustness_{name}.png", dpi=90)
    seconds = sum(run["cpu_seconds"] for group in runs.values() for run in group)
    print(f"{sum(map(len, runs.values()))} runs, {seconds / 60:.0f} CPU-minutes, measured every {EVERY} steps")
