"""The base of all monitors: a callback whose ``measure`` is all that differs."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torchmetrics import Metric, MetricCollection

from grok_callbacks._compat import Callback, MisconfigurationException
from grok_callbacks._packing import unpack
from grok_callbacks.callbacks._session import Session, is_plain
from grok_callbacks.callbacks._state import MetricState, checksum, restore_metric
from grok_callbacks.history import History
from grok_callbacks.measures import Question
from grok_callbacks.probe import Batch, Probe, Split
from grok_callbacks.recorder import Recorder, check_state
from grok_callbacks.schedule import Budget, LogSpaced, Schedule
from grok_callbacks.selection import check_patterns
from grok_callbacks.snapshot import ModelView, Snapshot

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from matplotlib.figure import Figure

__all__ = ["Monitor"]

Preset = Literal["economy", "standard", "full"]

MetricT = TypeVar("MetricT", bound=Metric)

_log = logging.getLogger("grok_callbacks")

_MOST_BYTES_OF_SAMPLES = 16 * 2**20


class _MonitorType(ABCMeta):
    """Labels each monitor with the settings that it is made with, which tell two monitors of one class apart.

    A ``__new__`` could do it as well, but would hide the settings of ``__init__`` from a LightningCLI.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__call__(*args, **kwargs)
        settings = _given_settings(cls, args, kwargs)
        _check_globs(cls, settings)
        if settings:
            self._label += f"({', '.join(f'{key}={_describe(value)}' for key, value in settings.items())})"
        return self

    @property
    def __signature__(cls) -> inspect.Signature:
        signature = inspect.signature(cast("Any", cls).__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def _given_settings(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that differ from their defaults, by name."""
    signature = inspect.signature(cast("Any", cls).__init__)
    given: dict[str, Any] = {}
    for name, value in list(signature.bind(None, *args, **kwargs).arguments.items())[1:]:
        is_rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given |= value if is_rest else {name: value}
    initialisers = [
        inspect.signature(vars(base)["__init__"]) for base in reversed(cls.__mro__[:-1]) if "__init__" in vars(base)
    ]
    defaults = {name: parameter.default for one in initialisers for name, parameter in one.parameters.items()}
    return {name: value for name, value in given.items() if not _is_same(value, defaults.get(name, inspect.Parameter.empty))}


def _check_globs(cls: type, settings: Mapping[str, Any]) -> None:
    """Refuse what is no glob at once, for every monitor: a configuration's mistakes should not wait for the model."""
    parameters = inspect.signature(cast("Any", cls).__init__).parameters
    for name, value in settings.items():
        if name in parameters and "str | Sequence[str]" in str(parameters[name].annotation):
            try:
                check_patterns(value, name)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from error


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (bool, int, float, str)) and value == default)


class Monitor(Callback, metaclass=_MonitorType):
    """Measures something of the model while it trains, and logs it.

    A monitor of your own defines :meth:`measure`, and :meth:`bind` if it must choose layers or parameters first. All monitors
    of a Trainer share one :class:`~grok_callbacks.Recorder`, hence one probe forward pass and one spectrum per matrix. They
    observe and never act: weights, buffers, gradients, modes and random-number states stay as they are, bit for bit.

    Every measurement goes to every logger of the Trainer at its own step, and to ``trainer.callback_metrics``, where
    ``ModelCheckpoint`` and ``EarlyStopping`` find it. The step of a measurement is the number of optimiser steps taken: 0 is
    the model before training, ``s`` the weights after ``s`` steps. (Lightning logs its own training curves one step earlier.)

    Args:
        probe: The samples to look at; by default one probe of 256 training and 256 validation samples (fewer where batches
            are smaller than 16, see :class:`~grok_callbacks.Probe`), shared by all monitors that have none of their own.
        schedule: When to measure; by default at 20 log-spaced steps a decade, see :class:`~grok_callbacks.LogSpaced`.
        prefix: Goes before each logged key. Two monitors of one class in one Trainer need different ones.
        budget: The largest share of the training time that this monitor may take, such as ``0.01``, or a
            :class:`~grok_callbacks.Budget` that several share. A measurement that would exceed it is skipped, so the measured
            steps then depend on the clock. ``None``: no limit.
        on_error: What to do if ``measure`` raises: ``"warn"`` switches the monitor off with one warning and training goes on;
            ``"raise"`` stops the run.

    Raises:
        MisconfigurationException: At the start of fit, if a setting cannot work with the model or the data.

    Example:
        >>> from grok_callbacks import Monitor, Recorder
        >>> class LargestWeight(Monitor):
        ...     def measure(self, snapshot):
        ...         return {f"largest/{name}": weight.abs().max() for name, weight in snapshot.weights.items()}
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> _ = torch.nn.init.constant_(model.weight, -2.0), torch.nn.init.zeros_(model.bias)
        >>> Recorder(model, [LargestWeight()]).record(step=0)
        {'grok/largest/weight': 2.0, 'grok/largest/bias': 0.0}
    """

    #: The question under which TensorBoard's custom scalars show this monitor's curves.
    question: ClassVar[Question] = "Is it compressing?"

    #: The smallest preset that this monitor belongs to; ``None`` for monitors that are only used by name.
    preset: ClassVar[Preset | None] = None

    metric: Metric | MetricCollection

    def __init__(
        self,
        *,
        probe: Probe | None = None,
        schedule: Schedule | None = None,
        prefix: str = "grok",
        budget: float | Budget | None = None,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        if not isinstance(prefix, str) or not prefix or prefix.endswith("/"):
            raise MisconfigurationException(f"`prefix` must be a name without a slash at its end, got {prefix!r}.")
        if on_error not in ("warn", "raise"):
            raise MisconfigurationException(f"`on_error` must be 'warn' or 'raise', got {on_error!r}.")
        if probe is not None and not isinstance(probe, Probe):
            raise MisconfigurationException(f"`probe` must be a grok_callbacks.Probe, got a {type(probe).__name__}.")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise MisconfigurationException(f"`schedule` must be a grok_callbacks.Schedule, got a {type(schedule).__name__}.")
        self.probe = probe
        self.schedule: Schedule = schedule if schedule is not None else LogSpaced()
        self.prefix = prefix
        try:
            self.budget = Budget.of(budget)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.on_error: Literal["warn", "raise"] = on_error
        #: Whether it may be left out, with a warning, where it does not apply; presets set it.
        self.optional = False
        self.metric = MetricCollection({}, compute_groups=False)
        self.session: Session | None = None
        #: Number of the probe and split of samples that a resumed run could not draw again; of the first monitor, for all.
        self.iterated: set[tuple[int, Split]] = set()
        self._recorder: Recorder | None = None
        self._stand_ins: tuple[str, ...] = ()
        self._restored: dict[str, Any] | None = None
        self._metric_state = MetricState()
        self._warned_of_state = False
        self._told_of_samples = False
        self._label = type(self).__qualname__

    # What a monitor of one's own defines.

    def bind(self, view: ModelView) -> None:
        """Choose among the model's names, once, before the first measurement.

        Args:
            view: The model's parameters and sites.

        Raises:
            ValueError: If a setting cannot work with this model; the message names the argument to change.
        """

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Measure the model at one step.

        Args:
            snapshot: The model, read-only.

        Returns:
            Values by key, without the prefix.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `measure`.")

    def analyse(self, history: History, step: int) -> Mapping[str, float | Tensor]:
        """Conclude something from all that has been measured up to ``step``, after every monitor has measured.

        The history is the same on all ranks, so no rank needs to ask another.

        Args:
            history: Every series so far.
            step: The current step.

        Returns:
            Values by key, without the prefix; none by default.
        """
        del history, step
        return {}

    def figures(self) -> Mapping[str, Figure]:
        """Figures of the last measurement by key, without the prefix; asked for at steps 100, 1,000 ... and at the end."""
        return {}

    def texts(self) -> Mapping[str, str]:
        """Texts in Markdown by key, without the prefix; TensorBoard gets each whenever it has changed."""
        return {}

    def standing(self) -> Mapping[str, float]:
        """What was logged once and holds ever since, by key, without the prefix.

        A resumed run logs it again where it begins a log of its own.
        """
        return {}

    def status(self) -> Mapping[str, str]:
        """What the progress bar shows beside the user's metrics, a word or two by name."""
        return {}

    # What monitors have in common.

    def metrics_by_name(self, make: type[MetricT], names: Iterable[str], **settings: Any) -> dict[str, MetricT]:
        """Make :attr:`metric` a collection with one metric for each name, and return them by name.

        Ranks hold the same probe and, unless a monitor splits its work, the same values, so nothing is summed over them.
        """
        metrics = {name: make(sync_on_compute=False, **settings) for name in names}
        # A module's children cannot have dots in their names.
        members = {f"of:{name.replace('.', ':')}": metric for name, metric in metrics.items()}
        self.metric = MetricCollection(members, compute_groups=False)  # type: ignore[arg-type]
        return metrics

    @staticmethod
    def evaluate(metric: Metric, *inputs: Any) -> Tensor:
        """The metric of these inputs alone; its state is theirs afterwards."""
        metric.reset()
        metric.update(*inputs)
        # The class's own, or the instance's, which looks around for ranks to sync with: on small networks that takes longer
        # than what it computes.
        value: Tensor = metric.compute() if metric.sync_on_compute else type(metric).compute(metric)
        return value

    def announce(self, message: str) -> None:
        """Say something to the person who watches the run, on rank 0."""
        if self.session is not None:
            self.session.trainer.print(message)
        elif self._recorder is None or self._recorder.is_first_rank:
            _log.info(message)

    @property
    def label(self) -> str:
        """The class and the settings that were given: what messages and states call this monitor."""
        return self._label

    @property
    def state_key(self) -> str:
        """The key of this monitor's state in a checkpoint."""
        return self._label

    def state_dict(self) -> dict[str, Any]:
        """Measurements so far and the metric's state: tensors and plain Python, with a checksum."""
        return self._state(most_bytes=_MOST_BYTES_OF_SAMPLES)

    def _state(self, *, most_bytes: float) -> dict[str, Any]:
        if self._recorder is None:
            return dict(self._restored or {})
        if self.session is not None:
            self.session.catch_up()
        state = {
            "recorder": self._recorder.state_of(self),
            "metric": self._metric_state.of(self.metric),
            "own": self._own_state_to_save(),
            "samples": self._samples_to_save(most_bytes),
        }
        return {**state, "checksum": checksum(self.state_key, state)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state; it takes effect when fit starts.

        A state that was changed since it was saved, or that is another monitor's, is refused: a monitor of a preset then starts
        afresh, with a warning.

        Raises:
            ValueError: If the state is not one that this monitor has made.
        """
        if not state_dict:
            return
        try:
            self._check(state_dict)
        except ValueError as error:
            if not self.optional:
                raise
            warnings.warn(f"{error} {self.label} starts afresh.", stacklevel=2)
            return
        self._recorder = None
        self._restored = dict(state_dict)

    def _check(self, state: Any) -> None:
        parts = {"recorder", "metric", "own", "samples"}
        if not isinstance(state, Mapping) or set(state) != {*parts, "checksum"}:
            raise ValueError(f"The state given to {self.label} is not that of a monitor.")
        check_state(self.label, state["recorder"])
        if checksum(self.state_key, {part: state[part] for part in parts}) != state["checksum"]:
            raise ValueError(f"The state given to {self.label} is another monitor's, or damaged: its checksum is wrong.")

    def _own_state_to_save(self) -> dict[str, Any] | None:
        try:
            return self.own_state()
        except Exception as error:
            if self.on_error == "raise":
                raise
            if not self._warned_of_state:
                self._warned_of_state = True
                warnings.warn(
                    f"{self.label} could not give its state; a resumed run goes on without: {type(error).__name__}: {error}",
                    stacklevel=2,
                )
            return None

    def own_state(self) -> dict[str, Any]:
        """What a subclass must save beyond its measurements and its metric."""
        return {}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Take up :meth:`own_state`."""
        del state

    @property
    def resumed_own_state(self) -> Mapping[str, Any]:
        """For :meth:`bind`: what :meth:`own_state` gave in the run that this one goes on from, empty in a run of its own."""
        return (self._restored or {}).get("own") or {}

    def _samples_to_save(self, most_bytes: float) -> list[dict[str, Any]]:
        """The samples that a resumed run could not draw again, such as those of data that can only be iterated.

        Args:
            most_bytes: If they are more, none is saved: checkpoints are many, and should stay about as large as the model.
        """
        if self._recorder is None:
            return []
        saved: list[dict[str, Any]] = []
        tensors = _Distinct()
        for number, split in sorted(self.iterated):
            probe = self._recorder.probes[number]
            batch = self._recorder.samples(probe)[split]
            if isinstance(batch, Batch) and is_plain(batch):
                complete = not (split == "train" and self._recorder.is_growing(probe))
                inputs, targets = tree_map(tensors.of, (batch.inputs, batch.targets))
                content = {"inputs": inputs, "targets": targets, "asked": batch.asked}
                saved.append({"probe": number, "split": split, **content, "complete": complete})
        if tensors.nbytes <= most_bytes:
            return saved
        if not self._told_of_samples:
            self._told_of_samples = True
            self.announce(
                f"The probe's samples ({tensors.nbytes / 2**20:.0f} MiB) are not saved in checkpoints, being more than "
                f"{most_bytes / 2**20:.0f} MiB: a resumed run takes others from the batches that pass, so its curves go on "
                "with a step. A smaller `size` of the Probe, or its `train` and `validation`, prevents it."
            )
        return []

    def saved_samples(self, number: int, split: Split) -> SavedSamples | None:
        """Samples of a state that was loaded and not yet taken up."""
        for saved in (self._restored or {}).get("samples", ()):
            if (saved["probe"], saved["split"]) == (number, split):
                return SavedSamples(Batch(saved["inputs"], saved["targets"], saved.get("asked")), saved["complete"])
        return None

    def prepare_to_go_on(self, step: int) -> None:
        """Go on from an earlier fit if the Trainer does, or forget it: a state of later steps is that of another run."""
        if self._restored is None and self._recorder is not None and step > 0:
            self._restored = self._state(most_bytes=math.inf)
        if self._restored is not None and self._restored["recorder"]["seen"] > step:
            self._restored = None
        self._recorder = None
        self.iterated = set()

    def logged_metrics_wanted(self, available: Mapping[str, Any]) -> Iterable[str]:
        """Which of the metrics that the user's module logs this monitor reads from the history.

        Asked whenever there are others to choose from.
        """
        del available
        return ()

    @property
    def history(self) -> History:
        """All that the Recorder has measured so far, by every monitor of the run."""
        return History() if self._recorder is None else self._recorder.history

    def attach(self, recorder: Recorder) -> Mapping[str, Any] | None:
        """Called by the Recorder once this monitor is bound; gives it its part of a state that was loaded."""
        restored, self._recorder, self._restored = self._restored, recorder, None
        if restored is None:
            return None
        try:
            restore_metric(self.metric, unpack(restored["metric"]))
            if restored["own"] is not None:
                self.load_own_state(restored["own"])
        except Exception as error:
            raise ValueError(
                f"The saved state of {self.label} does not fit this run: {type(error).__name__}: {error}."
            ) from error
        state: Mapping[str, Any] = restored["recorder"]
        return state

    def __getstate__(self) -> dict[str, Any]:
        """Pickles without the model that it watches; spawned processes bind it anew."""
        state = {name: value for name, value in self.__dict__.items() if name not in self._stand_ins}
        state["_restored"] = self.state_dict() or None
        state["_recorder"] = state["session"] = None
        state["_metric_state"] = MetricState()
        state["_stand_ins"] = ()
        return state

    # One session drives all monitors of a Trainer.

    def join(self, session: Session, hooks: Mapping[str, Callable[..., Any] | None]) -> None:
        """Let a session act in place of this monitor's hooks."""
        self.leave()
        self.session = session
        self._stand_ins = tuple(hooks)
        self.__dict__.update(hooks)

    def leave(self) -> None:
        """Be a callback of its own again."""
        for hook in self._stand_ins:
            del self.__dict__[hook]
        self._stand_ins = ()
        self.session = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start a session with the other monitors of this Trainer. A subclass that has a ``setup`` must call this one."""
        if stage == "fit" and (self.session is None or self.session.trainer is not trainer):
            Session(trainer, [callback for callback in trainer.callbacks if isinstance(callback, Monitor)])  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the session."""
        if stage == "fit" and self.session is not None:
            self.session.leave()


class SavedSamples(NamedTuple):
    """Samples of a checkpoint."""

    batch: Batch
    is_complete: bool


class _Distinct:
    """Tensors of which equal ones become one, as several probes may have kept the same batches."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for known in self._tensors:
            if known.dtype == value.dtype and known.layout == value.layout == torch.strided and torch.equal(known, value):
                return known
        self._tensors.append(value)
        return value

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)


def _describe(value: Any) -> str:
    """A setting in words that are the same in the next process."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
