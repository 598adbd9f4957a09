"""Tables and figure of the runs that ``reproduce_lmn.py`` has made, beside what the paper reports."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

TITLES = {"mod31": "addition mod 31", "s4": "permutations S4", "xor5": "5-digit XOR"}
# Read off the paper's figures: LMN of all training inputs at initialisation, at its peak or turning points, and late.
PAPER = {"mod31": "32 / ~54 peak at memorisation / ~12", "s4": "22 / ~29 peak / ~10", "xor5": "34 / ~15, rising to ~20 / ~7.5"}
LMN, L2 = "lmn/hidden1", "l2"


def load(folder: Path) -> dict[str, dict[int, list[dict]]]:
    """Complete runs by task and seed."""
    runs: dict[str, dict[int, list[dict]]] = defaultdict(dict)
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if rows and rows[-1].get("done"):
            task, seed = path.stem.rsplit("-", 1)
            runs[task][int(seed)] = rows[:-1]
    return {task: runs[task] for task in TITLES if task in runs}


def first_of_two(rows: list[dict], key: str, level: float) -> int | None:
    """Index of the first of two consecutive measurements at or above a level."""
    above = [row[key] >= level for row in rows]
    return next((i for i in range(len(rows) - 1) if above[i] and above[i + 1]), None)


def compression_phase(rows: list[dict]) -> list[dict]:
    """From the test loss's peak to the first measurement with 99% test accuracy, or until the run becomes unstable."""
    start = max(range(len(rows)), key=lambda i: rows[i]["test_loss"])
    end = first_of_two(rows, "test_accuracy", 0.99)
    stop = min(before_instability(rows), math.inf if end is None or end <= start else end) + 1
    return [row for row in rows[start : int(stop)] if LMN in row]


def squared_correlation(rows: list[dict], key: str) -> float:
    """R^2 of the straight line through the test loss against a measure."""
    if len(rows) < 4:
        return math.nan
    return float(np.corrcoef([row[key] for row in rows], [row["test_loss"] for row in rows])[0, 1] ** 2)


def at(rows: list[dict], key: str, index: int | None) -> float:
    """A measure at an index, or at the nearest measurement that has it."""
    if index is None:
        return math.nan
    have = [i for i, row in enumerate(rows) if key in row]
    return float(rows[min(have, key=lambda i: abs(i - index))][key])


def before_instability(rows: list[dict]) -> int:
    """Index of the last measurement before the norm jumps late in a run, or of the last."""
    fitted = first_of_two(rows, "test_accuracy", 0.9) or len(rows) - 1
    jumps = (i for i in range(fitted, len(rows) - 1) if abs(rows[i + 1][L2] / rows[i][L2] - 1) > 0.03)
    return next(jumps, len(rows) - 1)


def second_rise(rows: list[dict]) -> tuple[float, float, float, float]:
    """LMN at its lowest after the model has generalised, that step, and the same at the top of the rise that follows.

    NaN where LMN rises by less than a tenth after that, or the instability comes first.
    """
    fitted = first_of_two(rows, "test_accuracy", 0.9) or 0
    measured = [row for row in rows[fitted : before_instability(rows) + 1] if LMN in row]
    pairs = [(low, high) for low in range(len(measured)) for high in range(low, len(measured))]
    low, high = max(pairs, key=lambda pair: measured[pair[1]][LMN] - measured[pair[0]][LMN], default=(0, 0))
    if not measured or measured[high][LMN] < 1.1 * measured[low][LMN]:
        return math.nan, math.nan, math.nan, math.nan
    return measured[low][LMN], measured[low]["step"], measured[high][LMN], measured[high]["step"]


def first_fall(rows: list[dict]) -> float:
    """Step of the first measurement after LMN's peak at which it is 5% below it."""
    measured = [row for row in rows if LMN in row]
    peak = max(range(len(measured)), key=lambda i: measured[i][LMN])
    fallen = (row["step"] for row in measured[peak:] if row[LMN] < 0.95 * measured[peak][LMN])
    return next(fallen, math.nan)


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and range over seeds."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "never"
    text = f"{statistics.fmean(finite):,.{digits}f}"
    if len(finite) > 1:
        text += f" ({min(finite):,.{digits}f} to {max(finite):,.{digits}f})"
    return text + (f", {len(values) - len(finite)} never" if len(finite) < len(values) else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(
        ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(row) + " |" for row in rows)]
    )


def tables(runs: dict[str, dict[int, list[dict]]]) -> str:
    """Values at the marks, linearity against the test loss, turning points, and layers."""
    marks, linearity, layers, turns, leads = [], [], [], [], []
    for task, seeds in runs.items():
        memorized = {seed: first_of_two(rows, "train_accuracy", 0.99) for seed, rows in seeds.items()}
        generalized = {seed: first_of_two(rows, "test_accuracy", 0.9) for seed, rows in seeds.items()}

        def over(key: str, indices: dict[int, int | None], digits: int = 1, seeds: dict = seeds) -> str:
            return spread([at(rows, key, indices[seed]) for seed, rows in seeds.items()], digits)

        start, end = dict.fromkeys(seeds, 0), {seed: len(rows) - 1 for seed, rows in seeds.items()}
        peak = [max(row[LMN] for row in rows if LMN in row) for rows in seeds.values()]
        calm = {seed: before_instability(rows) for seed, rows in seeds.items()}
        sizes = [over(LMN, start), spread(peak), *(over(LMN, mark) for mark in (memorized, generalized, calm, end))]
        when = [over("step", memorized, 0), over("step", generalized, 0)]
        marks.append([TITLES[task], str(len(seeds)), *when, *sizes, over(L2, memorized), over(L2, generalized), PAPER[task]])
        phases = [compression_phase(rows) for rows in seeds.values()]
        r2 = {key: [squared_correlation(phase, key) for phase in phases] for key in (LMN, L2)}
        better = sum(a > b for a, b in zip(r2[LMN], r2[L2], strict=True))
        linearity.append(
            [
                TITLES[task],
                spread([len(phase) for phase in phases], 0),
                spread(r2[LMN], 3),
                spread(r2[L2], 3),
                f"{better} of {len(seeds)}",
            ]
        )
        points = [
            spread(list(values), 1 - k % 2) for k, values in enumerate(zip(*map(second_rise, seeds.values()), strict=True))
        ]
        turns.append([TITLES[task], *points, "~15, rising to ~20" if task == "xor5" else "none"])
        onset = {seed: first_of_two(rows, "test_accuracy", 0.2) for seed, rows in seeds.items()}
        leads.append([TITLES[task], spread([first_fall(rows) for rows in seeds.values()], 0), over("step", onset, 0)])
        for layer in ("embedding", "hidden1", "hidden2"):
            key = f"lmn_200/{layer}"
            layers.append([TITLES[task], layer, over(key, start), over(key, memorized), over(key, generalized), over(key, end)])
    sections = [(MARKS, MARKS_HEADER, marks), (LINEARITY, LINEARITY_HEADER, linearity), (TURNS, TURNS_HEADER, turns)]
    sections.append((LEADS, ["task", "LMN 5% below its peak at step", "test accuracy 20% at step"], leads))
    sections.append((LAYERS, ["task", "from", "step 0", "memorised", "generalised", "end"], layers))
    return "\n\n".join(f"{text}\n\n{table(header, rows)}" for text, header, rows in sections)


MARKS = """## LMN and L2 at the marks

Mean over seeds (range). LMN from the first hidden layer, over all training inputs. Memorised: the first of two consecutive
measurements with 99% training accuracy; generalised: with 90% test accuracy. Late: the last measurement before the L2 norm
jumps by more than 3% between two measurements, as it does when the training loss has reached float noise; then LMN
collapses."""
MARKS_HEADER = [
    "task", "seeds", "memorised at", "generalised at", "LMN at step 0", "LMN peak", "LMN memorised", "LMN generalised",
    "LMN late", "LMN at step 20,000", "L2 memorised", "L2 generalised", "paper: LMN start / turning points / late",
]  # fmt: skip
LINEARITY = """## Is it linear in the test loss?

R² of a straight line through the test loss in the compression phase: from the test loss's peak to 99% test accuracy, or to the
instability where that comes first."""
LINEARITY_HEADER = ["task", "measurements", "R² of LMN", "R² of L2", "LMN is the more linear in"]
TURNS = """## The second rise

The lowest value after generalising, and the top of the rise that follows it, where LMN rises by a tenth or more."""
TURNS_HEADER = ["task", "low", "at step", "high", "at step", "paper"]
LEADS = """## What moves first"""
LAYERS = """## Layer by layer

LMN from each layer on, over 200 training inputs. The second hidden layer is the last: a linear map follows it."""


def figure(runs: dict[str, dict[int, list[dict]]]) -> Figure:
    """Like the paper's Figure 2: losses, LMN and L2 over steps, and the test loss against both."""
    result = Figure(figsize=(4 * len(runs), 9.5), layout="constrained")
    axes = result.subplots(4, len(runs), squeeze=False)
    for column, (task, seeds) in enumerate(runs.items()):
        accuracy, number, norm, scatter = axes[:, column]
        for k, rows in enumerate(seeds.values()):
            steps = [max(row["step"], 0.5) for row in rows]
            label = k == 0
            accuracy.plot(
                steps, [row["train_accuracy"] for row in rows], color="#D55E00", lw=1, label="training" if label else None
            )
            accuracy.plot(steps, [row["test_accuracy"] for row in rows], color="#0072B2", lw=1, label="test" if label else None)
            measured = [row for row in rows if LMN in row]
            number.plot([max(row["step"], 0.5) for row in measured], [row[LMN] for row in measured], color="#009E73", lw=1)
            norm.plot(steps, [row[L2] for row in rows], color="#CC79A7", lw=1)
            phase = compression_phase(rows)
            losses = [row["test_loss"] for row in phase]
            for key, color, name in ((LMN, "#009E73", "LMN"), (L2, "#CC79A7", "L2")):
                top = max(row[key] for row in phase)
                scatter.plot(
                    [row[key] / top for row in phase], losses, "o", ms=3, color=color, label=name if label else None, alpha=0.7
                )
        for axis in (accuracy, number, norm):
            axis.set(xscale="log", xlabel="step")
            axis.grid(alpha=0.25)
        accuracy.set(title=f"{TITLES[task]}, {len(seeds)} seeds", ylabel="accuracy")
        number.set(ylabel="LMN from the first hidden layer", ylim=(0, None))
        norm.set(ylabel="L2 norm", ylim=(0, None))
        scatter.set(xlabel="measure, over its largest value in the phase", ylabel="test loss")
        scatter.grid(alpha=0.25)
        accuracy.legend(frameon=False, fontsize=8)
        scatter.legend(frameon=False, fontsize=8)
    return result


def report(folder: Path, output: Path, machine: str) -> None:
    """Write ``lmn_tables.md`` and ``lmn.png`` into ``output``."""
    runs = load(folder)
    if not runs:
        raise SystemExit(f"No complete run in {folder}.")
    output.mkdir(parents=True, exist_ok=True)
    text = f"Made by `python examples/reproduce_lmn.py --output RUNS --report {output}` on {machine}.\n\n{tables(runs)}\n"
    (output / "lmn_tables.md").write_text(text)
    figure(runs).savefig(output / "lmn.png", dpi=110)
    print(text)
