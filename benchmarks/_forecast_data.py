"""From runs to tables: what each run turned out to be, and its features at every measurement before its onset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks._forecast_suite import TRAIN_ONLY, RunRecord, Setting
from benchmarks._forecast_truth import Truth, classes_of, is_censored, needed_steps, truth_of
from grok_callbacks.forecast import FEATURES, OnsetTracker, Thresholds
from grok_callbacks.forecast.features import Mode, extract
from grok_callbacks.history import History

Status = Literal["positive", "negative", "censored", "silent"]

#: Steps after memorising before which no forecast is made.
WAIT = 50

#: Hyper-parameters that the predictor without signals knows.
HYPER = ("has_decay", "weight_decay", "fraction", "fraction_squared", "size", "learning_rate")


@dataclass(frozen=True, eq=False)
class Case:
    """A run as the forecast meets it."""

    record: RunRecord
    truth: Truth
    status: Status
    #: Steps at which a forecast would be made: memorised is established, onset is not yet.
    steps: np.ndarray
    #: (steps, features) of each mode.
    features: dict[Mode, np.ndarray]

    @property
    def setting(self) -> Setting:
        """What was run."""
        return self.record.setting

    @property
    def is_positive(self) -> bool:
        """Whether it grokked."""
        return self.status == "positive"

    def index_at(self, step: float) -> int | None:
        """The last forecast at or before a step, if the run's onset was not before it."""
        truth, number = self.truth, int(np.searchsorted(self.steps, step, side="right")) - 1
        if number < 0 or (truth.onset is not None and truth.onset <= step) or self.record.last_step < step:
            return None
        return number


def history_for(record: RunRecord, mode: Mode, prefix: str = "grok") -> History:
    """What a user of that mode has: without validation data the representation is that of training samples."""
    if mode == "inputs":
        return record.history
    seen = f"{prefix}/representation/"
    kept = record.history.of(key for key in record.history if not key.startswith((seen, TRAIN_ONLY)))
    for name in ("entropy",):
        kept.merge({f"{seen}{name}": record.history[f"{TRAIN_ONLY}/representation/{name}"]})
    return kept


def feature_names(mode: Mode) -> list[str]:
    """The features of a mode, in their order."""
    return [name for name, feature in FEATURES.items() if mode == "inputs" or feature.mode == "train"]


def forecast_steps(record: RunRecord, truth: Truth) -> np.ndarray:
    """Measured steps at which memorising is established, ``WAIT`` steps past it, and no onset is established."""
    tracker = OnsetTracker(Thresholds(chance=1.0 / classes_of(record)))
    train, validation = record.history["grok/accuracy/train"], record.history["grok/accuracy/validation"]
    chosen = []
    for step, seen, unseen in zip(train.steps, train.values, validation.values, strict=True):
        tracker.update_train(step, seen)
        tracker.update_validation(step, unseen)
        memorized = tracker.memorized_step
        if tracker.onset_step is None and memorized is not None and step >= memorized + WAIT:
            chosen.append(step)
    # The first of the two measurements that establish the onset is no early warning either.
    return np.array([step for step in chosen if truth.onset is None or step < truth.onset], dtype=int)


def case_of(record: RunRecord, needed: dict[tuple[bool, float, float], float]) -> Case:
    """One run with its features."""
    truth = truth_of(record)
    status: Status = "positive" if truth.is_positive else "negative"
    if truth.memorized is None:
        status = "silent"
    elif is_censored(record, truth, needed):
        status = "censored"
    steps = forecast_steps(record, truth)
    tables: dict[Mode, np.ndarray] = {}
    for mode in ("train", "inputs"):
        history, names = history_for(record, mode), feature_names(mode)
        rows = [extract(history, int(step), truth.memorized or 0, mode) for step in steps]
        tables[mode] = np.array([[row[name] for name in names] for row in rows]).reshape(len(steps), len(names))
    return Case(record, truth, status, steps, tables)


def cases_of(records: Sequence[RunRecord]) -> list[Case]:
    """All runs with their features."""
    needed = needed_steps(records)
    return [case_of(record, needed) for record in records]


def hyper_parameters(setting: Setting) -> np.ndarray:
    """What the predictor without signals knows, as :data:`HYPER` names it."""
    decay = setting.weight_decay
    count = setting.size if setting.task != "xor" else 2**setting.size
    return np.array([decay > 0, decay, setting.fraction, setting.fraction**2, math.log(count), math.log(setting.lr)])
