"""One figure that shows a run: accuracies on a logarithmic step axis, every measure under it, the events marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from grok_callbacks.history import History, Series
from grok_callbacks.report.summary import RunSummary, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["run_figure"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_EVENT_STYLES = {
    "memorized": ("#D55E00", "memorised"),
    "onset": ("#999999", "onset"),
    "generalized": ("#009E73", "generalised"),
}
_TITLES = {
    "norm": "Weight norm", "weight_entropy": "Weight entropy (nats)", "spectral_entropy": "Spectral entropy (nats)",
    "effective_rank": "Effective rank", "lmn": "Linear mapping number", "sparsity": "Activation sparsity",
    "circuit_complexity": "Circuit complexity (nats)", "robustness": "Matrix information (nats)",
    "commutativity": "Commutativity", "complexity": "Rate-distortion complexity", "li2": "Li2", "loss": "Loss",
    "representation": "Representation", "forecast": "Forecast", "group_law": "Group laws",
}  # fmt: skip
_MOST_CURVES = len(_COLORS)
# Families with one quantity of many layers, which belong on one axis whatever their sizes.
_LAYERWISE = frozenset({"norm", "weight_entropy", "spectral_entropy", "effective_rank", "sparsity", "lmn"})
# Sizes that can share a linear axis.
_SCALE_RATIO = 20.0


def run_figure(history: History, title: str = "", *, summary: RunSummary | None = None, prefix: str = "grok") -> Figure:
    """Draw a run.

    Args:
        history: The run's series, from a monitor, a Recorder or :func:`~grok_callbacks.report.read_run`.
        title: Stands above the figure, before the verdict.
        summary: The run's events if they are known already.
        prefix: The prefix of the monitors' keys.

    Returns:
        A matplotlib figure with one panel for the accuracies and one for each family of measures.

    Raises:
        ValueError: If the history holds no measure of this prefix.

    Example:
        >>> history = History()
        >>> for step in (0, 1, 10, 100):
        ...     history.add(step, {"grok/norm": 5.0, "grok/accuracy/train": 1.0, "grok/accuracy/validation": 0.1})
        >>> len(run_figure(history).axes)
        2
    """
    from matplotlib.figure import Figure

    summary = summary or summarize(history, prefix=prefix)
    families = _families(history, prefix)
    if not families and not summary.accuracies:
        raise ValueError(f"`history` holds no key that begins with {prefix!r}; was the run monitored?")
    heights = [1.5] * bool(summary.accuracies) + [1.0] * len(families)
    # The object-oriented interface: pyplot would keep the figure alive and could open a window.
    figure = Figure(figsize=(9, 0.9 + 1.45 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    panels = list(axes)
    if summary.accuracies:
        _draw_accuracies(panels.pop(0), summary)
    for panel, (family, curves) in zip(panels, families.items(), strict=True):
        _draw_family(panel, family, curves)
    for panel in axes:
        _mark_events(panel, summary)
    _label_events(axes[0], summary)
    _set_step_axis(axes[-1], history)
    figure.suptitle(f"{title}\n{summary.verdict}" if title else summary.verdict, fontsize=11)
    return figure


def _families(history: History, prefix: str) -> dict[str, dict[str, Series]]:
    """Curves by family of measures, in the order in which they came; accuracies and events have places of their own."""
    families: dict[str, dict[str, Series]] = {}
    for key, series in history.items():
        parts = key.split("/")
        is_error = parts[-1].endswith("_se") or (len(parts) > 1 and parts[1].endswith(("_std", "_standard_error")))
        if parts[0] != prefix or len(parts) < 2 or parts[1] in ("accuracy", "onset") or is_error:
            continue
        if any(math.isfinite(value) for value in series.values):
            families.setdefault(parts[1], {})["/".join(parts[2:]) or "all"] = series
    return {title: curves for family, members in families.items() for title, curves in _split_by_scale(family, members).items()}


def _split_by_scale(family: str, curves: dict[str, Series]) -> dict[str, dict[str, Series]]:
    """A panel for each order of magnitude, since one curve at 400 makes a flat line of another at 2."""
    sizes = {name: max(abs(value) for value in series.values if math.isfinite(value)) for name, series in curves.items()}
    if family in _LAYERWISE or all(value > 0 for series in curves.values() for value in series.values if math.isfinite(value)):
        return {family: curves}
    groups: list[list[str]] = []
    for name in sorted(curves, key=lambda name: sizes[name]):
        if groups and sizes[name] <= _SCALE_RATIO * max(sizes[groups[-1][0]], 1e-12):
            groups[-1].append(name)
        else:
            groups.append([name])
    panels: dict[str, dict[str, Series]] = {}
    for number, names in enumerate(groups):
        title = family if number == 0 else f"{family}/{names[0]}" if len(names) == 1 else f"{family}/larger {number}"
        panels[title] = {name: curves[name] for name in curves if name in names}
    return panels


def _draw_accuracies(axes: Axes, summary: RunSummary) -> None:
    for (name, series), color in zip(summary.accuracies.items(), _COLORS[1::-1], strict=False):
        axes.plot(_positions(series), series.values, color=color, label=name, linewidth=1.8)
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("Accuracy")
    axes.legend(loc="center left", fontsize=8, frameon=False)
    axes.grid(alpha=0.25)


def _draw_family(axes: Axes, family: str, curves: Mapping[str, Series]) -> None:
    # With many layers, show those that change most: the others say little, and no one can read twenty lines.
    shown = sorted(curves, key=lambda name: -_relative_change(curves[name]))[:_MOST_CURVES]
    for color, name in zip(_COLORS, [name for name in curves if name in shown], strict=False):
        axes.plot(_positions(curves[name]), curves[name].values, color=color, label=name, linewidth=1.4)
    family, _, rest = family.partition("/")
    title = _TITLES.get(family, family.replace("_", " ").capitalize()) if not rest else rest.replace("_", " ").capitalize()
    axes.set_ylabel(title.replace(" (", "\n("), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    more = f"{len(curves) - len(shown)} more not shown" if len(curves) > len(shown) else None
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False, title=more, title_fontsize=7)
    values = [value for series in curves.values() for value in series.values if math.isfinite(value)]
    if min(values) > 0 and max(values) / min(values) > 300:
        axes.set_yscale("log")


def _relative_change(series: Series) -> float:
    values = [value for value in series.values if math.isfinite(value)]
    if not values:
        return -1.0
    return (max(values) - min(values)) / (max(map(abs, values)) or 1.0)


def _positions(series: Series) -> list[float]:
    """Steps on the logarithmic axis, with room for step 0."""
    return [max(float(step), 0.5) for step in series.steps]


def _mark_events(axes: Axes, summary: RunSummary) -> None:
    for event, step in summary.steps.items():
        if step is not None:
            color, _ = _EVENT_STYLES[event]
            axes.axvline(max(step, 0.5), color=color, linestyle="--", linewidth=1.2)


def _label_events(axes: Axes, summary: RunSummary) -> None:
    onset = summary.steps.get("onset")
    if onset is not None:
        # Within the panel, since it often lies close to the other two.
        color, word = _EVENT_STYLES["onset"]
        axes.annotate(
            f"{word} ", (max(onset, 0.5), 0.5), xycoords=("data", "axes fraction"), ha="right", fontsize=8, color=color
        )
    labelled = [(event, step) for event, step in summary.steps.items() if step is not None and event != "onset"]
    for event, step in labelled:
        color, word = _EVENT_STYLES[event]
        axes.annotate(
            f"{word} at {step:,}",
            (max(step, 0.5), 1.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            fontsize=8,
            color=color,
        )


def _set_step_axis(axes: Axes, history: History) -> None:
    last = max((series.steps[-1] for series in history.values() if series.steps), default=1)
    axes.set_xscale("log")
    axes.set_xlim(0.45, max(last, 1) * 1.05)
    decades: Sequence[int] = [10**exponent for exponent in range(math.floor(math.log10(max(last, 1))) + 1)]
    axes.set_xticks([0.5, *decades], ["0", *[f"{decade:,}" for decade in decades]])
    axes.set_xlabel("Optimiser steps (logarithmic; the first point is the network before training)", fontsize=9)
