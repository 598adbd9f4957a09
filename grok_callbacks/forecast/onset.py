"""When a run memorised, began to generalise, and generalised: a state machine fed with accuracies as they come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
    beyond the onset's level, the onset comes once the metric has been below, or with generalising at the latest.

    Args:
        thresholds: What counts.

    Example:
        >>> tracker = OnsetTracker(Thresholds())
        >>> for step, accuracy in [(10, 0.4), (20, 1.0), (40, 1.0)]:
        ...     _ = tracker.update_train(step, accuracy)
        >>> for step, accuracy in [(10, 0.0), (400, 0.5), (450, 0.95), (500, 1.0)]:
        ...     _ = tracker.update_validation(step, accuracy)
        >>> tracker.memorized_step, tracker.onset_step, tracker.grokked_step, tracker.delay, tracker.outcome
        (20, 400, 450, 430, 'grokking')
    """

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self._crossings = {event: _Crossing() for event in EVENTS}

    def update_train(self, step: int, value: float) -> list[str]:
        """Take in a training metric; returns the events that it establishes."""
        return self._update(step, value, {"memorized": self.thresholds.memorized})

    def update_validation(self, step: int, value: float) -> list[str]:
        """Take in a validation metric; returns the events that it establishes."""
        onset = self._crossings["onset"]
        onset.held = onset.held or step == 0
        events = self._update(
            step, value, {"onset": self.thresholds.onset_level, "generalized": self.thresholds.generalized_level}
        )
        if "generalized" in events and onset.step is None:
            onset.step = self.grokked_step
            events.insert(0, "onset")
        return events

    def _update(self, step: int, value: float, levels: Mapping[str, float]) -> list[str]:
        sign = self.thresholds.sign
        return [
            event
            for event, level in levels.items()
            # The comparison is false for NaN.
            if self._crossings[event].update(step, sign * value >= sign * level, self.thresholds.patience)
        ]

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
    def delay(self) -> int | None:
        """Steps from memorising to generalising."""
        if self.memorized_step is None or self.grokked_step is None:
            return None
        return self.grokked_step - self.memorized_step

    @property
    def phase(self) -> Phase:
        """What the run is doing now."""
        steps = {"memorized": self.memorized_step, "onset": self.onset_step, "generalized": self.grokked_step}
        return phase_at(max((step for step in steps.values() if step is not None), default=0), steps)

    @property
    def outcome(self) -> Outcome:
        """What the run is, as far as it has gone."""
        if self.grokked_step is None:
            return "confusion" if self.memorized_step is None else "memorisation"
        # A model can generalise without ever fitting all of its training data, as with label noise or strong dropout.
        if self.memorized_step is None or self.grokked_step < self.thresholds.delay_ratio * max(self.memorized_step, 1):
            return "comprehension"
        return "grokking"

    def restart(self, split: Literal["train", "validation"]) -> None:
        """Forget what one of the two metrics has told."""
        for event in ("memorized",) if split == "train" else ("onset", "generalized"):
            self._crossings[event] = _Crossing()

    def adopt(self, steps: Mapping[str, int]) -> None:
        """Take over events that were established elsewhere, by name of the event."""
        for event, step in steps.items():
            self._crossings[event].step = step

    def state_dict(self) -> dict[str, Any]:
        """Plain Python for a checkpoint."""
        return {
            "thresholds": asdict(self.thresholds),
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
        except (KeyError, TypeError) as error:
            raise ValueError("`state` is not that of an OnsetTracker.") from error
        if not all(value is None or isinstance(value, int) for value in values):
            raise ValueError("`state` is not that of an OnsetTracker.")
        self.thresholds = thresholds
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
