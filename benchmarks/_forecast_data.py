"""From runs to tables: what each run turned out to be, and its features at every measurement before its onset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks._forecast_suite import FAMILIES, TRAIN_ONLY, RunRecord, Setting
from benchmarks._forecast_truth import Kind, Truth, classes_of, horizons, is_censored, truth_of
from grok_callbacks.forecast import FEATURES, OnsetTracker, Thresholds
from grok_callbacks.forecast.features import MODES, Mode, extract
from grok_callbacks.history import History

Status = Literal["positive", "negative", "censored", "silent"]

#: Steps after memorising before which no alarm is given.
WAIT = 50

#: Hyper-parameters that the predictor without signals knows.
HYPER = ("has_decay", "weight_decay", "fraction", "fraction_squared", "size", "learning_rate")


@dataclass(frozen=True, eq=False)
class Case:
    """A run as the forecast meets it."""

    record: RunRecord
    truth: Truth
    status: Status
    #: Measured steps at which memorising is established and the onset has not come.
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

    @property
    def is_due(self) -> np.ndarray:
        """Of which steps an alarm may be given: not so soon after memorising that there is nothing to go by."""
        return self.steps >= (self.truth.memorized or 0) + WAIT

    @property
    def judged(self) -> bool:
        """Whether the run counts: its end can be trusted, and there is a step at which it could give an alarm."""
        return self.status in ("positive", "negative") and bool(self.is_due.any())

    def index_at(self, step: float) -> int | None:
        """The last forecast at or before a step, if the run's onset was not before it."""
        truth, number = self.truth, int(np.searchsorted(self.steps, step, side="right")) - 1
        if number < 0 or (truth.onset is not None and truth.onset <= step) or self.record.last_step < step:
            return None
        return number


_TABLES: tuple[tuple[Mode, Mode | None], ...] = (("train", None), ("labels", "inputs"))


def history_for(record: RunRecord, mode: Mode, prefix: str = "grok") -> History:
    """What a user of that mode has: without validation data the representation is that of training samples."""
    if mode != "train":
        return record.history
    seen = f"{prefix}/representation/"
    kept = record.history.of(key for key in record.history if not key.startswith((seen, TRAIN_ONLY)))
    for name in ("entropy",):
        kept.merge({f"{seen}{name}": record.history[f"{TRAIN_ONLY}/representation/{name}"]})
    return kept


def feature_names(mode: Mode) -> list[str]:
    """The features of a mode, in their order."""
    return [name for name, feature in FEATURES.items() if MODES.index(feature.mode) <= MODES.index(mode)]


def forecast_steps(record: RunRecord, truth: Truth) -> np.ndarray:
    """Measured steps at which memorising is established and no onset has come."""
    tracker = OnsetTracker(Thresholds(chance=1.0 / classes_of(record)))
    train, validation = record.history["grok/accuracy/train"], record.history["grok/accuracy/validation"]
    chosen = []
    for step, seen, unseen in zip(train.steps, train.values, validation.values, strict=True):
        tracker.update_train(step, seen)
        tracker.update_validation(step, unseen)
        if tracker.onset_step is None and tracker.memorized_step is not None:
            chosen.append(step)
    # The first of the two measurements that establish the onset is no early warning either.
    return np.array([step for step in chosen if truth.onset is None or step < truth.onset], dtype=int)


def case_of(record: RunRecord, truth: Truth, known: Mapping[Kind, float]) -> Case:
    """One run with its features."""
    status: Status = "positive" if truth.is_positive else "negative"
    if truth.memorized is None:
        status = "silent"
    elif is_censored(record, truth, known):
        status = "censored"
    steps = forecast_steps(record, truth)
    return Case(record, truth, status, steps, tables_of(record, truth, steps))


def tables_of(record: RunRecord, truth: Truth, steps: np.ndarray) -> dict[Mode, np.ndarray]:
    """(steps, features) of each mode."""
    tables: dict[Mode, np.ndarray] = {}
    # What labels add stands last, so one look at the history serves both modes that see validation inputs.
    for mode, smaller in _TABLES:
        history, names = history_for(record, mode), feature_names(mode)
        rows = [extract(history, int(step), truth.memorized or 0, mode) for step in steps]
        tables[mode] = np.array([[row[name] for name in names] for row in rows]).reshape(len(steps), len(names))
        if smaller is not None:
            tables[smaller] = tables[mode][:, : len(feature_names(smaller))]
    return tables


def cases_of(records: Sequence[RunRecord]) -> list[Case]:
    """All runs with their features."""
    truths = [truth_of(record) for record in records]
    known = horizons(records, truths)
    return [case_of(record, truth, known) for record, truth in zip(records, truths, strict=True)]


def hyper_parameters(setting: Setting) -> np.ndarray:
    """What the predictor without signals knows, as :data:`HYPER` names it."""
    decay = setting.weight_decay
    count = setting.size if setting.task != "xor" else 2**setting.size
    return np.array([decay > 0, decay, setting.fraction, setting.fraction**2, math.log(count), math.log(setting.lr)])


def all_settings(setting: Setting) -> np.ndarray:
    """Hyper-parameters, the initial scale, and which family and architecture it is."""
    architectures = [setting.architecture == name for name in ("onehot", "embedding", "transformer")]
    families = [setting.family == name for name in sorted(set(FAMILIES.values()))]
    return np.concatenate([hyper_parameters(setting), [setting.init_scale], architectures, families]).astype(float)
