"""Tables and figures of ``reproduce_li2.py``'s cells."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from grok_callbacks.functional import Li2Stage

Result = dict[str, Any]
DECAYED, PLAIN = "#2166ac", "#b2182b"


def report(output: Path, folder: Path) -> None:
    """Write ``li2_tables.md`` and ``li2_*.png`` of the cells there are."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [stages, data, energy, muon, settings, wide, three_layers, scaling, patience]
    texts = [section(load(output), folder) for section in sections]
    (folder / "li2_tables.md").write_text("\n\n".join(text for text in texts if text) + "\n")


def add_stages(result: Result) -> Result:
    """Label each measurement with its stage, and with what the label would be if it didn't ask for fitted targets."""
    labels = {"stage": Li2Stage(), "loose_stage": Li2Stage(fit_threshold=math.inf)}
    for row in result.get("history", []):
        for key in labels if "cos_lazy" in row else ():
            labels[key] = labels[key].update(row["cos_lazy"], row["cos_residual"], row["residual_ratio"])
            row[key] = labels[key].stage
    return result


def load(output: Path) -> dict[str, list[Result]]:
    cells: dict[str, list[Result]] = defaultdict(list)
    for path in sorted(output.glob("*/*.json")):
        cells[path.parent.name].append(add_stages(json.loads(path.read_text())))
    return cells


# --- small helpers -------------------------------------------------------------------------------------------------


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def group_by(results: Iterable[Result], *keys: str) -> dict[tuple[Any, ...], list[Result]]:
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[tuple(result["arguments"].get(key) for key in keys)].append(result)
    return dict(sorted(groups.items(), key=lambda item: [str(part) if isinstance(part, str) else part for part in item[0]]))


def last(result: Result, key: str) -> float:
    return result["history"][-1][key]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and lowest to highest if they differ."""
    values = [value for value in values if value is not None and not math.isnan(value)]
    if not values:
        return "-"
    low, high = min(values), max(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if f"{low:.{digits}f}" == f"{high:.{digits}f}" else f"{mean} ({low:.{digits}f} to {high:.{digits}f})"


def first_step(result: Result, holds: Callable[[Result], bool]) -> float:
    return next((row["step"] for row in result["history"] if holds(row)), math.nan)


def steps(results: Sequence[Result], holds: Callable[[Result], bool]) -> str:
    found = [first_step(result, holds) for result in results]
    reached = [step for step in found if not math.isnan(step)]
    if not reached:
        return "never"
    text = spread(reached, 0)
    return text if len(reached) == len(found) else f"{text}; {len(found) - len(reached)} never"


# --- sections ------------------------------------------------------------------------------------------------------


def stages(cells: dict[str, list[Result]], folder: Path) -> str:
    results = cells["stages"] + cells["paper"]
    if not results:
        return ""
    groups = group_by(results, "modulus", "weight_decay")
    header = ["", *(f"M={m}, K={group[0]['arguments']['units']}, decay {d:g}" for (m, d), group in groups.items())]
    columns = list(groups.values())

    def row(name: str, value: Callable[[Sequence[Result]], str]) -> list[str]:
        return [name, *(value(group) for group in columns)]

    def at(result: Result, step: float, key: str) -> float:
        return next((r[key] for r in result["history"] if r["step"] == step), math.nan)

    def highest_fitted(group: Sequence[Result]) -> str:
        fitted = [[r for r in result["history"] if r["residual_ratio"] <= Li2Stage.fit_threshold] for result in group]
        rows = [max(some, key=lambda r: r["cos_lazy"]) for some in fitted if some]
        cosine, step, test = (spread([r[key] for r in rows], n) for key, n in (("cos_lazy", 2), ("step", 0), ("test", 2)))
        return f"{cosine} at step {step}, test accuracy {test}"

    def memorised(result: Result) -> float:
        return first_step(result, lambda r: r["train"] >= 0.99)

    def extreme(key: str, best: Callable[..., Result]) -> Callable[[Sequence[Result]], str]:
        def text(group: Sequence[Result]) -> str:
            rows = [
                best((r for r in result["history"][1:] if not math.isnan(r[key])), key=lambda r: r[key]) for result in group
            ]
            return f"{spread([r[key] for r in rows])} at step {spread([r['step'] for r in rows], 0)}"

        return text

    rows = [
        row("runs", lambda group: str(len(group))),
        row("train accuracy 99% at step", lambda g: steps(g, lambda r: r["train"] >= 0.99)),
        row("test accuracy 90% at step", lambda g: steps(g, lambda r: r["test"] >= 0.9)),
        row("test accuracy at the end", lambda g: spread([last(r, "test") for r in g])),
        row("V moved by half its norm at step", lambda g: steps(g, lambda r: r["change_V"] >= 0.5)),
        row("W moved by half its norm at step", lambda g: steps(g, lambda r: r["change_W"] >= 0.5)),
        row("norm of G at memorisation", lambda g: spread([at(r, memorised(r), "gradient_norm") for r in g])),
        row("norm of G at the end", lambda g: spread([last(r, "gradient_norm") for r in g], 4)),
        row("norm of G, lowest", lambda g: spread([min(r["gradient_norm"] for r in result["history"]) for result in g], 6)),
        row("cos_lazy at step 0", lambda g: spread([r["history"][0]["cos_lazy"] for r in g])),
        row("cos_lazy, highest", extreme("cos_lazy", max)),
        row("cos_lazy at memorisation", lambda g: spread([at(r, memorised(r), "cos_lazy") for r in g])),
        row("cos_lazy, highest once the targets are fitted", highest_fitted),
        row(
            "cos_lazy, cos_residual at the end",
            lambda g: ", ".join(spread([last(r, k) for r in g]) for k in ("cos_lazy", "cos_residual")),
        ),
        row("distance to ridge, lowest", extreme("ridge_distance", min)),
        row("stage II from step", lambda g: steps(g, lambda r: r["stage"] >= 2)),
        row("stage III from step", lambda g: steps(g, lambda r: r["stage"] >= 3)),
        row(
            "stage II, III if fitted targets aren't asked for",
            lambda g: ", ".join(steps(g, lambda r, s=s: r["loose_stage"] >= s) for s in (2, 3)),
        ),
        row("participation ratio, first", lambda g: spread([r["history"][0]["participation_ratio"] for r in g], 0)),
        row("participation ratio, last", lambda g: spread([last(r, "participation_ratio") for r in g], 0)),
        row("power of each unit at its own frequency", lambda g: spread([last(r, "fourier_share") for r in g])),
        row("frequencies covered", lambda g: spread([last(r, "frequencies") for r in g], 0)),
        row("units alive", lambda g: spread([last(r, "alive_units") for r in g], 0)),
    ]
    for name in ("stages", "paper"):
        if cells[name]:
            _stages_figure(cells[name], folder / f"li2_{name}.png")
    return table("Stages, with and without weight decay", header, rows)


def _stages_figure(results: Sequence[Result], path: Path) -> None:
    panels = [
        ("accuracy: train, test (dashed)", ("train", "test"), False),
        ("alignment of G: cos_lazy, cos_residual (dashed)", ("cos_lazy", "cos_residual"), False),
        ("norm of G", ("gradient_norm",), True),
        ("distance of V to the ridge solution", ("ridge_distance",), True),
        ("relative change: V, W (dashed)", ("change_V", "change_W"), True),
        ("power at own frequency", ("fourier_share",), False),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.8), sharex=True, layout="constrained")
    colors = {
        result["arguments"]["weight_decay"]: DECAYED if result["arguments"]["weight_decay"] else PLAIN for result in results
    }
    for axis, (title, keys, log) in zip(axes.flat, panels, strict=True):
        for result in results:
            for key, style in zip(keys, ("-", "--"), strict=False):
                # Nothing has changed at step 0, which a logarithmic axis cannot show.
                rows = [row for row in result["history"] if row[key] > 0 or not log]
                axis.plot(
                    [max(row["step"], 0.7) for row in rows],
                    [row[key] for row in rows],
                    style,
                    color=colors[result["arguments"]["weight_decay"]],
                    alpha=0.7,
                    linewidth=1.3,
                )
        axis.set_title(title, fontsize=11)
        axis.set(xscale="log", **({"yscale": "log"} if log else {}))
    for axis in axes[1]:
        axis.set_xlabel("step")
    arguments = results[0]["arguments"]
    figure.suptitle(f"Addition mod {arguments['modulus']}, {arguments['units']} units x^2, 40% of the table")
    # Below all panels: inside any of them it would lie on some curve.
    handles = [Line2D([], [], color=color, label=f"weight decay {decay:g}") for decay, color in sorted(colors.items())]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def data(cells: dict[str, list[Result]], folder: Path) -> str:
    del folder
    rows = [
        [
            f"{fraction:.0%}",
            spread([last(r, "train") for r in group]),
            spread([last(r, "test") for r in group]),
            spread([last(r, "fourier_share") for r in group]),
            spread([last(r, "frequencies") for r in group], 0),
            spread([last(r, "participation_ratio") for r in group], 0),
            steps(group, lambda r: r["stage"] >= 2),
            steps(group, lambda r: r["stage"] >= 3),
        ]
        for (fraction,), group in group_by(cells["data"], "fraction").items()
    ]
    header = [
        "train fraction",
        "train",
        "test",
        "power at own frequency",
        "frequencies",
        "participation ratio",
        "stage II",
        "stage III",
    ]
    return table("Too little data: stage and outcome (M = 31)", header, rows) if rows else ""


def energy(cells: dict[str, list[Result]], folder: Path) -> str:
    del folder
    rows = [
        [
            modulus,
            f"{fraction:.0%}",
            begin,
            spread([r["fourier_share"] for r in group]),
            spread([r["fourier_units"] for r in group]),
            spread([r["energy_per_modulus"] for r in group], 3),
            spread([r["largest_entry"] for r in group]),
        ]
        for (modulus, begin, fraction), group in group_by(cells["energy"], "modulus", "begin", "fraction").items()
    ]
    header = ["M", "samples", "ascent from", "power at own frequency", "units of one frequency", "E / M", "largest weight"]
    return table("Maxima of the energy", header, rows) if rows else ""


def muon(cells: dict[str, list[Result]], folder: Path) -> str:
    groups = group_by(cells["muon"], "modulus", "units", "optimizer")
    rows = [
        [
            modulus,
            units,
            optimizer,
            spread([last(r, "train") for r in group]),
            spread([last(r, "test") for r in group]),
            spread([last(r, "frequencies") for r in group], 1),
            spread([last(r, "fourier_share") for r in group]),
            steps(group, lambda r: r["test"] >= 0.9),
        ]
        for (modulus, units, optimizer), group in groups.items()
    ]
    if not rows:
        return ""
    moduli = sorted({key[0] for key in groups})
    units = sorted({key[1] for key in groups})
    figure, axes = plt.subplots(
        len(moduli), len(units), figsize=(3.2 * len(units), 2.6 * len(moduli)), sharex=True, squeeze=False
    )
    for (modulus, width, optimizer), group in groups.items():
        axis = axes[moduli.index(modulus), units.index(width)]
        for index, result in enumerate(group):
            axis.plot(
                [max(r["step"], 0.7) for r in result["history"]],
                [r["frequencies"] for r in result["history"]],
                color=DECAYED if optimizer == "adam" else PLAIN,
                alpha=0.7,
                label=None if index else optimizer,
            )
        axis.set(xscale="log", title=f"M = {modulus}, {width} units", ylim=(0, modulus // 2 + 1))
        axis.axhline(modulus // 2, color="grey", linewidth=0.5)
    axes[0, 0].legend()
    for axis in axes[:, 0]:
        axis.set_ylabel("frequencies covered")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(folder / "li2_muon.png", dpi=90)
    plt.close(figure)
    header = [
        "M",
        "units",
        "optimizer of W",
        "train",
        "test",
        "frequencies covered",
        "power at own frequency",
        "test 90% at step",
    ]
    return table("Few units: Muon against Adam", header, rows)


def settings(cells: dict[str, list[Result]], folder: Path) -> str:
    del folder
    groups = group_by(cells["settings"], "lr", "weight_decay")
    if not groups:
        return ""

    def outcome(result: Result) -> str:
        if last(result, "test") >= 0.9:
            return "generalises"
        return "memorises" if last(result, "train") >= 0.99 else "fits neither"

    def text(group: Sequence[Result]) -> str:
        kinds = [outcome(result) for result in group]
        parts = [
            f"{kind} {kinds.count(kind)}/{len(kinds)}" for kind in ("generalises", "memorises", "fits neither") if kind in kinds
        ]
        return (
            f"{', '.join(parts)} (test {spread([last(r, 'test') for r in group])}, {steps(group, lambda r: r['test'] >= 0.9)})"
        )

    decays = sorted({key[1] for key in groups})
    rows = [
        [f"{lr:g}", *(text(groups[lr, decay]) if (lr, decay) in groups else "-" for decay in decays)]
        for lr in sorted({key[0] for key in groups})
    ]
    return table("Learning rate and weight decay (M = 23, 42%)", ["lr \\ decay", *(f"{d:g}" for d in decays)], rows)


def wide(cells: dict[str, list[Result]], folder: Path) -> str:
    del folder
    rows = [
        [
            f"{lr:g}",
            spread([last(r, "train") for r in group]),
            spread([last(r, "test") for r in group]),
            steps(group, lambda r: r["test"] >= 0.9),
        ]
        for (lr,), group in group_by(cells["wide"], "lr").items()
    ]
    return table("Learning rate at M = 127, 3,225 samples", ["lr", "train", "test", "test 90% at step"], rows) if rows else ""


def three_layers(cells: dict[str, list[Result]], folder: Path) -> str:
    del folder
    rows = [
        [
            f"{fraction:.0%}, {decay:g}",
            steps(group, lambda r: r["train"] >= 0.99),
            steps(group, lambda r: r["test"] >= 0.9),
            spread([last(r, "test") for r in group]),
            spread([max(h["cos_lazy"] for h in r["history"]) for r in group]),
            spread([last(r, "cos_residual") - last(r, "cos_lazy") for r in group]),
            steps(group, lambda r: r["stage"] >= 2),
            steps(group, lambda r: r["stage"] >= 3),
            spread([last(r, "gradient_norm") for r in group], 4),
        ]
        for (fraction, decay), group in group_by(cells["three_layers"], "fraction", "weight_decay").items()
    ]
    header = [
        "data, decay",
        "train 99%",
        "test 90%",
        "test",
        "cos_lazy, highest",
        "gap at the end",
        "stage II",
        "stage III",
        "norm of G at the end",
    ]
    return table("Three layers (M = 23, 128 units)", header, rows) if rows else ""


# --- the scaling law -----------------------------------------------------------------------------------------------

Array = np.ndarray


@dataclass(frozen=True)
class Law:
    """A law with its least-squares fit of relative errors and its prediction."""

    formula: str
    fit: Callable[[Array, Array], Array]  # moduli, fractions -> parameters
    predict: Callable[[Array, Array], Array]  # moduli, parameters -> fractions


def linear(formula: str, *columns: Callable[[Array], Array]) -> Law:
    def design(m: Array) -> Array:
        return np.stack([column(m) for column in columns], 1)

    def fit(m: Array, f: Array) -> Array:
        return np.linalg.lstsq(design(m) / f[:, None], np.ones(len(f)), rcond=None)[0]

    return Law(formula, fit, lambda m, parameters: design(m) @ parameters)


def fit_power(m: Array, f: Array) -> Array:
    slope, intercept = np.polyfit(np.log(m), np.log(f), 1)
    return np.array([np.exp(intercept), slope])


LAWS = {
    "theory": linear("c ln M / M", lambda m: np.log(m) / m),
    "theory with an offset": linear("c ln M / M + d", lambda m: np.log(m) / m, np.ones_like),
    "inverse": linear("c / M", lambda m: 1 / m),
    "inverse with an offset": linear("c / M + d", lambda m: 1 / m, np.ones_like),
    "square root": linear("c / sqrt M", lambda m: m**-0.5),
    "power law": Law("a M^b", fit_power, lambda m, parameters: parameters[0] * m ** parameters[1]),
}


def scaling(cells: dict[str, list[Result]], folder: Path) -> str:
    groups = group_by(cells["scaling"], "modulus")
    if len(groups) < 3:
        return ""
    moduli = np.array([key[0] for key in groups], dtype=float)
    brackets = [np.log([(r["lower"], r["upper"]) for r in group]) for group in groups.values()]
    critical = np.array([np.exp(bracket.mean()) for bracket in brackets])
    generator = np.random.default_rng(0)
    draws = np.array([_draw(brackets, generator) for _ in range(2000)])
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    rows = [
        [
            int(m),
            len(b),
            f"{f:.3f} ({lo:.3f} to {hi:.3f})",
            round(f * m * m),
            f"{f * m / math.log(m):.2f} ({lo * m / math.log(m):.2f} to {hi * m / math.log(m):.2f})",
        ]
        for m, b, f, lo, hi in zip(moduli, brackets, critical, low, high, strict=True)
    ]
    text = table("Critical train fraction", ["M", "seeds", "critical fraction (95%)", "samples", "in units of ln M / M"], rows)
    fits = [_fit_row(name, moduli, critical, draws) for name in LAWS]
    header = [
        "law",
        "formula",
        "parameters (95%)",
        "R^2 of ln f",
        "AICc",
        "error at a modulus left out",
        "error at the largest, fitted on the others",
    ]
    _scaling_figure(moduli, critical, low, high, folder / "li2_scaling.png")
    return text + "\n\n" + table("Laws fitted to it", header, fits)


def patience(cells: dict[str, list[Result]], folder: Path) -> str:
    del folder
    longer = {result["arguments"]["modulus"]: result for result in cells["patience"]}
    usual = {result["arguments"]["modulus"]: result for result in cells["scaling"] if result["arguments"]["seed"] == 0}
    rows = [
        [
            modulus,
            *(f"{r['lower']:.3f} to {r['upper']:.3f}" for r in (usual[modulus], result)),
            *(f"{r['upper'] * modulus / math.log(modulus):.2f}" for r in (usual[modulus], result)),
        ]
        for modulus, result in sorted(longer.items())
        if modulus in usual
    ]
    header = ["M", "3,000 steps", "9,000 steps", "in units of ln M / M, 3,000 steps", "9,000 steps"]
    return table("Critical train fraction and patience (one seed)", header, rows) if rows else ""


def _draw(brackets: Sequence[Array], generator: np.random.Generator) -> Array:
    """One bootstrap draw: seeds with replacement, and each critical fraction anywhere in its bracket."""
    values = []
    for bracket in brackets:
        chosen = bracket[generator.integers(len(bracket), size=len(bracket))]
        values.append(np.exp(generator.uniform(chosen[:, 0], chosen[:, 1]).mean()))
    return np.array(values)


def _fit_row(name: str, moduli: Array, critical: Array, draws: Array) -> list[str]:
    law = LAWS[name]
    fit, predict = law.fit, law.predict
    parameters = fit(moduli, critical)
    spreads = np.quantile([fit(moduli, draw) for draw in draws], [0.025, 0.975], axis=0).T
    errors = np.log(np.abs(predict(moduli, parameters))) - np.log(critical)
    n, k = len(moduli), len(parameters) + 1
    aicc = n * math.log((errors**2).mean()) + 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1)
    r2 = 1 - (errors**2).sum() / ((np.log(critical) - np.log(critical).mean()) ** 2).sum()
    left_out = [
        predict(moduli[i : i + 1], fit(np.delete(moduli, i), np.delete(critical, i)))[0] / critical[i] - 1 for i in range(n)
    ]
    return [
        name,
        law.formula,
        ", ".join(f"{p:.3g} ({lo:.3g} to {hi:.3g})" for p, (lo, hi) in zip(parameters, spreads, strict=True)),
        f"{r2:.3f}",
        f"{aicc:.1f}",
        f"{math.sqrt(np.mean(np.square(left_out))):.1%}",
        f"{left_out[-1]:+.1%}",
    ]


def _scaling_figure(moduli: Array, critical: Array, low: Array, high: Array, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.5, 4.5))
    axis.errorbar(moduli, critical, yerr=[critical - low, high - critical], fmt="ko", capsize=3, label="measured")
    m = np.geomspace(moduli.min() * 0.9, moduli.max() * 1.1, 100)
    for law in LAWS.values():
        axis.plot(m, law.predict(m, law.fit(moduli, critical)), label=law.formula)
    axis.plot(m, 2.75 * np.log(m) / m, "k:", label="2.75 ln M / M (the paper's code)")
    axis.set(xscale="log", yscale="log", xlabel="modulus M", ylabel="critical train fraction")
    axis.set_xticks(moduli, [f"{int(value)}" for value in moduli])
    axis.set_yticks([0.1, 0.15, 0.2, 0.3, 0.4], ["10%", "15%", "20%", "30%", "40%"])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
