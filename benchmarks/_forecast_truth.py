"""What each run turned out to be: events, outcome, and whether its end can be trusted."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grok_callbacks.forecast import OnsetTracker, Outcome, Thresholds

if TYPE_CHECKING:
    from benchmarks._forecast_suite import RunRecord, Setting

Kind = tuple[str, bool, float]

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


def horizons(records: Iterable[RunRecord], truths: Iterable[Truth]) -> dict[Kind, float]:
    """For each kind of run the step by which its positives must have generalised.

    Negatives must have been watched three times as long. The horizon is the one that leaves most runs of the kind in: a later
    one keeps slow positives, and an earlier one the negatives that were stopped too soon to be told from them. It depends on
    when runs generalised and how long they were, and on no signal.
    """
    positives: dict[Kind, list[int]] = defaultdict(list)
    negatives: dict[Kind, list[int]] = defaultdict(list)
    for record, truth in zip(records, truths, strict=True):
        if truth.is_positive and truth.grokked is not None:
            positives[kind_of(record.setting)].append(truth.grokked)
        elif truth.grokked is None and truth.memorized is not None:
            negatives[kind_of(record.setting)].append(record.last_step)

    def kept(kind: Kind, horizon: float) -> int:
        return sum(step <= horizon for step in positives[kind]) + sum(step >= PATIENCE * horizon for step in negatives[kind])

    return {kind: max(sorted(steps), key=lambda step: (kept(kind, step), step)) for kind, steps in positives.items()}


def kind_of(setting: Setting) -> Kind:
    """Runs that one waits for equally long: of one family, architecture and weight decay; none at all counts as weak."""
    weakest = 0.7 if setting.is_transformer else 0.3
    return setting.family, setting.is_transformer, max(setting.weight_decay, weakest)


def is_censored(record: RunRecord, truth: Truth, known: Mapping[Kind, float]) -> bool:
    """Whether the run's outcome cannot be trusted, or came too late for the negatives of its kind to be compared with it.

    Random labels have nothing to be generalised, so no wait is too short for them.
    """
    horizon = known.get(kind_of(record.setting), 0.0)
    if record.setting.task == "random":
        return False
    if truth.is_positive and truth.grokked is not None:
        return truth.grokked > horizon
    if truth.grokked is not None:
        return False
    return not truth.is_flat or record.last_step < PATIENCE * horizon
