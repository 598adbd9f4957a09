"""A run as one page of HTML that needs nothing else: no script, no network, no TensorBoard."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, groupby
from typing import TYPE_CHECKING

from grok_callbacks import __version__
from grok_callbacks.forecast.onset import Outcome, is_share, phase_at
from grok_callbacks.forecast.words import in_percent, meaning_of
from grok_callbacks.history import History, Series
from grok_callbacks.measures import MEASURES, QUESTIONS, Chart
from grok_callbacks.report.figure import charts_of, draw_accuracies, draw_chart, literal, mark_events, set_step_axis
from grok_callbacks.report.summary import RunSummary, is_drawable, last_step, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["run_page"]

_OUTCOMES: Mapping[Outcome, str] = {
    "grokking": "The network first fitted its training data by heart, and found a rule that holds for unseen data much later.",
    "comprehension": "The network generalised about when it fitted its training data: there was no delay to wait out.",
    "memorisation": "The network has fitted its training data, and has not come to be right about unseen data, so far.",
    "confusion": "The network has learned neither its training data nor a rule, so far.",
}
_UNWATCHED = "not watched"
# Shades of one grey: colours are for curves.
_SHADES: Mapping[str, str] = {
    _UNWATCHED: "transparent", "memorising": "#d9d9d9", "memorised": "#b5b5b5", "generalising": "#8f8f8f",
    "generalised": "#666666",
}  # fmt: skip
_STAGES = {
    1: "I, lazy: the last layer fits random features",
    2: "II, independent: each unit learns a feature",
    3: "III, interactive: units turn to what is missing",
}
_MOST_ROWS = 60
# A curve with more points than a screen has columns is thinned out.
_MOST_POINTS = 800
_UNLISTED = frozenset({"accuracy", "onset", "forecast"})


def run_page(
    history: History, title: str = "", *, summary: RunSummary | None = None, settings: str = "", prefix: str = "grok"
) -> str:
    """Write a run's page.

    Whatever comes from outside (the title, the names of curves, the settings) is shown literally and never as HTML.

    Args:
        history: The run's series, from a monitor, a Recorder or :func:`~grok_callbacks.report.read_run`.
        title: The run's name.
        summary: The run's events if they are known already.
        settings: The run's hyper-parameters as text.
        prefix: The prefix of the monitors' keys.

    Returns:
        A whole HTML document.

    Raises:
        ValueError: If the history holds no measure of this prefix.

    Example:
        >>> history = History()
        >>> for step in (0, 1, 10, 100):
        ...     history.add(step, {"grok/norm": 5.0, "grok/accuracy/train": 1.0, "grok/accuracy/validation": 0.1})
        >>> "<h3>Weight norm</h3>" in run_page(history, title="My run")
        True
    """
    summary = summary or summarize(history, prefix=prefix)
    page = _Page(history, summary, prefix)
    if not page.charts and not summary.accuracies:
        raise ValueError(f"`history` holds no key that begins with {prefix!r}; was the run monitored?")
    return "".join(page.parts(title, settings))


class _Page:
    """The parts of a page, which number their figures together."""

    def __init__(self, history: History, summary: RunSummary, prefix: str) -> None:
        self.history = History()
        self.history.merge({key: _thinned(series) for key, series in history.items()})
        accuracies = {name: _thinned(series) for name, series in summary.accuracies.items()}
        self.summary = replace(summary, accuracies=accuracies)
        self.charts = charts_of(self.history, prefix)
        self.prefix = prefix
        self.last = last_step(history)
        self._numbers = count(1)

    def parts(self, title: str, settings: str) -> Iterator[str]:
        """The document, piece by piece."""
        outcome = self.summary.outcome
        yield _HEAD.replace("TITLE", _escaped(title or "A run"))
        yield f'<header><p class="run">{_escaped(title)}</p><h1>{_escaped(_first_sentence(self.summary.verdict))}</h1>'
        explanation = (_rest(self.summary.verdict), _OUTCOMES[outcome] if outcome else "", *self.summary.remarks)
        yield "".join(f"<p>{_escaped(text)}</p>" for text in explanation if text)
        yield f"{self._forecast()}</header>"
        timeline = self._timeline() + self._stages()
        if timeline:
            yield f"<section><h2>Timeline</h2>{timeline}</section>"
        families: dict[str, dict[Chart, Mapping[str, Series]]] = {}
        for chart, curves in self.charts.items():
            families.setdefault(chart.family, {})[chart] = curves
        for question in (*QUESTIONS, "Other measures"):
            asked = [family for family in families if _question(family) == question]
            if asked:
                yield f"<section><h2>{_escaped(question)}</h2>"
                yield "".join(self._family(family, families[family]) for family in asked)
                yield "</section>"
        missing = [measure.title for family, measure in MEASURES.items() if family not in families and family not in _UNLISTED]
        if missing:
            yield f"<section><h2>Not measured in this run</h2><p>{_escaped(', '.join(missing))}.</p></section>"
        if settings:
            yield f"<section><h2>Settings</h2><pre>{_escaped(settings)}</pre></section>"
        yield f"<footer>{len(self.history)} curves up to step {self.last:,}. Made by grok-callbacks {__version__}.</footer>"
        yield "</main></body></html>\n"

    # What happened.

    def _timeline(self) -> str:
        if not self.summary.events.since and not self.summary.accuracies:
            return ""
        phases = self._phases()
        has_curves = bool(self.summary.accuracies)
        figure = _new_figure(2.9 if has_curves else 0.8)
        strip, *below = figure.subplots(
            1 + has_curves, 1, sharex=True, squeeze=False, height_ratios=[0.13, 1][: 1 + has_curves]
        )[:, 0]
        _draw_phases(strip, [(phase, start, end) for phase, start, end, _ in phases], self.last)
        legend: dict[str, str] = {}
        for axes in below:
            legend = {f"{name} accuracy": color for name, color in draw_accuracies(axes, self.summary).items()}
            mark_events(axes, self.summary)
        set_step_axis((below or [strip])[0], self.history)
        rows = [
            [f'<span class="phase">{_swatch(_SHADES[phase])}{phase}</span>', f"{start:,}", f"{end:,}", _escaped(meaning)]
            for phase, start, end, meaning in phases
        ]
        return (
            self._svg(figure, "Accuracies and phases of the run over its steps", legend.items())
            + "<p>Vertical lines, here and below: memorised (dotted), onset (dots and dashes), generalised (dashed).</p>"
            + f"<p>{self._dates()}</p>"
            + _table(["phase", "from step", "to step", "what it means"], rows)
        )

    def _dates(self) -> str:
        """When the events came."""
        events = self.summary.events
        words = {"memorized": "memorised", "onset": "onset", "generalized": "generalised"}
        return _escaped(_capitalised("; ".join(f"{word} {events.when(event)}" for event, word in words.items())))

    def _phases(self) -> list[tuple[str, int, int, str]]:
        """Name, first and last step and meaning of each phase, beginning where the run was first looked at."""
        events = self.summary.events
        first = min(events.since.values(), default=0)
        starts = sorted({first, *(step for step in events.steps.values() if step is not None and first <= step <= self.last)})
        spans = zip(starts, [*starts[1:], self.last], strict=True)
        phases: list[tuple[str, int, int, str]] = []
        if first > 0:
            phases.append((_UNWATCHED, 0, first, "Nothing is known of these steps."))
        for phase, group in groupby(spans, key=lambda span: phase_at(span[0], events.steps)):
            spanned = list(group)
            phases.append((phase, spanned[0][0], spanned[-1][1], _capitalised(meaning_of(phase, events))))
        return [phase for phase in phases if phase[2] > phase[1]]

    def _stages(self) -> str:
        stages = self.history.get(f"{self.prefix}/li2/stage")
        if stages is None:
            return ""
        begun: dict[int, int] = {}
        for step, value in zip(stages.steps, stages.values, strict=True):
            if value in _STAGES:
                begun.setdefault(int(value), step)
        rows = [[_escaped(_STAGES[stage]), f"{step:,}"] for stage, step in sorted(begun.items())]
        note = _rest(self.summary.verdict) or "A stage is no verdict on generalisation."
        return f"<h3>Stages of feature learning</h3>{_table(['stage', 'from step'], rows)}<p>{_escaped(note)}</p>"

    def _forecast(self) -> str:
        series = {
            name: self.history.get(f"{self.prefix}/forecast/{name}") for name in ("probability", "eta_steps", "lower", "upper")
        }
        probability = series["probability"]
        if probability is None or math.isnan(probability.values[-1]) or not is_share(probability.values[-1]):
            return ""
        step = probability.steps[-1]
        sentence = f"Last forecast, at step {step:,}: generalises with a probability of {in_percent(probability.values[-1])}"
        eta, lower, upper = (one.at(step) if one is not None else math.nan for one in list(series.values())[1:])
        if is_drawable(eta):
            sentence += f", if so around step {eta:,.0f}"
        if is_drawable(lower) and is_drawable(upper):
            sentence += f" (80% interval: {lower:,.0f} to {upper:,.0f})"
        return f"<p>{_escaped(sentence)}.</p>"

    # Measures.

    def _family(self, family: str, charts: Mapping[Chart, Mapping[str, Series]]) -> str:
        measure = MEASURES.get(family)
        title = measure.title if measure else next(iter(charts)).title
        meaning = measure.meaning if measure else "A measure of this project's own."
        parts = [f"<article><h3>{_escaped(title)}</h3><p>{_escaped(meaning)}</p>"]
        for chart, curves in charts.items():
            if chart.title != title:
                parts.append(f"<h4>{_escaped(chart.title)}</h4>")
            parts.append(self._chart(chart, curves))
        parts.append(self._values({name: series for curves in charts.values() for name, series in curves.items()}))
        if measure and measure.sources:
            links = [
                f'<a href="https://arxiv.org/abs/{source.arxiv}">{_escaped(source.authors)}</a>'
                if source.arxiv
                else _escaped(source.authors)
                for source in measure.sources
            ]
            parts.append(f'<p class="source">Source: {"; ".join(links)}</p>')
        return "".join([*parts, "</article>"])

    def _chart(self, chart: Chart, curves: Mapping[str, Series]) -> str:
        figure = _new_figure(2.1)
        axes = figure.subplots()
        shown = draw_chart(axes, chart, curves)
        mark_events(axes, self.summary)
        set_step_axis(axes, self.history)
        hidden = len(curves) - len(shown)
        legend = [*shown.items(), *([(f"{hidden} more that change less", "")] if hidden else [])]
        return self._svg(figure, f"{chart.title} over the steps of the run", legend)

    def _values(self, curves: Mapping[str, Series]) -> str:
        """A table of what each curve was at the events."""
        events = {"start": 0, **{word: self.summary.steps.get(event) for word, event in _MOMENTS.items()}, "end": self.last}
        moments = {word: step for word, step in events.items() if step is not None}
        rows = [
            [
                _escaped(name),
                *(_number(series.at(step) if word != "start" else series.values[0]) for word, step in moments.items()),
            ]
            for name, series in list(curves.items())[:_MOST_ROWS]
        ]
        more = f"<p>{len(curves) - len(rows):,} more curves.</p>" if len(curves) > len(rows) else ""
        return f"<details><summary>Values</summary>{_table(['', *moments], rows)}{more}</details>"

    def _svg(self, figure: Figure, words: str, legend: Iterable[tuple[str, str]]) -> str:
        drawing = _to_svg(figure, f"f{next(self._numbers)}-")
        entries = "".join(f"<li>{_swatch(color) if color else ''}{_escaped(name)}</li>" for name, color in legend)
        caption = f"<figcaption><ul>{entries}</ul></figcaption>" if entries else ""
        return f'<figure role="img" aria-label="{_escaped(words)}">{drawing}{caption}</figure>'


_MOMENTS = {"memorised": "memorized", "generalised": "generalized"}


def _question(family: str) -> str:
    return MEASURES[family].question if family in MEASURES else "Other measures"


def _escaped(text: str) -> str:
    """Text from outside, literally."""
    return html.escape(literal(text))


def _first_sentence(verdict: str) -> str:
    return verdict.partition(". ")[0].removesuffix(".") + "."


def _rest(verdict: str) -> str:
    return verdict.partition(". ")[2]


def _capitalised(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _number(value: float) -> str:
    if not is_drawable(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _swatch(color: str) -> str:
    return f'<i style="background:{color}"></i>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _thinned(series: Series) -> Series:
    """At most some hundred points, dense where the logarithmic axis is: of each column its first, lowest and highest."""
    if len(series) <= _MOST_POINTS:
        return series
    width = math.log(max(series.steps[-1], 2) / 0.5) / (_MOST_POINTS / 3)
    columns: dict[int, list[int]] = {}
    for index, step in enumerate(series.steps):
        columns.setdefault(int(math.log(max(step, 0.5) / 0.5) / width), []).append(index)
    kept = {0, len(series) - 1}
    for indices in columns.values():
        kept |= {indices[0], min(indices, key=series.values.__getitem__), max(indices, key=series.values.__getitem__)}
    order = sorted(kept)
    return Series([series.steps[index] for index in order], [series.values[index] for index in order])


# Drawing.


def _new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    # Narrow, so that letters stay legible on a phone; fixed margins, so that all axes begin and end alike.
    figure = Figure(figsize=(5.6, height))
    figure.subplots_adjust(left=0.1, right=0.985, bottom=0.3 / height, top=1 - 0.12 / height, hspace=0.05)
    return figure


def _draw_phases(axes: Axes, phases: Iterable[tuple[str, int, int]], last: int) -> None:
    """Blocks of grey, named where there is room."""
    whole = math.log(max(last, 1) / 0.5) or 1.0
    for phase, start, end in phases:
        left, right = max(start, 0.45), max(end, 0.5)
        if phase != _UNWATCHED:
            axes.axvspan(left, right, color=_SHADES[phase], linewidth=0)
        if math.log(right / left) / whole > 0.016 * len(phase):
            # Black is the page's own ink.
            ink = {"generalised": "#ffffff", _UNWATCHED: "#000000"}.get(phase, "#111111")
            axes.text(math.sqrt(left * right), 0.5, phase, ha="center", va="center", fontsize=8, color=ink, clip_on=True)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.tick_params(which="both", bottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _to_svg(figure: Figure, prefix: str) -> str:
    """A drawing for the midst of a page: ids of its own, the page's text colour, no background."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grok", "path.simplify_threshold": 0.5}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{prefix}", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("#000000", "currentColor").strip()


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark"><title>TITLE: grokking report</title>
<style>
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c5c5c; --paper: #fff; --line: #ddd; --link: #005a9c; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e6e6; --soft: #a6a6a6; --paper: #16181c; --line: #3a3d44; --link: #7cb8ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
header { border-bottom: 3px solid var(--line); padding-bottom: .5rem; }
.run { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .3rem 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2rem 0 .75rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1.05rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h4 { font-size: .9rem; font-weight: 600; margin: .75rem 0 0; color: var(--soft); }
p { margin: 0 0 .6rem; max-width: 46rem; }
section > article { break-inside: avoid; }
@media (min-width: 60rem) { section:has(article) { display: grid; grid-template-columns: 1fr 1fr; column-gap: 2.5rem; }
  section:has(article) > h2 { grid-column: 1 / -1; } }
article { margin-bottom: 2rem; min-width: 0; }
figure { margin: .25rem 0 .5rem; max-width: 44rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { fill: currentColor; }
figcaption ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: 0; padding: 0; font-size: .8rem; }
figcaption li { overflow-wrap: anywhere; }
i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
.table { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.phase { white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
summary { cursor: pointer; color: var(--soft); font-size: .85rem; }
pre { overflow-x: auto; font-size: .8rem; }
.source, footer { color: var(--soft); font-size: .8rem; }
.source { margin-top: .4rem; }
a { color: var(--link); }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --link: #000; }
  html, body { font-size: 11px; } main { max-width: none; padding: 0; }
  section:has(article) { display: grid; grid-template-columns: 1fr 1fr; column-gap: 1.5rem; }
  section:has(article) > h2 { grid-column: 1 / -1; } figure, tr, p, pre { break-inside: avoid; }
  h2, h3, h4, h3 + p { break-after: avoid; }
  section > article:has(h4) { break-inside: auto; } h2 { margin-top: 1.2rem; } article { margin-bottom: 1.2rem; }
  details:not([open]) { display: none; }
}
@page { margin: 14mm; }
</style></head><body><main>
"""
