"""What happened in a run, from its history: accuracies, events, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from grok_callbacks.forecast.onset import Events, OnsetTracker, Outcome, Thresholds, is_share
from grok_callbacks.forecast.sources import logged_accuracy_names
from grok_callbacks.forecast.words import verdict_of
from grok_callbacks.history import History, Series

__all__ = ["RunSummary", "is_drawable", "last_step", "summarize"]

# A larger number is no step; floats know no whole numbers beyond it.
_LARGEST_STEP = 2.0**53
# Beyond this a figure's arithmetic overflows.
_LARGEST_VALUE = 1e100


@dataclass(frozen=True)
class RunSummary:
    """A run in brief.

    Args:
        events: When it memorised and generalised, and what was seen of it.
        accuracies: Training and validation accuracy, those of them that there are.
        stage: The last stage of feature learning, ``None`` where it was not measured.
        remarks: What a reader must know of this verdict, a sentence each.
    """

    events: Events = field(default_factory=Events)
    accuracies: Mapping[str, Series] = field(default_factory=dict)
    stage: int | None = None
    remarks: Sequence[str] = ()

    @property
    def outcome(self) -> Outcome | None:
        """What the run is, ``None`` where that hangs on what was not measured or not watched."""
        return self.events.outcome

    @property
    def steps(self) -> Mapping[str, int | None]:
        """The step of each event, ``None`` where it has not come."""
        return self.events.steps

    @property
    def verdict(self) -> str:
        """One sentence, and another where the stage of feature learning says otherwise."""
        odd = {"memorisation": (3, "III"), "grokking": (1, "I"), "comprehension": (1, "I")}
        stage, numeral = odd.get(self.outcome or "", (0, ""))
        sentence = verdict_of(self.events)
        if self.stage == stage:
            return f"{sentence} Feature learning is in stage {numeral} all the same: a stage is no verdict."
        return sentence


def summarize(history: History, thresholds: Thresholds | None = None, prefix: str = "grok") -> RunSummary:
    """Say what a run was, by the events that a detector logged in it, which knows its metrics and thresholds.

    Only a run without a detector is judged here, by its accuracies. What guessing would reach is unknown then: validation has
    left it once it is a fifth of the way beyond all that it reached until the training data were fitted.

    Args:
        history: The run's series.
        thresholds: What counts as memorised and generalised in a run without a detector.
        prefix: The prefix of the monitors' keys.

    Returns:
        The summary.
    """
    accuracies = _accuracies(history, prefix)
    logged, remarks = _logged_events(history, prefix)
    is_detected = any(value >= 0 for value in logged.values())
    events = Events.of_values(logged) if is_detected else _judged(accuracies, thresholds)
    if is_detected and not any(key.endswith("_since") for key in logged):
        # From before detectors logged what they saw.
        events = replace(events, since={"train" if name == "training" else name: 0 for name in accuracies} | {**events.since})
    if accuracies and not is_detected:
        remarks.append(
            "No detector's events are in this folder, so the verdict rests on the accuracy curves and on usual levels alone."
        )
    shown = [series for key, series in history.items() if key.startswith(f"{prefix}/")] + list(accuracies.values())
    remarks += _of_a_late_beginning(events, min((series.steps[0] for series in shown if series.steps), default=0))
    remarks += _of_what_cannot_be_drawn(history, prefix)
    stages = history.get(f"{prefix}/li2/stage", Series()).values
    stage = int(stages[-1]) if stages and stages[-1] in {1, 2, 3} else None
    return RunSummary(events, accuracies, stage, remarks)


def is_drawable(value: float) -> bool:
    """Whether a figure can show a value."""
    return abs(value) <= _LARGEST_VALUE


def last_step(history: History) -> int:
    """How many optimiser steps a run took. Lightning's own curves, among them that of the epoch, stand one step earlier."""
    last = max((series.steps[-1] for series in history.values() if series.steps), default=0)
    epochs = history.get("epoch", Series()).steps
    return max(last, epochs[-1] + 1) if epochs else last


def _accuracies(history: History, prefix: str) -> dict[str, Series]:
    """The accuracies that the module logged; those that were measured on the probe where it logged none, or percentages."""
    splits = {"training": "train", "validation": "validation"}
    found = {
        name: next((key for key in logged_accuracy_names(split) if key in history), None) for name, split in splits.items()
    }
    # Percentages of many classes begin below one, and in one split they may stay there.
    are_shares = all(is_share(value) for key in found.values() if key is not None for value in history[key].values)
    own = {name: f"{prefix}/accuracy/{split}" for name, split in splits.items()}
    keys = {name: (found[name] if are_shares else None) or own[name] for name in splits}
    return {name: history[key] for name, key in keys.items() if key in history and all(map(is_share, history[key].values))}


def _logged_events(history: History, prefix: str) -> tuple[dict[str, float], list[str]]:
    """What a detector logged, and a word on what is broken of it."""
    start = f"{prefix}/onset/"
    values = {key.removeprefix(f"{prefix}/"): series.values[-1] for key, series in history.items() if key.startswith(start)}
    logged = {key: value for key, value in values.items() if abs(value) <= _LARGEST_STEP}
    broken = [f"{prefix}/{key}" for key in values if key not in logged]
    return logged, [f"Left out, since it is no step: {', '.join(broken)}."] if broken else []


def _judged(accuracies: Mapping[str, Series], thresholds: Thresholds | None) -> Events:
    """The events of a run that no detector judged."""
    train, validation = (accuracies.get(name, Series()) for name in ("training", "validation"))
    start = min((series.steps[0] for series in (train, validation) if series.steps), default=0)
    tracker = OnsetTracker(thresholds, start)
    for step, value in zip(train.steps, train.values, strict=True):
        tracker.update_train(step, value)
    if thresholds is None and validation.steps:
        tracker.thresholds = replace(tracker.thresholds, chance=_guessed(validation, tracker.memorized_step))
    for step, value in zip(validation.steps, validation.values, strict=True):
        tracker.update_validation(step, value)
    return tracker.events


def _guessed(validation: Series, memorized: int | None) -> float:
    """The most that validation reached until the training data were fitted: no less than guessing reaches."""
    before = validation if memorized is None else validation.until(max(memorized, validation.steps[0]))
    # A target must lie beyond it.
    return min(max((value for value in before.values if not math.isnan(value)), default=0.0), 0.99)


def _of_a_late_beginning(events: Events, first: int) -> list[str]:
    if first <= 1:
        return []
    if max(events.since.values(), default=0) > 0:
        return [f"The run was not watched before step {first:,}."]
    return [f"The curves in this folder begin at step {first:,}; what came before is known from the run's own record."]


def _of_what_cannot_be_drawn(history: History, prefix: str) -> list[str]:
    measures = (key for key in history if key.startswith(f"{prefix}/") and not key.startswith(f"{prefix}/onset/"))
    broken = [key for key in measures if any(math.isfinite(value) and not is_drawable(value) for value in history[key].values)]
    return [f"Values too large to be drawn are left out of {', '.join(broken)}."] if broken else []
