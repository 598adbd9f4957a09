"""Tells when a run memorised and when it generalised."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.callbacks._summary import in_markdown
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.forecast.onset import EVENTS, PHASES, OnsetTracker, Outcome, Phase, Thresholds, is_share
from grok_callbacks.forecast.sources import logged_accuracy_names
from grok_callbacks.forecast.words import event_in_words
from grok_callbacks.history import History
from grok_callbacks.probe import SPLITS, Split
from grok_callbacks.snapshot import ModelView, Snapshot

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["GrokkingDetector"]

# Standard deviations that chance exceeds once in a thousand times.
_RARE = 3.1


class GrokkingDetector(Monitor):
    """Finds the steps at which a run memorises, begins to generalise and has generalised, announces and logs them.

    It reads the accuracies that the module itself logs (``train_acc``, ``val/accuracy`` and the like, or the names given), and
    where it logs none by the end of the first epoch or second validation, measures them on the probe. An event is the first of
    two consecutive measurements beyond its level, so it does not fire on noise, and not twice over a resume:

    - *memorised*: training accuracy of at least 0.99;
    - *onset*: validation accuracy a fifth of the way from chance to the target, measured on few samples beyond what guessing
      reaches once in a thousand times, and after it has been below;
    - *generalised*: validation accuracy of at least 0.9 of the target.

    Generalising at least twice as late as memorising is **grokking**, sooner is **comprehension**; memorising alone is
    **memorisation**, neither is **confusion**. Where that hangs on what was not measured or not watched, there is no outcome.

    Of a run that it comes to later than at step 0, as when it is added at a resume, it saw no beginning: what already holds at
    the first look came at that step *or before*, and says so.

    | key | value |
    |---|---|
    | `grok/accuracy/{train,validation}` | accuracy on the probe, where samples have class labels |
    | `grok/loss/{train,validation}` | loss on the probe |
    | `grok/onset/{train,validation}_since` | from which step on the metric was watched: 0, or where a late detector began |
    | `grok/onset/memorized_step` | the step, logged when it is established; -1 if it is taken back |
    | `grok/onset/onset_step` | the same for the onset |
    | `grok/onset/grokked_step` | the same for generalising |
    | `grok/onset/delay` | steps from memorising to generalising, where both were seen |

    They are logged once, and once more where a resumed run begins a log folder of its own: the report goes by them.

    The progress bar shows the phase (*memorising*, *memorised*, *generalising*, *generalised*), and TensorBoard's text tab the
    phase and the events, whenever they change.

    Cost: one probe forward pass on training and on validation samples, shared with the other monitors. Source of the terms: Liu
    et al. 2022 (arXiv 2205.10343); the levels are our choice.

    Args:
        train_metric: Name of the logged training metric; by default an accuracy is looked for, then measured. Logged by the
            step only, it is that of single batches.
        validation_metric: The same for validation.
        mode: Whether the metrics grow ("max") or fall ("min") as the model gets better.
        memorized_threshold: The training metric that counts as memorised. With mode "min" it must be given.
        target: The validation metric of a good model: 1.0 for accuracy, lower for data that level off lower. With mode "min" it
            must be given.
        chance: The validation metric of guessing: by default one over the number of classes, or 0 where that is unknown. With
            mode "min" it must be given.
        patience: Consecutive measurements that an event must last.
        stop_after_generalization: End the fit once the model has generalised; in a loop of your own read :attr:`should_stop`.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Raises:
        MisconfigurationException: If a threshold cannot be reached, or at fit start if there is neither a metric nor anything
            to measure one on.
    """

    question = "Is it memorising?"
    preset = "economy"

    def __init__(
        self,
        train_metric: str | None = None,
        validation_metric: str | None = None,
        *,
        mode: Literal["max", "min"] = "max",
        memorized_threshold: float | None = None,
        target: float | None = None,
        chance: float | None = None,
        patience: int = 2,
        stop_after_generalization: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.metric_names: dict[Split, str | None] = {"train": train_metric, "validation": validation_metric}
        if mode == "min":
            needed = {
                "train_metric": train_metric, "validation_metric": validation_metric,
                "memorized_threshold": memorized_threshold, "target": target, "chance": chance,
            }  # fmt: skip
            missing = [name for name, value in needed.items() if value is None]
            if missing:
                raise MisconfigurationException(f"With `mode='min'` there are no defaults; set {missing}.")
        self._chance = chance
        try:
            self.tracker = OnsetTracker(
                Thresholds(
                    memorized=0.99 if memorized_threshold is None else memorized_threshold,
                    target=1.0 if target is None else target,
                    chance=0.0 if chance is None else chance,
                    mode=mode,
                    patience=patience,
                )
            )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.stop_after_generalization = stop_after_generalization
        self._measured: list[Split] = []
        # Validation samples on the probe, 0 as long as none has been looked at.
        self._count = 0
        self._fed: dict[str, int] = {"train": -1, "validation": -1}
        self._sources: dict[str, str] = {}
        self._logged: dict[str, float] = {}
        self._available: list[str] = []
        # Names that were given and have not been seen by the end of the first epoch: the step at which that was noticed.
        self._unheard: dict[str, int] = {}
        # Whether what the module logs can be accuracies; percentages cannot be told from them at first.
        self._logs_shares = True
        self._unannounced: list[str] = []
        self._is_watching = False
        # When `follow` last looked, and how much there was to see.
        self._followed: tuple[int, ...] = ()
        # How many series there were then, and what was found among them.
        self._known = -1
        self._found: dict[Split, str | None] = {}
        # Up to which change of the events all is logged.
        self._told = -1
        # States of detectors with other settings in the checkpoint that the run goes on from.
        self._saved_otherwise: list[str] = []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See whether the checkpoint knows a detector with other settings."""
        name = type(self).__qualname__
        keys = [key for key in checkpoint.get("callbacks", {}) if isinstance(key, str)]
        present = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
        self._saved_otherwise = [key for key in keys if key.partition("(")[0] == name and key not in present]

    def prepare_to_go_on(self, step: int) -> None:
        """Go on from an earlier fit, and say so where a run goes on without what an earlier detector knew."""
        super().prepare_to_go_on(step)
        if step == 0 or self._restored is not None or self.session is None or not self.session.trainer.is_global_zero:
            return
        known = f", only of {' and '.join(self._saved_otherwise)} with other settings" if self._saved_otherwise else ""
        warnings.warn(
            f"{self.label}: the run goes on from step {step:,} without a saved state of this detector{known}. What it finds "
            "there already came at that step or before; what kind of run it is may stay unknown.",
            stacklevel=2,
        )

    def bind(self, view: ModelView) -> None:
        """Check that there is something to judge the run by."""
        self._measured = [split for split in SPLITS if self._can_measure(split, view)]
        self._logs_shares = True
        self.tracker = OnsetTracker(replace(self.tracker.thresholds, chance=self._chance or 0.0))
        self._fed = {"train": -1, "validation": -1}
        self._sources = {}
        self._logged = {}
        self._unheard = {}
        self._unannounced = []
        self._is_watching = False
        self._followed = ()
        self._known = -1
        self._told = -1

    def _can_measure(self, split: Split, view: ModelView) -> bool:
        is_named = self.metric_names[split] is not None
        if view.samples.get(split) is None and (is_named or split == "validation"):
            return True  # There may be some later.
        try:
            view.require_logits(split)
        except ValueError as error:
            if is_named or self.optional:
                return False  # The module may log what is wanted.
            raise ValueError(f"{error} Or name the metric that the module logs: `{split}_metric`.") from error
        return True

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Accuracy and loss on the probe, for the splits that have labelled samples."""
        values: dict[str, float | Tensor] = {}
        for split in self._measured:
            if not snapshot.has(split) or snapshot.targets(split) is None:
                continue
            values[f"loss/{split}"] = snapshot.loss(split)
            logits = snapshot.logits(split)
            labels = _labels(snapshot.targets(split), logits)
            if labels is None:
                continue
            if split == "validation":
                self._count = len(labels)
            # The largest of several NaN would be one of them, and perhaps the right one.
            values[f"accuracy/{split}"] = (
                math.nan if bool(logits.isnan().any()) else (_answers(logits) == labels).double().mean()
            )
            if self._chance is None and self.tracker.thresholds.chance == 0.0:
                self._set_chance(1.0 / max(logits.shape[-1], 2))
        return values

    def _allow_for_luck(self) -> None:
        """Put the onset beyond what guessing gets right of so few samples, once in a thousand times."""
        thresholds = self.tracker.thresholds
        chance, way = thresholds.chance, thresholds.target - thresholds.chance
        luck = _RARE * math.sqrt(max(chance * (1 - chance), 0.0) / self._count)
        share = min(luck, thresholds.generalized_level - chance) / way
        if thresholds.onset < share < 1:
            self.tracker.thresholds = replace(thresholds, onset=share)

    def _set_chance(self, chance: float) -> None:
        if chance < self.tracker.thresholds.target:
            self.tracker.thresholds = replace(self.tracker.thresholds, chance=chance)

    def logged_metrics_wanted(self, available: Mapping[str, Any]) -> Iterable[str]:
        """The training and validation metric, if the module logs them."""
        self._available = list(available)
        names = [self._find(split, available) for split in SPLITS]
        return [name for name in names if name is not None]

    def _find(self, split: Split, available: Container[str]) -> str | None:
        given = self.metric_names[split]
        if given is not None:
            return given if given in available else None
        return next((name for name in logged_accuracy_names(split) if name in available), None)

    def analyse(self, history: History, step: int) -> Mapping[str, float | Tensor]:
        """Feed the tracker what is new, and report the events that it establishes."""
        self.follow(history, step)
        if self._unannounced:
            events, self._unannounced = self._unannounced, []
            for event in events:
                self.announce(event_in_words(event, self.tracker.events))
            if self.should_stop and self.session is not None:
                self.session.trainer.should_stop = True
        return self._news() if self.tracker.changes != self._told else {}

    def follow(self, history: History, step: int) -> None:
        """Feed the tracker what is new; another monitor that goes by it may need it to before this one's turn comes."""
        session = self.session
        ended = (0, 0) if session is None else (session.epochs_ended, session.validations_ended)
        moment = (step, history.additions, *ended)
        if moment == self._followed:
            return
        self._followed = moment
        if not self._is_watching:
            # The first measurement may come later, when a probe has filled.
            self._is_watching, self.tracker.start = True, step if session is None else session.began
        if len(history) != self._known:
            self._known, self._found = len(history), {split: self._find(split, history) for split in SPLITS}
        self._check_names(history, step)
        unread = self._unread(history)
        for split, (_, points) in unread.items():
            if self._are_no_shares(split, points):
                self._start_over(split)
                unread = self._unread(history)
                break
        for split, (source, points) in unread.items():
            if self._has_heard(split):
                # It may be another than before: the module has begun to log. What was established stays so.
                self._sources[split] = source
                if points:
                    self._feed(split, source, points)

    def _unread(self, history: History) -> dict[Split, tuple[str, list[tuple[int, float]]]]:
        """The series to judge the run by, and what has been added to them."""
        sources = ((split, self._source(split, history)) for split in SPLITS)
        return {split: (source, history[source].after(self._fed[split])) for split, source in sources if source is not None}

    def _feed(self, split: Split, source: str, points: Sequence[tuple[int, float]]) -> None:
        if split == "validation" and self._count and source == self._own(split):
            self._allow_for_luck()
        update = self.tracker.update_train if split == "train" else self.tracker.update_validation
        for step, value in points:
            self._fed[split] = step
            self._unannounced += update(step, value)

    def _has_heard(self, split: Split) -> bool:
        """Whether the module has had the occasion to log what the run is to be judged by."""
        if self.session is None or split in self._sources or self.metric_names[split] is not None:
            return True
        # The first validation comes before the first epoch's end, where many modules log their training accuracy.
        return self.session.epochs_ended > 0 or self.session.validations_ended > (split == "train")

    def _check_names(self, history: History, step: int) -> None:
        """Say so, once, if a metric that was named does not come."""
        for split, name in self.metric_names.items():
            if name is None or name in history or self.session is None or not self._has_had_occasion(split):
                continue
            # What is logged at an epoch's end may reach us one measurement later.
            if 0 <= self._unheard.setdefault(name, step) < step:
                self._unheard[name] = -1
                if not self.session.trainer.is_global_zero:
                    continue
                warnings.warn(
                    f"{self.label}: the metric of `{split}_metric`, {name!r}, has not been logged so far, so nothing is judged "
                    f"by it. Logged are {[key for key in sorted(self._available) if not key.startswith(f'{self.prefix}/')]}.",
                    stacklevel=2,
                )

    def _has_had_occasion(self, split: Split) -> bool:
        assert self.session is not None
        return self.session.epochs_ended > 0 and (split == "train" or self.session.validations_ended > 0)

    def _are_no_shares(self, split: Split, points: Sequence[tuple[int, float]]) -> bool:
        """Whether what was found among the logged metrics turns out to be no accuracy."""
        is_found = self._logs_shares and self.metric_names[split] is None and self._found[split] is not None
        return is_found and not all(is_share(value) for _, value in points)

    def _start_over(self, split: Split) -> None:
        """Go by accuracies of our own, and take back what percentages seemed to tell."""
        self._logs_shares = False
        self._fed = {"train": -1, "validation": -1}
        for each in SPLITS:
            self.tracker.restart(each)
        what = f"{self._found[split]!r} is no share between 0 and 1"
        warnings.warn(f"{what}; {self.label} goes by the accuracy that it measures.", stacklevel=2)

    def _source(self, split: Split, history: History) -> str | None:
        """The key of the series to judge by: what the module logs, otherwise what was measured on the probe."""
        found = self._found[split]
        if self.metric_names[split] is not None or (found is not None and self._logs_shares):
            return found
        return self._own(split) if self._own(split) in history else None

    def _own(self, split: Split) -> str:
        """The key of what is measured on the probe."""
        return f"{self.prefix}/accuracy/{split}"

    def _news(self) -> dict[str, float]:
        """What is to be logged: since when what was watched, the events, and those that are taken back."""
        self._told = self.tracker.changes
        values = self.tracker.events.values()
        new = {key: value for key, value in values.items() if self._logged.get(key, -1.0) != value}
        self._logged |= new
        return new

    def standing(self) -> Mapping[str, float]:
        """The events so far."""
        return dict(self._logged)

    @property
    def memorized_step(self) -> int | None:
        """The step at which the training data were fitted, ``None`` so far."""
        return self.tracker.memorized_step

    @property
    def onset_step(self) -> int | None:
        """The step at which validation left chance, ``None`` so far."""
        return self.tracker.onset_step

    @property
    def grokked_step(self) -> int | None:
        """The step at which the model had generalised, ``None`` so far."""
        return self.tracker.grokked_step

    @property
    def delay(self) -> int | None:
        """Steps from memorising to generalising, ``None`` as long as not both were seen."""
        return self.tracker.delay

    @property
    def phase(self) -> Phase:
        """What the run is doing: memorising, memorised, generalising or generalised."""
        return self.tracker.phase

    @property
    def outcome(self) -> Outcome | None:
        """What the run is, as far as it has gone; ``None`` where that hangs on what was not seen."""
        return self.tracker.outcome

    def texts(self) -> Mapping[str, str]:
        """The run in brief: its phase and its events."""
        events = self.tracker.events
        sentences = [event_in_words(event, events) for event in EVENTS if events.steps[event] is not None]
        return {"summary": in_markdown(events, sentences, list(self._sources.values()))}

    def status(self) -> Mapping[str, str]:
        """The phase."""
        events, number = self.tracker.events, PHASES.index(self.phase)
        is_bound = number > 0 and events.is_bound(EVENTS[number - 1])
        return {"phase": f"{self.phase} {events.when(EVENTS[number - 1])}" if is_bound else self.phase}

    @property
    def should_stop(self) -> bool:
        """Whether the run has generalised and was to stop then."""
        return self.stop_after_generalization and self.grokked_step is not None

    def own_state(self) -> dict[str, Any]:
        """The tracker, how far which series were read, and what was logged."""
        return {
            "tracker": self.tracker.state_dict(),
            "fed": dict(self._fed),
            "sources": dict(self._sources),
            "logged": dict(self._logged),
            "logs_shares": self._logs_shares,
            "is_watching": self._is_watching,
        }

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved run was; its thresholds hold."""
        self.tracker.load_state_dict(state["tracker"])
        self._fed, self._sources = dict(state["fed"]), dict(state["sources"])
        self._logged, self._logs_shares = dict(state["logged"]), state["logs_shares"]
        self._is_watching = state["is_watching"]


def _labels(targets: Tensor, logits: Tensor) -> Tensor | None:
    """Class labels, also from one-hot targets; ``None`` for regression."""
    if logits.ndim < 2:
        return None
    if logits.shape[-1] == 1 and targets.is_floating_point():
        return None
    if not targets.is_floating_point():
        return targets if targets.shape == logits.shape[:-1] else None
    is_one_hot = targets.shape == logits.shape and bool((targets.sum(-1) == 1).all() & ((targets == 0) | (targets == 1)).all())
    return targets.argmax(-1) if is_one_hot else None


def _answers(logits: Tensor) -> Tensor:
    """The classes that the logits stand for; a single one says yes or no."""
    return (logits[..., 0] > 0).long() if logits.shape[-1] == 1 else logits.argmax(-1)
