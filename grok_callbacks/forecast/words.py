"""What the events of a run mean, in words: the same in the terminal, the text tab, the figure and the page."""

from __future__ import annotations

from grok_callbacks.forecast.onset import PHASES, Events, Phase

__all__ = ["event_in_words", "in_percent", "meaning_of", "verdict_of"]


def event_in_words(event: str, events: Events) -> str:
    """One sentence on an event that has come.

    Args:
        event: Its name, one of :data:`~grok_callbacks.forecast.onset.EVENTS`.
        events: The run's events.

    Example:
        >>> event_in_words("memorized", Events({"memorized": 150}, {"train": 150}))
        'Memorised at or before step 150: the training data are fitted.'
    """
    when = events.when(event)
    if event == "memorized":
        return f"Memorised {when}: the training data are fitted."
    if event == "onset":
        return f"Onset {when}: validation {'has left' if events.is_bound(event) else 'leaves'} chance."
    return f"Generalised {when}: {_manner(events)}."


def _manner(events: Events) -> str:
    """How a run generalised."""
    memorized, generalized = events.steps.get("memorized"), events.steps.get("generalized")
    if events.outcome == "grokking" and memorized is not None and generalized is not None:
        at_least = "at least " if events.is_bound("memorized") else ""
        return f"grokking, {at_least}{generalized - memorized:,} steps after memorising"
    if events.outcome == "comprehension":
        return "comprehension, hardly later than fitting the training data"
    unknown = "the order was not seen" if "train" in events.since else "training was not measured"
    return f"whether late or at once is unknown, since {unknown}"


def meaning_of(phase: Phase, events: Events) -> str:
    """What a phase says of the run, and what is unknown.

    Example:
        >>> meaning_of("memorised", Events({"memorized": 30}, {"train": 0}))
        'the training data are fitted; validation has not been measured so far'
    """
    if phase == "memorising" and "train" not in events.since:
        return "whether the training data are fitted has not been measured so far"
    if PHASES.index(phase) < PHASES.index("generalising") and "validation" not in events.since:
        return f"{_MEANINGS[phase].partition(',')[0]}; validation has not been measured so far"
    return _MEANINGS[phase]


_MEANINGS: dict[Phase, str] = {
    "memorising": "the training data are not fitted yet",
    "memorised": "the training data are fitted, validation is near chance: the plateau",
    "generalising": "validation has left chance, and is not at its target",
    "generalised": "validation has reached its target",
}


def verdict_of(events: Events) -> str:
    """What the run is, in one sentence.

    Example:
        >>> verdict_of(Events({"memorized": 26, "generalized": 290}, {"train": 0, "validation": 0}))
        'Grokking: memorised at step 26, generalised at step 290.'
        >>> verdict_of(Events({"memorized": 26}, {"train": 0}))
        'Memorised at step 26; validation was not measured, so whether the run generalises is unknown.'
    """
    memorized, generalized = events.when("memorized"), events.when("generalized")
    outcome = events.outcome
    if outcome is None:
        return _of_what_was_seen(events)
    if outcome == "grokking":
        return f"Grokking: memorised {memorized}, generalised {generalized}."
    if outcome == "comprehension":
        return f"Comprehension: generalised {generalized}, {_fitted(events)}."
    if outcome == "memorisation":
        return f"Memorisation: the training data were fitted {memorized}; the run has not generalised."
    return "Confusion: the run has neither fitted its training data nor generalised."


def _fitted(events: Events) -> str:
    """When a run that generalised without delay fitted its training data."""
    memorized, generalized = events.steps.get("memorized"), events.steps.get("generalized")
    if memorized is None or generalized is None:
        return "without fitting all training data"
    return f"{'before' if generalized < memorized else 'soon after'} memorising {events.when('memorized')}"


def _of_what_was_seen(events: Events) -> str:
    """Of a run whose kind hangs on what was not seen."""
    seen = {split for split in ("train", "validation") if split in events.since}
    fitted = "Not memorised so far" if events.steps.get("memorized") is None else f"Memorised {events.when('memorized')}"
    found = "Not generalised so far" if events.steps.get("generalized") is None else f"Generalised {events.when('generalized')}"
    if seen == {"train"}:
        return f"{fitted}; validation was not measured, so whether the run generalises is unknown."
    if seen == {"validation"}:
        return f"{found}; training was not measured, so whether the run memorised is unknown."
    if not seen:
        return "No accuracies were logged or measured, so there is no verdict."
    return f"{found}, {fitted.lower()}: whether late or at once is unknown, since the run was not watched from its beginning."


def in_percent(probability: float) -> str:
    """A probability in words; no forecast is certain.

    Example:
        >>> in_percent(0.934), in_percent(0.999), in_percent(0.001)
        ('93%', 'more than 99%', 'less than 1%')
    """
    if probability > 0.99:
        return "more than 99%"
    return "less than 1%" if probability < 0.01 else f"{probability:.0%}"
