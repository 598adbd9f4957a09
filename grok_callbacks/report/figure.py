"""One figure that shows a run: accuracies on a logarithmic step axis, every measure under it, the events marked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from grok_callbacks.history import History, Series
from grok_callbacks.measures import Chart, group_by_chart
from grok_callbacks.report.summary import RunSummary, is_drawable, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["charts_of", "draw_accuracies", "draw_chart", "literal", "mark_events", "run_figure", "set_step_axis"]

# Characters that are seen only by what they do, such as to turn the order of the letters round.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

# Okabe and Ito's palette, which colour-blind readers can tell apart: two for the two splits wherever they stand, the others for
# layers and the like, with two of Tol's. Grey is for the run as a whole, its events and phases: no colour means two things.
_SPLIT_COLORS = {"train": "#CC79A7", "training": "#CC79A7", "validation": "#0072B2"}
_COLORS = ("#D55E00", "#009E73", "#56B4E9", "#E69F00", "#882255", "#999933")
_MOST_CURVES = len(_COLORS)
_EVENT_COLOR = "#777777"
_EVENT_STYLES = {"memorized": (":", "memorised"), "onset": ("-.", "onset"), "generalized": ("--", "generalised")}
# Letters of a heading that a figure has room for.
_LETTERS = 95
# Two labels above a panel whose steps are less than this many times apart would overlap.
_CLOSE = 4.0


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
    charts = charts_of(history, prefix)
    if not charts and not summary.accuracies:
        raise ValueError(f"`history` holds no key that begins with {prefix!r}; was the run monitored?")
    heights = [1.5] * bool(summary.accuracies) + [1.0] * len(charts)
    # The object-oriented interface: pyplot would keep the figure alive and could open a window.
    figure = Figure(figsize=(9, 0.9 + 1.45 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    panels = list(axes)
    if summary.accuracies:
        accuracies = panels.pop(0)
        draw_accuracies(accuracies, summary)
        accuracies.set_ylabel("Accuracy")
        accuracies.legend(loc="center left", fontsize=8, frameon=False)
    for panel, (chart, curves) in zip(panels, charts.items(), strict=True):
        shown = draw_chart(panel, chart, curves)
        panel.set_ylabel(_in_lines(literal(chart.title)), fontsize=8, parse_math=False)
        _add_legend(panel, shown, len(curves))
    for panel in axes:
        mark_events(panel, summary)
    _label_events(axes[0], summary)
    set_step_axis(axes[-1], history)
    axes[-1].set_xlabel("Optimiser steps (logarithmic; the first point is the network before training)", fontsize=9)
    heading = filter(None, [literal(title), fill(summary.verdict, _LETTERS)])
    figure.suptitle("\n".join(heading), fontsize=11, parse_math=False)
    if summary.remarks:
        remarks = "\n".join(fill(literal(remark), round(1.3 * _LETTERS)) for remark in summary.remarks)
        figure.supxlabel(remarks, fontsize=8, parse_math=False)
    return figure


def literal(text: str) -> str:
    r"""A string of the user's with what cannot be seen spelled out.

    Example:
        >>> print(literal("\u202eevil"))
        \u202eevil
    """
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def charts_of(history: History, prefix: str = "grok") -> dict[Chart, dict[str, Series]]:
    """Finite curves by the axes they share, in the order in which they came; accuracies and events have places of their own."""
    charts = {
        chart: {name: curve for name, key in keys.items() if (curve := _drawable(history[key])) is not None}
        for chart, keys in group_by_chart(history, prefix).items()
        if chart.family not in ("accuracy", "onset")
    }
    return {chart: curves for chart, curves in charts.items() if curves}


def _drawable(series: Series) -> Series | None:
    """A curve without what a figure cannot show, ``None`` if nothing is left."""
    values = [value if is_drawable(value) else math.nan for value in series.values]
    return None if all(map(math.isnan, values)) else Series(series.steps, values)


def draw_accuracies(axes: Axes, summary: RunSummary) -> dict[str, str]:
    """Draw training and validation accuracy.

    Returns:
        Those that there are, with their colours.
    """
    for name, series in summary.accuracies.items():
        color = _SPLIT_COLORS[name]
        axes.plot(_positions(series), series.values, color=color, label=name, linewidth=1.8)
    axes.set_ylim(-0.03, 1.05)
    axes.grid(alpha=0.25)
    return {name: _SPLIT_COLORS[name] for name in summary.accuracies}


def draw_chart(axes: Axes, chart: Chart, curves: Mapping[str, Series]) -> dict[str, str]:
    """Draw curves.

    Returns:
        The names of the curves that are shown, with their colours.
    """
    # With many layers, show those that change most: the others say little, and no one can read twenty lines.
    most = sorted(curves, key=lambda name: -_relative_change(curves[name]))[:_MOST_CURVES]
    others = iter(_COLORS)
    shown = {name: _SPLIT_COLORS.get(name) or next(others) for name in curves if name in most}
    for name, color in shown.items():
        axes.plot(_positions(curves[name]), curves[name].values, color=color, linewidth=1.4)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    values = [value for series in curves.values() for value in series.values if math.isfinite(value)]
    if chart.family == "forecast" and max(values) <= 1:
        # A probability that hardly moves should look it.
        axes.set_ylim(-0.03, 1.05)
    # Not for a single point that is small, such as a cosine before training.
    elif min(values) > 0 and max(values) / max(sorted(values)[len(values) // 10], 1e-100) > 300:
        axes.set_yscale("log")
    return shown


def _in_lines(title: str) -> str:
    """A title that fits beside a panel."""
    lines = [""]
    for word in title.split(" "):
        if len(lines[-1]) + len(word) > 18 or word.startswith("("):
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(filter(None, lines))


def _add_legend(axes: Axes, shown: Mapping[str, str], number: int) -> None:
    more = f"{number - len(shown)} more not shown" if number > len(shown) else None
    # Names are given afterwards, since matplotlib reads more into a leading underscore or two dollar signs.
    legend = axes.legend(
        axes.lines, ["-"] * len(shown), title=more,
        loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False, title_fontsize=7,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), shown, strict=True):
        text.set_parse_math(False)
        text.set_text(literal(name))


def _relative_change(series: Series) -> float:
    values = [value for value in series.values if math.isfinite(value)]
    if not values:
        return -1.0
    return (max(values) - min(values)) / (max(map(abs, values)) or 1.0)


def _positions(series: Series) -> list[float]:
    """Steps on the logarithmic axis, with room for step 0."""
    return [max(float(step), 0.5) for step in series.steps]


def mark_events(axes: Axes, summary: RunSummary) -> None:
    """A line at each event."""
    for event, step in summary.steps.items():
        if step is not None:
            axes.axvline(max(step, 0.5), color=_EVENT_COLOR, linestyle=_EVENT_STYLES[event][0], linewidth=1.3)


def _label_events(axes: Axes, summary: RunSummary) -> None:
    onset = summary.steps.get("onset")
    if onset is not None:
        # Within the panel, since it often lies close to the other two.
        axes.annotate(
            "onset ", (max(onset, 0.5), 0.5), xycoords=("data", "axes fraction"), ha="right", fontsize=8, color=_EVENT_COLOR
        )
    labelled = sorted((step, event) for event, step in summary.steps.items() if step is not None and event != "onset")
    are_close = len(labelled) == 2 and max(labelled[1][0], 0.5) < _CLOSE * max(labelled[0][0], 0.5)
    for (step, event), side in zip(labelled, ("right", "left") if are_close else ("center", "center"), strict=False):
        sign = "≤" if summary.events.is_bound(event) else "at"
        axes.annotate(
            f"{_EVENT_STYLES[event][1]} {sign} {step:,}{' ' if side == 'right' else ''}",
            (max(step, 0.5), 1.02),
            xycoords=("data", "axes fraction"),
            ha=side,
            fontsize=8,
            color=_EVENT_COLOR,
        )


def set_step_axis(axes: Axes, history: History) -> None:
    """A logarithmic axis with a place for step 0."""
    last = max((series.steps[-1] for series in history.values() if series.steps), default=1)
    axes.set_xscale("log")
    axes.set_xlim(0.45, max(last, 1) * 1.05)
    decades: Sequence[int] = [10**exponent for exponent in range(math.floor(math.log10(max(last, 1))) + 1)]
    axes.set_xticks([0.5, *decades], ["0", *[f"{decade:,}" for decade in decades]])
