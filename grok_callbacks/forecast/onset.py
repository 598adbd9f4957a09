"""When a run memorised, began to generalise, and generalised: a state machine fed with accuracies as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from grok_callbacks.forecast._numbers import require_number, require_whole

__all__ = ["EVENTS", "PHASES", "OnsetTracker", "Outcome", "Phase", "Thresholds", "phase_at"]

#: What a run turned out to be (Liu et al. 2022, arXiv 2205.10343).
Outcome = Literal["grokking", "comprehension", "memorisation", "confusion"]

#: What a run is doing, as far as its events tell.
Phase = Literal["memorising", "memorised", "generalising", "generalised"]

#: In the order in which a grokking run goes through them.
PHASES: tuple[Phase, ...] = get_args(Phase)

#: The events in the order in which a grokking run meets them.
EVENTS = ("memorized", "onset", "generalized")

_SPLITS: Mapping[str, Literal["train", "validation"]] = {
    "memorized": "train", "onset": "validation", "generalized": "validation",
}  # fmt: skip
# The keys under which the events are logged.
_KEYS = {"memorized": "memorized_step", "onset": "onset_step", "generalized": "grokked_step"}
# Logged in place of a step that no longer holds.
_NONE = -1.0


@dataclass(frozen=True)
class Thresholds:
    """What counts as memorised, as the onset of generalisation, and as generalised.

    Args:
        memorized: The training metric that counts as memorised.
        target: The validation metric that a good run reaches: 1.0, or lower for data that level off lower.
        chance: The validation metric of guessing.
        onset: Share of the way from ``chance`` to ``target`` that counts as the onset.
        generalized: Share of ``target`` that counts as generalised; of the way from ``chance`` to ``target`` with mode "min".
        mode: Whether the metrics grow ("max": accuracy, F1) or fall ("min": loss, error) as the model gets better.
        patience: Consecutive measurements that an event must last; it is dated to the first of them.
        delay_ratio: Generalising this many times later than memorising is grokking; sooner is comprehension.

    Raises:
        ValueError: If a threshold cannot be reached in the given mode, or is no finite number.
    """

    memorized: float = 0.99
    target: float = 1.0
    chance: float = 0.0
    onset: float = 0.2
    generalized: float = 0.9
    mode: Literal["max", "min"] = "max"
    patience: int = 2
    delay_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise ValueError(f"`mode` must be 'max' or 'min', got {self.mode!r}.")
        for name in ("memorized", "target", "chance", "onset", "generalized"):
            require_number(name, getattr(self, name))
        require_number("delay_ratio", self.delay_ratio, 0)
        require_whole("patience", self.patience, 1)
        if not self.sign * self.target > self.sign * self.chance:
            raise ValueError(f"`target` {self.target} is no better than `chance` {self.chance} with mode {self.mode!r}.")
        if not 0 < self.onset < 1 or not 0 < self.generalized <= 1:
            raise ValueError("`onset` and `generalized` are shares between 0 and 1.")

    @property
    def sign(self) -> int:
        """1 if larger is better, else -1."""
        return 1 if self.mode == "max" else -1

    @property
    def onset_level(self) -> float:
        """The validation metric at the onset."""
        return self.chance + self.onset * (self.target - self.chance)

    @property
    def generalized_level(self) -> float:
        """The validation metric of a model that has generalised."""
        if self.mode == "max":
            return self.generalized * self.target
        return self.chance + self.generalized * (self.target - self.chance)


@dataclass(frozen=True)
class Events:
    """The events of a run, and how much of the run was watched.

    Args:
        steps: The step of each event, ``None`` or left out where it has not come.
        since: From which step on the "train" and the "validation" metric were seen: 0 in a run that was watched from its
            beginning. A metric that is left out was never seen.
        delay_ratio: Generalising this many times later than memorising is grokking; sooner is comprehension.

    Example:
        >>> late = Events({"memorized": 150, "onset": 200, "generalized": 400}, {"train": 150, "validation": 150})
        >>> late.when("memorized"), late.when("onset"), late.outcome, late.delay
        ('at or before step 150', 'at step 200', 'grokking', None)
    """

    steps: Mapping[str, int | None] = field(default_factory=dict)
    since: Mapping[str, int] = field(default_factory=dict)
    delay_ratio: float = 2.0

    def is_bound(self, event: str) -> bool:
        """Whether an event came at its step or before: it already held when a run was first looked at later than at step 0."""
        step = self.steps.get(event)
        return step is not None and 0 < self.since.get(_SPLITS[event], 0) >= step

    def when(self, event: str) -> str:
        """When an event came, in words."""
        step = self.steps.get(event)
        if step is None:
            return "not so far" if _SPLITS[event] in self.since else "not measured"
        return f"{'at or before' if self.is_bound(event) else 'at'} step {step:,}"

    def values(self) -> dict[str, float]:
        """What is logged of them by key, without the prefix; -1 for what has not come.

        Example:
            >>> Events({"memorized": 26}, {"train": 0}).values()
            {'onset/train_since': 0.0, 'onset/memorized_step': 26.0, 'onset/onset_step': -1.0, 'onset/grokked_step': -1.0,
             'onset/delay': -1.0}
        """
        since = {f"{split}_since": step for split, step in self.since.items()}
        steps = {key: self.steps.get(event) for event, key in _KEYS.items()} | {"delay": self.delay}
        return {f"onset/{key}": _NONE if step is None else float(step) for key, step in {**since, **steps}.items()}

    @classmethod
    def of_values(cls, values: Mapping[str, float]) -> Events:
        """The events that :meth:`values` were taken of; without a word on it, a metric was seen if its events were."""
        steps = {event: int(step) for event, key in _KEYS.items() if (step := values.get(f"onset/{key}", _NONE)) >= 0}
        since: dict[str, int] = {_SPLITS[event]: 0 for event in steps}
        since |= {split: int(values[key]) for split in _SPLITS.values() if (key := f"onset/{split}_since") in values}
        return cls({event: steps.get(event) for event in EVENTS}, since)

    @property
    def delay(self) -> int | None:
        """Steps from memorising to generalising, where both were seen."""
        memorized, generalized = self.steps.get("memorized"), self.steps.get("generalized")
        if memorized is None or generalized is None or self.is_bound("memorized") or self.is_bound("generalized"):
            return None
        return generalized - memorized

    @property
    def phase(self) -> Phase:
        """What the run is doing now."""
        return phase_at(max((step for step in self.steps.values() if step is not None), default=0), self.steps)

    @property
    def outcome(self) -> Outcome | None:
        """What the run is, as far as it has gone; ``None`` where that hangs on what was not seen."""
        memorized, generalized = self.steps.get("memorized"), self.steps.get("generalized")
        if not set(_SPLITS.values()) <= set(self.since):
            return None
        if generalized is None:
            return "confusion" if memorized is None else "memorisation"
        # A model can generalise without ever fitting all of its training data, as with label noise or strong dropout.
        if memorized is None:
            return "comprehension"
        earliest = {event: 0 if self.is_bound(event) else self.steps[event] or 0 for event in ("memorized", "generalized")}
        if earliest["generalized"] >= self.delay_ratio * max(memorized, 1):
            return "grokking"
        return "comprehension" if generalized < self.delay_ratio * max(earliest["memorized"], 1) else None


class _Crossing:
    """The first of several consecutive values at or beyond a level."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.streak_start: int | None = None
        self.streak = 0
        # Whether values beyond the level do not count until one has been on its near side.
        self.held = False

    def update(self, step: int, beyond: bool, patience: int) -> bool:
        """Whether the event is established by this value."""
        if self.step is not None:
            return False
        if not beyond:
            self.streak_start, self.streak, self.held = None, 0, False
        if not beyond or self.held:
            return False
        self.streak_start = step if self.streak_start is None else self.streak_start
        self.streak += 1
        if self.streak >= patience:
            self.step = self.streak_start
            return True
        return False


class OnsetTracker:
    """Finds the events of a run from its training and validation metric, fed in the order of steps.

    An event is the first of ``patience`` consecutive measurements beyond its level, so noise around a level does not fire it,
    and it never fires twice. NaN is beyond no level. What an untrained network (step 0) gets right is luck: where that is
    beyond the onset's level, the onset comes once the metric has been below, or with generalising at the latest. What already
    holds at the first look at a run that is under way came at that step or before, see :meth:`Events.is_bound`.

    Args:
        thresholds: What counts.
        start: The step of the first look at the run.

    Example:
        >>> tracker = OnsetTracker(Thresholds())
        >>> for step, accuracy in [(10, 0.4), (20, 1.0), (40, 1.0)]:
        ...     _ = tracker.update_train(step, accuracy)
        >>> for step, accuracy in [(10, 0.0), (400, 0.5), (450, 0.95), (500, 1.0)]:
        ...     _ = tracker.update_validation(step, accuracy)
        >>> tracker.memorized_step, tracker.onset_step, tracker.grokked_step, tracker.delay, tracker.outcome
        (20, 400, 450, 430, 'grokking')
    """

    def __init__(self, thresholds: Thresholds | None = None, start: int = 0) -> None:
        self.thresholds = thresholds or Thresholds()
        self.start = start
        #: As long as it is the same, so are :attr:`events`.
        self.changes = 0
        self._since: dict[str, int] = {}
        self._crossings = {event: _Crossing() for event in EVENTS}

    def update_train(self, step: int, value: float) -> list[str]:
        """Take in a training metric; returns the events that it establishes."""
        self._note("train", step)
        return self._update(step, value, {"memorized": self.thresholds.memorized})

    def update_validation(self, step: int, value: float) -> list[str]:
        """Take in a validation metric; returns the events that it establishes."""
        self._note("validation", step)
        onset = self._crossings["onset"]
        onset.held = onset.held or step == 0
        events = self._update(
            step, value, {"onset": self.thresholds.onset_level, "generalized": self.thresholds.generalized_level}
        )
        if "generalized" in events and onset.step is None:
            onset.step = self.grokked_step
            events.insert(0, "onset")
        return events

    def _note(self, split: str, step: int) -> None:
        if split not in self._since:
            self.changes += 1
            self._since[split] = step if self.start > 0 else 0

    def _update(self, step: int, value: float, levels: Mapping[str, float]) -> list[str]:
        sign = self.thresholds.sign
        events = [
            event
            for event, level in levels.items()
            # The comparison is false for NaN.
            if self._crossings[event].update(step, sign * value >= sign * level, self.thresholds.patience)
        ]
        self.changes += len(events)
        return events

    @property
    def memorized_step(self) -> int | None:
        """The step at which the training data were fitted."""
        return self._crossings["memorized"].step

    @property
    def onset_step(self) -> int | None:
        """The step at which validation left chance."""
        return self._crossings["onset"].step

    @property
    def grokked_step(self) -> int | None:
        """The step at which the model had generalised, whether late or at once."""
        return self._crossings["generalized"].step

    @property
    def events(self) -> Events:
        """All of them, with what was seen of the run."""
        steps = {event: crossing.step for event, crossing in self._crossings.items()}
        return Events(steps, dict(self._since), self.thresholds.delay_ratio)

    @property
    def delay(self) -> int | None:
        """Steps from memorising to generalising, where both were seen."""
        return self.events.delay

    @property
    def phase(self) -> Phase:
        """What the run is doing now."""
        return self.events.phase

    @property
    def outcome(self) -> Outcome | None:
        """What the run is, as far as it has gone; ``None`` where that hangs on what was not seen."""
        return self.events.outcome

    def restart(self, split: Literal["train", "validation"]) -> None:
        """Forget what one of the two metrics has told."""
        self.changes += 1
        self._since.pop(split, None)
        for event in ("memorized",) if split == "train" else ("onset", "generalized"):
            self._crossings[event] = _Crossing()

    def state_dict(self) -> dict[str, Any]:
        """Plain Python for a checkpoint."""
        return {
            "thresholds": asdict(self.thresholds),
            "start": self.start,
            "since": dict(self._since),
            "crossings": {event: dict(crossing.__dict__) for event, crossing in self._crossings.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: If ``state`` is not such a state.
        """
        try:
            thresholds = Thresholds(**state["thresholds"])
            crossings = {event: state["crossings"][event] for event in EVENTS}
            values = [crossing[key] for crossing in crossings.values() for key in ("step", "streak_start", "streak", "held")]
            start, since = state["start"], dict(state["since"])
            values += [start, *since.values()]
        except (KeyError, TypeError) as error:
            raise ValueError("`state` is not that of an OnsetTracker.") from error
        if not all(value is None or isinstance(value, int) for value in values):
            raise ValueError("`state` is not that of an OnsetTracker.")
        self.changes += 1
        self.thresholds, self.start, self._since = thresholds, start, since
        for event, saved in crossings.items():
            crossing = self._crossings[event]
            crossing.step, crossing.streak_start, crossing.streak = saved["step"], saved["streak_start"], saved["streak"]
            crossing.held = saved["held"]


def phase_at(step: int, events: Mapping[str, int | None]) -> Phase:
    """What a run is doing at a step.

    Args:
        step: The step.
        events: The step of each event, ``None`` where it has not come.

    Example:
        >>> [phase_at(step, {"memorized": 30, "onset": 120, "generalized": 290}) for step in (0, 30, 120, 290)]
        ['memorising', 'memorised', 'generalising', 'generalised']
    """
    reached = 0
    for number, event in enumerate(EVENTS, start=1):
        at = events.get(event)
        if at is not None and at <= step:
            reached = number
    return PHASES[reached]


def is_share(value: float) -> bool:
    """Whether a value can be an accuracy: percentages cannot."""
    return math.isnan(value) or 0.0 <= value <= 1.0
