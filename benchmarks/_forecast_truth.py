"""What each run turned out to be: events, outcome, and whether its end can be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grok_callbacks.forecast import OnsetTracker, Outcome, Thresholds

if TYPE_CHECKING:
    from benchmarks._forecast_suite import RunRecord

#: A negative is stopped no sooner than so many times the step at which the slowest positive of its kind generalised.
PATIENCE = 3.0

#: How much validation accuracy may still rise in the last half of a negative.
FLAT = 0.05


@dataclass(frozen=True)
class Truth:
    """Events of one run by its whole history, in optimiser steps."""

    memorized: int | None
    onset: int | None
    grokked: int | None
    outcome: Outcome
    is_flat: bool

    @property
    def is_positive(self) -> bool:
        """Whether the run grokked."""
        return self.outcome == "grokking"


def truth_of(record: RunRecord, num_classes: int | None = None) -> Truth:
    """Feed the accuracies of the whole run to the tracker that the detector uses."""
    history = record.history
    tracker = OnsetTracker(Thresholds(chance=1.0 / (num_classes or classes_of(record))))
    train, validation = history["grok/accuracy/train"], history["grok/accuracy/validation"]
    for step, value in zip(train.steps, train.values, strict=True):
        tracker.update_train(step, value)
    for step, value in zip(validation.steps, validation.values, strict=True):
        tracker.update_validation(step, value)
    return Truth(
        tracker.memorized_step,
        tracker.onset_step,
        tracker.grokked_step,
        tracker.outcome,
        is_flat(validation.steps, validation.values),
    )


def classes_of(record: RunRecord) -> int:
    """Number of answers, which sets the accuracy of guessing."""
    setting = record.setting
    orders = {
        "permutation": 24,
        "dihedral": 2 * setting.size,
        "frobenius": 3 * setting.size,
        "xor": 2**setting.size,
        "digits": 10,
    }
    return orders.get(setting.task, setting.size)


def is_flat(steps: Sequence[int], accuracies: Sequence[float]) -> bool:
    """Whether accuracy had stopped rising: its median over the last fifth of the run is hardly above that about half-way."""

    def median_between(low: float, high: float) -> float:
        chosen = [a for step, a in zip(steps, accuracies, strict=True) if low <= step / steps[-1] <= high]
        return statistics.median(chosen) if chosen else accuracies[-1]

    return median_between(0.8, 1.0) - median_between(0.4, 0.6) <= FLAT


def needed_steps(records: Iterable[RunRecord]) -> dict[tuple[bool, float, float], float]:
    """How long a negative of each kind must be watched: three times the slowest positive.

    A kind without positives, as without weight decay, takes the longest of its architecture and learning rate.
    """
    slowest: dict[tuple[bool, float, float], float] = {}
    kinds = set()
    for record in records:
        kind = record.setting.kind
        kinds.add(kind)
        truth = truth_of(record)
        if truth.is_positive and truth.grokked is not None:
            slowest[kind] = max(slowest.get(kind, 0.0), PATIENCE * truth.grokked)
    for kind in kinds - set(slowest):
        similar = [steps for other, steps in slowest.items() if other[:2] == kind[:2]]
        if similar:
            slowest[kind] = max(similar)
    return slowest


def is_censored(record: RunRecord, truth: Truth, needed: dict[tuple[bool, float, float], float]) -> bool:
    """Whether a run without late generalisation was watched too briefly to be called a negative."""
    if truth.grokked is not None:
        return False
    return not truth.is_flat or record.last_step < needed.get(record.setting.kind, 0.0)
