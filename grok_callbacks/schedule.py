"""When to measure.

A schedule is a pure function of the step, so a resumed run, a rerun and every rank agree without talking. A *step* is a
number of optimiser steps taken: step 0 is the network before training, step ``s`` the weights after ``s`` steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

__all__ = ["AtValidation", "Budget", "Event", "EveryEpoch", "EverySteps", "LogSpaced", "Schedule"]

#: A moment other than an optimiser step at which one can measure: the end of a training epoch, or of a validation run.
Event = Literal["epoch", "validation"]


class Budget:
    """The share of the training time that monitors may take; those that are given the same object share it.

    Each monitor's first measurement always happens and is not charged, since it warms up what later ones find warm. Nor
    are figures, and writing to loggers.

    Args:
        share: Seconds of measuring per second of training, for instance ``0.02``.

    Raises:
        ValueError: If ``share`` is not positive.

    Example:
        >>> from grok_callbacks import NormMonitor, WeightEntropyMonitor
        >>> budget = Budget(0.02)
        >>> together = [NormMonitor(budget=budget), WeightEntropyMonitor(budget=budget)]
        >>> budget
        Budget(0.02)
    """

    def __init__(self, share: float) -> None:
        if isinstance(share, bool) or not isinstance(share, int | float) or not share > 0:
            raise ValueError(f"`budget` must be a positive share of the training time, got {share!r}.")
        self.share = float(share)

    def __repr__(self) -> str:
        return f"Budget({self.share!r})"

    @classmethod
    def of(cls, budget: float | Budget | None) -> Budget | None:
        """A share as a budget of its own."""
        return budget if budget is None or isinstance(budget, Budget) else cls(budget)


class Schedule(ABC):
    """When a monitor measures. Subclass it and define :meth:`next_step` for a rule of your own."""

    @abstractmethod
    def next_step(self, after: int) -> int | None:
        """The first step later than ``after`` to measure at, ``None`` where there is none.

        Args:
            after: A number of optimiser steps; ``-1`` asks for the first measurement of a run.
        """

    def at(self, event: Event, epoch: int) -> bool:
        """Whether to measure at the end of an epoch or of a validation run, too.

        Args:
            event: What has just ended.
            epoch: The number of the current training epoch, from 0.
        """
        del event, epoch
        return False


@dataclass(frozen=True)
class EverySteps(Schedule):
    """At step 0 and every ``n`` optimiser steps.

    Args:
        n: Steps between measurements, at least 1.

    Raises:
        ValueError: If ``n`` is not a whole number of at least 1.

    Example:
        >>> EverySteps(4).next_step(-1), EverySteps(4).next_step(0), EverySteps(4).next_step(5)
        (0, 4, 8)
    """

    n: int

    def __post_init__(self) -> None:
        _require_positive("n", self.n)

    def next_step(self, after: int) -> int:
        """The next multiple of ``n``."""
        return (after // self.n + 1) * self.n


@dataclass(frozen=True)
class LogSpaced(Schedule):
    r"""At step 0 and at the steps nearest to :math:`10^{k / \text{per\_decade}}`: grokking lives on a logarithmic axis.

    A run of ``s`` steps has at most ``1 + per_decade * log10(s)`` measurements; the first decades have fewer steps than that.

    Args:
        per_decade: Measurements in each factor of ten, at least 1. With the default two are 12% apart.

    Raises:
        ValueError: If ``per_decade`` is not a whole number of at least 1.

    Example:
        >>> schedule, steps = LogSpaced(4), [-1]
        >>> while steps[-1] < 100:
        ...     steps.append(schedule.next_step(steps[-1]))
        >>> steps[1:]
        [0, 1, 2, 3, 6, 10, 18, 32, 56, 100]
    """

    per_decade: int = 20

    def __post_init__(self) -> None:
        _require_positive("per_decade", self.per_decade)

    def next_step(self, after: int) -> int:
        """The next grid point."""
        if after < 1:
            return after + 1
        # Start one point early: the logarithm may be off by a rounding error. Early points may round to one step.
        k = max(math.floor(self.per_decade * math.log10(after)) - 1, 0)
        while (point := round(10 ** (k / self.per_decade))) <= after:
            k += 1
        return point


@dataclass(frozen=True)
class EveryEpoch(Schedule):
    """At step 0 and at the end of every ``n``-th training epoch.

    Args:
        n: Epochs between measurements, at least 1.

    Raises:
        ValueError: If ``n`` is not a whole number of at least 1.
    """

    n: int = 1

    def __post_init__(self) -> None:
        _require_positive("n", self.n)

    def next_step(self, after: int) -> int | None:
        """Step 0 only."""
        return 0 if after < 0 else None

    def at(self, event: Event, epoch: int) -> bool:
        """Whether an epoch of the right number has ended."""
        return event == "epoch" and (epoch + 1) % self.n == 0


@dataclass(frozen=True)
class AtValidation(Schedule):
    """At step 0 and at the end of every validation run; sanity checks do not count."""

    def next_step(self, after: int) -> int | None:
        """Step 0 only."""
        return 0 if after < 0 else None

    def at(self, event: Event, epoch: int) -> bool:
        """Whether a validation run has ended."""
        del epoch
        return event == "validation"


def _require_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
