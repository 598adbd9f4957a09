"""The one coordinator of all monitors on a model."""

from __future__ import annotations

import math
import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from grok_callbacks._distributed import PeerError, Ranks
from grok_callbacks._isolation import afresh, fingerprint, untouched
from grok_callbacks._packing import Packed, unpack
from grok_callbacks.history import History
from grok_callbacks.probe import SPLITS, Probe, Split
from grok_callbacks.schedule import Budget, Event, Schedule
from grok_callbacks.snapshot import Drawn, ModelView, Snapshot

__all__ = ["Measurable", "Recorder", "check_state"]


T = TypeVar("T")

# Where nothing is planned any more.
_MOST_IDLE_STEPS = 10**9


@runtime_checkable
class Measurable(Protocol):
    """What the Recorder needs of a monitor; :class:`grok_callbacks.callbacks.Monitor` is one."""

    prefix: str
    probe: Probe | None
    schedule: Schedule
    budget: Budget | None
    on_error: Literal["warn", "raise"]
    optional: bool

    @property
    def label(self) -> str:
        """What messages and states call it."""

    def bind(self, view: ModelView) -> None:
        """Choose among the model's names; raise a ``ValueError`` if a setting cannot work."""

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Values by key, without the prefix."""

    def attach(self, recorder: Recorder) -> Mapping[str, Any] | None:
        """Take note of the Recorder, after :meth:`bind`; returns what :meth:`Recorder.state_of` gave an earlier process."""

    def analyse(self, history: History, step: int) -> Mapping[str, float | Tensor]:
        """Values that follow from what has been measured up to ``step``, by key, without the prefix."""

    def state_dict(self) -> dict[str, Any]:
        """All that an interrupted run needs of it, with :meth:`Recorder.state_of` inside."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


class _Slot:
    """A monitor and where it stands."""

    def __init__(self, monitor: Measurable, budget: Budget | None) -> None:
        self.monitor = monitor
        self.budget = monitor.budget if monitor.budget is not None else budget
        self.probe = monitor.probe
        self.active = True
        self.next_step: int | None = None
        self.seen = -1
        self.last_measured = -1
        self.seconds = 0.0
        self.last_seconds = 0.0
        # What counts against the budget: all but the first measurement, which pays for what others find warm.
        self.charged = 0.0
        self.measurements = 0
        self.keys: list[str] = []
        self.needs_samples = False
        self.warned_not_finite = False
        self.packed = Packed()


class Recorder:
    """Decides what is due, takes one snapshot, has every due monitor measure it, and keeps the history.

    Inside a Trainer all monitors share one. In any other loop, make one and call :meth:`record` after every optimiser step; a
    step at which nothing is due costs a comparison.

    Monitors run on every rank in the same order. One whose measure raises is switched off on all ranks with one warning, and
    training goes on, unless it was made with ``on_error="raise"``.

    Args:
        model: Any module. It is observed and never changed.
        monitors: What to measure.
        probe: Samples for the monitors that have no probe of their own. Without one, the first probe that any of them has.
        budget: The share of the training time that the monitors without a budget of their own may take together, for instance
            ``0.02``. What would exceed it is skipped, so the measured steps depend on the clock; the first measurement always
            happens and is not charged. ``None``: no limit.

    Raises:
        ValueError: If a monitor's setting cannot work with this model.

    Example:
        >>> import torch
        >>> from grok_callbacks import NormMonitor, Recorder
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> recorder = Recorder(model, [NormMonitor()])
        >>> recorder.record(step=0)
        {'grok/norm': 1.4142135623730951, 'grok/norm/weight': 1.4142135623730951}
    """

    def __init__(
        self,
        model: nn.Module,
        monitors: Sequence[Measurable],
        probe: Probe | None = None,
        *,
        budget: float | Budget | None = None,
    ) -> None:
        self.model = model
        self.history = History()
        common = Budget.of(budget)
        self._slots = [_Slot(monitor, common) for monitor in monitors]
        shared = probe or next((monitor.probe for monitor in monitors if monitor.probe is not None), Probe())
        for slot in self._slots:
            slot.probe = slot.probe or shared
        self._views: dict[Probe, ModelView] = {}
        self._growing: set[Probe] = set()
        self._owners: dict[str, _Slot] = {}
        self._started = time.perf_counter()
        self._elapsed_before = 0.0
        self._spent = 0.0
        self._seen = -1
        self._bound = False
        self._next_step: float = -1

    @property
    def monitors(self) -> list[Measurable]:
        """The monitors in the order in which they measure."""
        return [slot.monitor for slot in self._slots]

    @property
    def probes(self) -> list[Probe]:
        """The distinct probes of the monitors."""
        return list(dict.fromkeys(slot.probe for slot in self._slots if slot.probe is not None))

    @property
    def last_step(self) -> int:
        """The last step at which a monitor measured, -1 before the first."""
        return max((slot.last_measured for slot in self._slots), default=-1)

    @property
    def seconds(self) -> dict[str, float]:
        """Time that each monitor has taken so far, by label."""
        return {slot.monitor.label: slot.seconds for slot in self._slots}

    @property
    def switched_off(self) -> list[str]:
        """Labels of the monitors that failed or that do not apply to this model."""
        return [slot.monitor.label for slot in self._slots if not slot.active]

    @property
    def is_bound(self) -> bool:
        """Whether the monitors have looked at the model."""
        return self._bound

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0, or there are no ranks."""
        return self._ranks.rank == 0

    def from_first(self, value: T) -> T:
        """Rank 0's value on all ranks; every rank must call it."""
        return self._ranks.from_first(value)

    def keys_of(self, monitor: Measurable) -> list[str]:
        """The keys that a monitor has logged so far, in their order."""
        return list(self._slot_of(monitor).keys)

    def _slot_of(self, monitor: Measurable) -> _Slot:
        return next(slot for slot in self._slots if slot.monitor is monitor)

    def bind(
        self,
        samples: Mapping[Probe, Mapping[Split, Drawn]] | None = None,
        *,
        start: int = 0,
        growing: Sequence[Probe] = (),
    ) -> None:
        """Let every monitor look at the model and choose its names. :meth:`record` does it if nobody has.

        Args:
            samples: Each probe's samples by split, or the error of drawing them, which concerns the monitors that need them.
                A probe that is left out is drawn from its own sources.
            start: The step of the model as it is, later than 0 in a resumed run.
            growing: Probes whose training samples are not complete yet, see :meth:`set_samples`.
        """
        self._growing = set(growing)
        view = ModelView(self.model, Probe())
        ranks = Ranks(view.device)
        unfit = [name for name, parameter in view.parameters.items() if parameter.is_complex()]
        if unfit and ranks.rank == 0:
            warnings.warn(f"No measure of weights or gradients takes in the complex parameters {unfit}.", stacklevel=2)
        for probe in self.probes:
            given = (samples or {}).get(probe)
            drawn = given if given is not None else {split: _sampled(probe, split) for split in SPLITS}
            self._views[probe] = ModelView(self.model, probe, drawn, ranks)
        left_out: dict[str, list[str]] = {}
        for slot in self._slots:
            why = self._bind(slot, start)
            if why is not None:
                left_out.setdefault(why, []).append(slot.monitor.label)
        _warn_of_what_is_left_out(left_out)
        self._bound = True
        self._plan()

    def set_samples(self, probe: Probe, split: Split, samples: Drawn, *, growing: bool = False) -> None:
        """Give a probe its samples after the fact, as for data that can only be iterated.

        Args:
            probe: One of :attr:`probes`.
            split: Which samples these are.
            samples: At most ``probe.size`` of them.
            growing: Whether more training samples will come. Monitors that look at data wait until none will, since a measure
                on few samples is not comparable to one on many.
        """
        self._views[probe].samples[split] = samples
        if split == "train":
            (self._growing.add if growing else self._growing.discard)(probe)

    def is_growing(self, probe: Probe) -> bool:
        """Whether more training samples will come, see :meth:`set_samples`."""
        return probe in self._growing

    def samples(self, probe: Probe) -> Mapping[Split, Drawn]:
        """A probe's samples by split."""
        return self._views[probe].samples

    def _bind(self, slot: _Slot, start: int) -> str | None:
        """Let a monitor choose its names; returns why it is left out, if it is."""
        error = self._let_look(slot, start)
        why = None if error is None else self._leave_out(slot, error)
        try:
            state = slot.monitor.attach(self)
            if state is not None:
                self._restore(slot, state)
        except ValueError as refused:
            if not slot.monitor.optional:
                raise
            warnings.warn(f"{refused} {slot.monitor.label} starts afresh.", stacklevel=2)
            # A part of the state may have been taken up.
            self._let_look(slot, start)
        # What has never been measured is due at once, also in a run that was resumed without its state.
        slot.next_step = slot.monitor.schedule.next_step(slot.seen) if slot.measurements else start
        return why

    def _let_look(self, slot: _Slot, start: int) -> Exception | None:
        """Let a monitor look at the model; returns what it raised, or that another rank's raised."""
        assert slot.probe is not None
        view = self._views[slot.probe]
        view.asked_for_samples = False
        try:
            with untouched(self.model, seed=start):
                slot.monitor.bind(view)
            slot.needs_samples = view.asked_for_samples
            view.ranks.agree()
        except PeerError as error:
            return error
        except Exception as error:
            # As in a measurement: the other ranks wait in the agreement before their next collective.
            view.ranks.agree(well=False)
            return error
        return None

    def _leave_out(self, slot: _Slot, error: Exception) -> str:
        inapplicable = isinstance(error, ValueError)
        if not slot.monitor.optional or (slot.monitor.on_error == "raise" and not inapplicable):
            raise error
        slot.active = False
        if not inapplicable:
            return f"since looking at the model failed: {type(error).__name__}: {error}"
        # What an argument of the Probe can mend is no fault of the model's.
        can_be_mended = "of the Probe" in str(error)
        reason = "since the probe does not fit this data and model" if can_be_mended else "as not applicable to this model"
        return f"{reason}: {error}"

    def _plan(self) -> None:
        steps = [slot.next_step for slot in self._slots if slot.active and slot.next_step is not None]
        self._next_step = min(steps, default=math.inf)

    def record(
        self, step: int, *, event: Event | None = None, epoch: int = 0, metrics: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Measure what is due.

        Args:
            step: Optimiser steps taken so far: 0 before training, ``s`` after the ``s``-th.
            event: The end of an epoch or of a validation run, if that is the occasion.
            epoch: The current training epoch, from 0.
            metrics: Values known from elsewhere, such as accuracies, to stand in the history beside the measurements.

        Returns:
            What was measured, by full key; empty if nothing was due.
        """
        if type(step) is not int or step < 0:
            step = _checked_step(step)
        self._seen = step
        # Few schedules heed an event, and epochs can be many.
        heeding = [slot for slot in self._slots if slot.monitor.schedule.at(event, epoch)] if event is not None else []
        if not heeding and step < self._next_step and self._bound and not metrics:
            return {}
        if not self._bound:
            self.bind(start=step)
        if metrics:
            self.history.add(step, metrics)
        may_be_due = heeding or step >= self._next_step
        due = [slot for slot in self._slots if self._is_due(slot, step, heeding)] if may_be_due else []
        due = self._within_budget(due) if due else due
        values = self._measure(due, step) if due else {}
        if due or metrics:
            values |= self._analyse(step)
        if step >= self._next_step:
            for slot in self._slots:
                if slot.next_step is not None and step >= slot.next_step:
                    slot.next_step = slot.monitor.schedule.next_step(step)
            self._plan()
        return values

    def idle_steps(self, step: int) -> int:
        """How many consecutive steps after ``step`` pass before one is planned; :meth:`record` may be left out for them.

        An event or metrics from elsewhere may come earlier. :meth:`catch_up` makes good for what was left out.
        """
        return int(min(max(self._next_step - step - 1, 0), _MOST_IDLE_STEPS)) if self._bound else 0

    def catch_up(self, step: int) -> None:
        """Know of all steps up to ``step`` that :meth:`record` was left out for; what is planned waits for it."""
        if self._bound:
            self._seen = max(self._seen, int(min(step, self._next_step - 1)))

    def _is_due(self, slot: _Slot, step: int, heeding: Sequence[_Slot]) -> bool:
        is_time = slot.next_step is not None and step >= slot.next_step
        if not is_time and slot not in heeding:
            return False
        if slot.needs_samples and slot.probe in self._growing:
            return False
        return slot.active and slot.last_measured != step

    def _within_budget(self, due: list[_Slot]) -> list[_Slot]:
        if all(slot.budget is None for slot in due):
            return due
        elapsed = self._elapsed()
        charged: dict[Budget, float] = {}
        for slot in self._slots:
            if slot.budget is not None:
                charged[slot.budget] = charged.get(slot.budget, 0.0) + slot.charged
        allowed = []
        for slot in due:
            if slot.budget is None or slot.measurements == 0:
                allowed.append(True)
                continue
            expected = charged[slot.budget] + slot.last_seconds
            allowed.append(expected <= slot.budget.share * elapsed)
            if allowed[-1]:
                charged[slot.budget] = expected
        # Clocks differ, so one rank decides for all.
        allowed = self._ranks.from_first(allowed)
        return [slot for slot, chosen in zip(due, allowed, strict=True) if chosen]

    def _elapsed(self) -> float:
        """Seconds of training so far, earlier processes of a resumed run included, time spent measuring excluded."""
        return self._elapsed_before + time.perf_counter() - self._started - self._spent

    @property
    def _ranks(self) -> Ranks:
        return next(iter(self._views.values())).ranks if self._views else Ranks()

    def _measure(self, due: Sequence[_Slot], step: int) -> dict[str, float]:
        snapshots = {probe: Snapshot(view, step) for probe, view in self._views.items()}
        values: dict[str, float] = {}
        # Once around all of them: keeping and giving back all that there is takes longer than a small measure.
        with untouched(self.model, seed=step):
            for slot in due:
                assert slot.probe is not None
                values |= self._keep(slot, step, self._measure_one(slot, snapshots[slot.probe]))
        return values

    def _measure_one(self, slot: _Slot, snapshot: Snapshot) -> dict[str, float]:
        start = time.perf_counter()
        # Version counters miss what is written through ``.data`` or numpy, so the first time every bit is compared.
        thorough = slot.measurements == 0
        before = fingerprint(self.model, thorough=thorough)
        with afresh(self.model, seed=snapshot.step):
            measured = self._guarded(slot, partial(slot.monitor.measure, snapshot))
        if fingerprint(self.model, thorough=thorough) != before:
            raise RuntimeError(f"{slot.monitor.label} wrote into the model's weights or buffers; a monitor must not.")
        slot.last_seconds = time.perf_counter() - start
        slot.seconds += slot.last_seconds
        slot.charged += slot.last_seconds if slot.measurements else 0.0
        self._spent += slot.last_seconds
        slot.last_measured = snapshot.step
        slot.measurements += 1
        return measured

    def _analyse(self, step: int) -> dict[str, float]:
        """What follows from the history, which is the same on all ranks; so they talk once, not for every monitor."""
        found: dict[int, dict[str, float]] = {}
        errors: dict[int, Exception] = {}
        for number, slot in enumerate(self._slots):
            if slot.active:
                try:
                    analysed = slot.monitor.analyse(self.history, step)
                    if analysed != {}:
                        found[number] = _floats(analysed)
                except Exception as error:
                    errors[number] = error
        for number in sorted({number for numbers in self._ranks.gather(list(errors)) for number in numbers}):
            found.pop(number, None)
            self._switch_off(self._slots[number], errors.get(number, PeerError("The analysis failed on another rank.")))
        values: dict[str, float] = {}
        for number, analysed in self._ranks.from_first(found).items():
            values |= self._keep(self._slots[number], step, analysed)
        return values

    def _guarded(self, slot: _Slot, measure: Callable[[], Mapping[str, float | Tensor]]) -> dict[str, float]:
        """Call ``measure``; on any failure switch the monitor off, on all ranks alike. Rank 0's values hold."""
        try:
            values = _floats(measure())
        except PeerError as error:
            self._switch_off(slot, error)
            return {}
        except Exception as error:
            # Tell the other ranks, which wait in the agreement before their next collective.
            self._ranks.agree(well=False)
            self._switch_off(slot, error)
            return {}
        try:
            self._ranks.agree()
            # What follows from a value (an event, an early stop) must be the same everywhere, to the last bit.
            return self._ranks.from_first(values)
        except PeerError as error:
            self._switch_off(slot, error)
            return {}

    def _switch_off(self, slot: _Slot, error: Exception) -> None:
        if slot.monitor.on_error == "raise":
            raise error
        slot.active = False
        warnings.warn(
            f"{slot.monitor.label} failed and is switched off for the rest of this run: {type(error).__name__}: {error}. "
            'Training goes on; make it with on_error="raise" to see where.',
            stacklevel=2,
        )

    def _keep(self, slot: _Slot, step: int, measured: Mapping[str, float]) -> dict[str, float]:
        values = {f"{slot.monitor.prefix}/{key}": value for key, value in measured.items()}
        for key in values:
            owner = self._owners.get(key, slot)
            if owner is not slot:
                error = ValueError(
                    f"{slot.monitor.label} and {owner.monitor.label} both log {key!r}; give one of them another `prefix`."
                )
                if slot.measurements == 1:
                    raise error
                self._switch_off(slot, error)
                return {}
        for key, value in values.items():
            if key not in self._owners:
                self._owners[key] = slot
                slot.keys.append(key)
            if not math.isfinite(value) and not slot.warned_not_finite:
                slot.warned_not_finite = True
                if self.is_first_rank:
                    warnings.warn(f"{slot.monitor.label}: {key} is {value} at step {step}; said once.", stacklevel=2)
        self.history.add(step, values)
        return values

    @property
    def latest(self) -> dict[str, float]:
        """The last value of every key that a monitor has logged."""
        return {key: self.history[key].values[-1] for slot in self._slots for key in slot.keys}

    def state_dict(self) -> dict[str, Any]:
        """The states of all monitors by label, tensors and plain Python, for a checkpoint of a loop of your own.

        Inside a Trainer the monitors' states are in its checkpoints.
        """
        return {slot.monitor.label: slot.monitor.state_dict() for slot in self._slots}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. Call it before the first :meth:`record`.

        Raises:
            ValueError: If ``state`` holds anything else.
        """
        if self._bound:
            raise ValueError("Load the state before the first measurement.")
        if not isinstance(state, Mapping):
            raise ValueError(f"`state` is a {type(state).__name__}, not one that a Recorder made.")
        for slot in self._slots:
            if slot.monitor.label in state:
                slot.monitor.load_state_dict(state[slot.monitor.label])

    def state_of(self, monitor: Measurable) -> dict[str, Any]:
        """What a monitor has measured and where it stands, for its state."""
        slot = self._slot_of(monitor)
        foreign = [key for key in self.history if key not in self._owners]
        return {
            "history": self._packed_history(slot),
            # What came from elsewhere is nobody's; the first monitor keeps it.
            "metrics": self.history.of(foreign if slot is self._slots[0] else ()).state_dict(),
            "measurements": slot.measurements,
            "last_measured": slot.last_measured,
            "seen": self._seen,
            "seconds": slot.seconds,
            "last_seconds": slot.last_seconds,
            "charged": slot.charged,
            "elapsed": self._elapsed(),
            "active": slot.active,
        }

    def _packed_history(self, slot: _Slot) -> Tensor:
        history = self.history.of(slot.keys)
        return slot.packed.of(tuple((key, series.changes) for key, series in history.items()), history.state_dict)

    def _restore(self, slot: _Slot, state: Mapping[str, Any]) -> None:
        history, metrics = History.from_state_dict(unpack(state["history"])), History.from_state_dict(state["metrics"])
        self.history.merge(history)
        self.history.merge(metrics)
        slot.keys = list(history)
        self._owners.update(dict.fromkeys(slot.keys, slot))
        slot.measurements, slot.last_measured, slot.seen = state["measurements"], state["last_measured"], state["seen"]
        slot.seconds, slot.last_seconds, slot.charged = state["seconds"], state["last_seconds"], state["charged"]
        self._elapsed_before = max(self._elapsed_before, state["elapsed"])
        slot.active = slot.active and state["active"]


def _warn_of_what_is_left_out(labels: Mapping[str, Sequence[str]]) -> None:
    """One warning for each reason, however many monitors have it."""
    for why, names in labels.items():
        warnings.warn(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} left out, {why}", stacklevel=4)


def _floats(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}


def _sampled(probe: Probe, split: Split) -> Drawn:
    try:
        return probe.sample(split)
    except ValueError as error:
        return error


def _checked_step(step: int) -> int:
    try:
        step = operator.index(step)
    except TypeError:
        raise ValueError(f"`step` must be a whole number, got {step!r}.") from None
    if step < 0:
        raise ValueError(f"`step` must not be negative, got {step}.")
    return step


_STATE_TYPES: dict[str, type | tuple[type, ...]] = {
    "history": Tensor, "metrics": Mapping, "measurements": int, "last_measured": int, "seen": int, "seconds": (int, float),
    "last_seconds": (int, float), "charged": (int, float), "elapsed": (int, float), "active": bool,
}  # fmt: skip


def check_state(label: str, state: Any) -> None:
    """Refuse what :meth:`Recorder.state_of` cannot have made.

    Raises:
        ValueError: If something is missing or of another type.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"The state of {label} is a {type(state).__name__}, not one that a Recorder made.")
    wrong = [key for key, kind in _STATE_TYPES.items() if not isinstance(state.get(key), kind)]
    if wrong:
        raise ValueError(f"The state of {label} is not one that a Recorder made: {wrong} are missing or of another type.")
