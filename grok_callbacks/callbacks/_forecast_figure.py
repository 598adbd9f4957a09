"""The course of a forecast as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from grok_callbacks.history import Series

__all__ = ["course"]

# Of Okabe and Ito's palette, which colour-blind readers can tell apart.
_FORECAST, _WARNING, _ONSET, _GENERALISED = "#0072B2", "#D55E00", "#999999", "#009E73"


def course(
    curves: Mapping[str, Series], *, threshold: float, warned: int | None, onset: int | None, generalized: int | None
) -> Figure:
    """Probability over the run, and under it the expected step of generalising, which a perfect forecast keeps level.

    Args:
        curves: ``probability``, ``eta_steps``, ``lower`` and ``upper``.
        threshold: The probability that a warning takes.
        warned: The step of the warning.
        onset: The step at which validation left chance.
        generalized: The step at which the run had generalised.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    # Margins by hand: a layout engine draws everything twice, and drawing is what a figure costs.
    figure = Figure(figsize=(7, 5.5))
    margins = {"left": 0.12, "right": 0.97, "bottom": 0.09, "top": 0.97, "hspace": 0.08}
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw=margins)
    chance = curves["probability"]
    above.plot(chance.steps, chance.values, marker=".", color=_FORECAST, label="forecast")
    above.axhline(threshold, color=_WARNING, linestyle=":", linewidth=1, label="threshold")
    above.set(ylabel="probability of generalising", ylim=(-0.03, 1.03))

    lower, expected, upper = curves["lower"], curves["eta_steps"], curves["upper"]
    below.fill_between(
        expected.steps, lower.values, upper.values, color=_FORECAST, alpha=0.2, linewidth=0, label="80% interval"
    )
    below.plot(expected.steps, expected.values, marker=".", color=_FORECAST, label="expected")
    if generalized is not None:
        below.axhline(generalized, color=_GENERALISED, linestyle="--", linewidth=1, label="true step")
    below.set(xlabel="step", ylabel="step of generalising", xscale="log", yscale="log")
    for axis in (below.xaxis, below.yaxis):
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    for axes in (above, below):
        axes.grid(alpha=0.25)
        for name, step, colour in (
            ("warned", warned, _WARNING), ("onset", onset, _ONSET), ("generalised", generalized, _GENERALISED),
        ):  # fmt: skip
            if step is not None:
                axes.axvline(step, color=colour, linewidth=1, label=f"{name} at {step:,}" if axes is above else None)
        axes.legend(frameon=False, fontsize=8, loc="best")
        # Without titles, whose room would be looked for.
        axes.set_title("", y=1.0)
    return figure
