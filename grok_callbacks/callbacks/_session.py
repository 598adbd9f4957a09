"""The monitors of one Trainer, acting as one: from Lightning's hooks to the Recorder, and from the Recorder to the loggers."""

from __future__ import annotations

import gc
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from grok_callbacks._compat import Callback, MisconfigurationException
from grok_callbacks._distributed import Ranks
from grok_callbacks._drawing import Drawing
from grok_callbacks._isolation import evaluating, isolated_rng
from grok_callbacks.callbacks import _loggers
from grok_callbacks.callbacks._bar import BarWithStatus
from grok_callbacks.probe import SPLITS, Batch, Probe, Split
from grok_callbacks.recorder import Recorder
from grok_callbacks.schedule import AtValidation, LogSpaced
from grok_callbacks.snapshot import Drawn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from grok_callbacks.callbacks.monitor import Monitor

__all__ = ["Session"]

# Lightning enters a profiler context for every hook of every callback in every step, about 3 us each, unless the attribute is
# not callable. Ten monitors would pay for some eighty hooks a step that do nothing.
_FREQUENT_HOOKS = (
    "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end", "on_validation_start", "on_validation_epoch_start",
    "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end",
)  # fmt: skip


_FIRST_FIGURE = 100


class Session:
    """One fit of a Trainer with monitors. Lightning's hooks reach it through the first monitor; the others' hooks rest.

    Args:
        trainer: The Trainer.
        monitors: Its monitors, in its order.
    """

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        self.trainer = trainer
        self.monitors = list(monitors)
        self.leader = self.monitors[0]
        self.recorder: Recorder | None = None
        self._drawn: dict[Probe, dict[Split, Drawn]] = {}
        self._gathering: dict[Split, list[_Gathering]] = {"train": [], "validation": []}
        self._taken_in: dict[str, Tensor] = {}
        # The names of what the module has logged so far, and those of them that a monitor reads.
        self._available: set[str] = set()
        self._wanted: list[str] = []
        # Batches that are sure to end before anything is due.
        self._idle_batches = 0
        #: The step at which this fit began.
        self.began = 0
        self.epochs_ended = 0
        self.validations_ended = 0
        # A figure takes a hundred times as long as a measurement: one a decade, from here on, and one at the end.
        self._figure_schedule = LogSpaced(1)
        self._next_figure_step: int | None = _FIRST_FIGURE
        self._drawn_at = -1
        self._broken_loggers: set[int] = set()
        self._layout_keys: set[str] = set()
        self._texts: dict[str, str] = {}
        self._wordless: set[Monitor] = set()
        self._bar: BarWithStatus | None = None
        for monitor in self.monitors:
            monitor.join(self, hooks=self._hooks_for(monitor))

    def _hooks_for(self, monitor: Monitor) -> dict[str, Callable[..., Any] | None]:
        """What stands in for a monitor's hooks while the session lasts; a subclass's own are called as well."""
        hooks: dict[str, Callable[..., Any] | None] = {
            hook: None for hook in _FREQUENT_HOOKS if getattr(type(monitor), hook) is getattr(Callback, hook)
        }
        if monitor is self.leader:
            hooks |= {hook: self._led(hook, action) for hook, action in _ACTIONS.items()}
        return hooks

    def _led(self, hook: str, action: Callable[..., None]) -> Callable[..., None]:
        """The leader's hook: what it does for all, and then its own."""
        own = self._own(hook)

        def act(trainer: Trainer, module: Any, *args: Any, **kwargs: Any) -> None:
            action(self, *args, **kwargs)
            if own is not None:
                own(self.leader, trainer, module, *args, **kwargs)

        return act

    def _own(self, hook: str) -> Callable[..., None] | None:
        """A hook that the leader's class defines itself."""
        own = getattr(type(self.leader), hook)
        return None if own is getattr(Callback, hook) else own

    def _rest(self, hook: str) -> None:
        """There is nothing to do at this hook in the rest of the fit."""
        if self._own(hook) is None:
            self.leader.__dict__[hook] = None

    # Lightning's hooks, in the order of a run.

    def start(self) -> None:
        """Make the Recorder, give it samples, and measure the model as it is before training."""
        self.began = self.trainer.global_step
        for monitor in self.monitors:
            monitor.prepare_to_go_on(self.trainer.global_step)
        self.recorder = Recorder(self.trainer.lightning_module, self.monitors)
        self._drawn = {probe: self._draw(number, probe) for number, probe in enumerate(self.recorder.probes)}
        for logger in self._working_loggers():
            self._try(logger, lambda logger=logger: _loggers.mark_begun(logger, self.trainer.global_step))
        if not self.trainer.enable_validation:
            self._warn_of_waiting_for_validation()
        self._bar = BarWithStatus.on(self.trainer)
        if not self._gathering["train"]:
            self._rest("on_train_batch_start")
            self._bind()
        if not self._gathering["validation"]:
            self._rest("on_validation_batch_start")

    def _warn_of_waiting_for_validation(self) -> None:
        waiting = [monitor.label for monitor in self.monitors if isinstance(monitor.schedule, AtValidation)]
        if waiting and self.trainer.is_global_zero:
            warnings.warn(f"No validation in this run: {', '.join(waiting)} will measure at step 0 only.", stacklevel=2)

    def epoch_start(self) -> None:
        """Take in what the module logged in its own hook at the end of the last epoch, which comes after ours."""
        self._take_in_metrics()

    def train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep a copy of training data that can only be iterated, until the probes are full; bind with the first batch."""
        if self._gathering["train"]:
            for gathering in self._gathering["train"]:
                gathering.take(batch)
            self._settle_train()

    def train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure what is due."""
        if self._idle_batches:
            self._idle_batches -= 1
            return
        self.step()
        # Lightning's own loop makes one step a batch at most. To ask it for the number takes longer than to count.
        if self.trainer.lightning_module.automatic_optimization:
            assert self.recorder is not None
            self._idle_batches = self.recorder.idle_steps(self.trainer.global_step)

    def step(self) -> None:
        """Measure what is due after an optimiser step."""
        assert self.recorder is not None
        values = self.recorder.record(self.trainer.global_step)
        if values:
            self._publish(values)

    def catch_up(self) -> None:
        """Let the Recorder know of the steps at which there was nothing to do."""
        if self.recorder is not None:
            self.recorder.catch_up(self.trainer.global_step)

    def epoch_end(self) -> None:
        """Measure what is due at the end of a training epoch, and take in the module's own metrics."""
        # A run that was interrupted at an epoch's end, and resumed, ends that epoch before a batch has passed.
        if any(gathering.samples is not None for gathering in self._gathering["train"]):
            # No more will come: the data are fewer than the probe would hold.
            self._settle_train(last=True)
        if self.epochs_ended == 0:
            self._warn_of_uncounted_steps()
        self.epochs_ended += 1
        self._take_in_metrics("epoch")

    def _warn_of_uncounted_steps(self) -> None:
        """In manual optimisation Lightning counts the steps of its own wrappers only."""
        is_manual = not self.trainer.lightning_module.automatic_optimization
        if is_manual and self.trainer.global_step == 0 and self.trainer.is_global_zero:
            warnings.warn(
                "Lightning has counted no optimiser step in this epoch, and nothing is measured after step 0 until it does: "
                "step the optimisers that `self.optimizers()` returns, without `use_pl_optimizer=False`.",
                stacklevel=2,
            )

    def validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep a copy of validation data that can only be iterated, until the probes are full."""
        if dataloader_idx == 0 and not self.trainer.sanity_checking:
            for gathering in self._gathering["validation"]:
                gathering.take(batch)

    def validation_epoch_end(self) -> None:
        """Measure what is due at a validation's end, before early stopping looks."""
        if not self.trainer.sanity_checking:
            self._settle_validation()
            self._record("validation")

    def validation_end(self) -> None:
        """Take in the module's own metrics, which are complete only now."""
        if not self.trainer.sanity_checking:
            self.validations_ended += 1
            self._take_in_metrics()

    def flush(self, checkpoint: Any = None) -> None:
        """Have everything that was logged on disk: what a checkpoint knows, the event files hold."""
        for logger in self._working_loggers():
            self._try(logger, lambda logger=logger: _loggers.flush(logger))

    def end(self) -> None:
        """Take in the last metrics, log the last figures and texts, and flush."""
        self._take_in_metrics()
        if self.recorder is not None and self.recorder.history:
            if self._drawn_at != self.recorder.last_step:
                self._publish_figures(self.trainer.global_step)
            self._publish_texts(self._texts, self.trainer.global_step)
        for logger in self._working_loggers():
            self._try(logger, lambda logger=logger: _loggers.mark_ended(logger, self.trainer.global_step))
        self.flush()

    def fail(self, exception: BaseException) -> None:
        """Flush the loggers of a run that ends early; Lightning calls no teardown then."""
        self.catch_up()
        self.flush()
        self.leave()

    def leave(self) -> None:
        """Give the monitors their hooks back, and the progress bar its own text."""
        if self._bar is not None:
            self._bar.leave()
        for monitor in self.monitors:
            monitor.leave()

    # Samples.

    def _draw(self, number: int, probe: Probe) -> dict[Split, Drawn]:
        """A probe's samples, and a note of what can only be had from batches that pass by."""
        samples: dict[Split, Drawn] = {}
        for split in SPLITS:
            saved = self.leader.saved_samples(number, split)
            samples[split] = saved.batch if saved is not None else self._sample(probe, split)
            # After a resume Lightning makes the validation loader only when it is due, which may be epochs later.
            is_late = split == "validation" and self.trainer.check_val_every_n_epoch not in (None, 1)
            if saved is not None or is_late:
                self.leader.iterated.add((number, split))
            can_come = split == "train" or self.trainer.enable_validation
            if (samples[split] is None and getattr(probe, split) is None and can_come) or (saved and not saved.is_complete):
                self._gathering[split].append(_Gathering(probe, number, samples[split]))
        return samples

    def _sample(self, probe: Probe, split: Split) -> Drawn:
        loaders = _loaders(self.trainer, split)

        def sample() -> Batch | None:
            if getattr(probe, split) is not None or loaders is None:
                return probe.sample(split)
            drawing = _draw_structure(probe, loaders, _most_batches(self.trainer, split))
            if drawing is None:
                return None
            return probe.join([self._transfer(batch, split) for batch in drawing.batches], drawing.size)

        return self._from_first(sample)

    def _transfer(self, batch: Any, split: Split) -> Any:
        """What the Trainer does to a batch before the module sees it, the user's transfer hooks included."""
        with isolated_rng(seed=0), torch.inference_mode(False), torch.no_grad(), self._stage_of(split):
            batch = self.trainer.precision_plugin.convert_input(batch)
            return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    @contextmanager
    def _stage_of(self, split: Split) -> Iterator[None]:
        """Validation samples meet the Trainer and the module as in a validation: hooks may augment in training only."""
        if split == "train":
            yield
            return
        stage = self.trainer.state.stage
        try:
            self.trainer.validating = True
            with evaluating(self.trainer.lightning_module):
                yield
        finally:
            self.trainer.state.stage = stage

    def _from_first(self, draw: Callable[[], Drawn]) -> Drawn:
        """Rank 0's samples on all ranks, or its error: an exception on one rank would leave the others waiting."""
        ranks = Ranks(self.trainer.strategy.root_device)
        result: Drawn = None
        if ranks.rank == 0:
            try:
                result = draw()
            except ValueError as error:
                result = error
            except Exception as error:
                result = ValueError(
                    f"Samples for the probe could not be had: {type(error).__name__}: {error}. "
                    "Set `train` and `validation` of the Probe to data sets or batches, or `unpack` if that is what failed."
                )
                result.__cause__ = error
        return ranks.from_first(result)

    def _settle_train(self, *, last: bool = False) -> None:
        """Give the probes the training batches that have passed, and bind with the first."""
        assert self.recorder is not None
        going_on: list[_Gathering] = []
        for gathering in self._gathering["train"]:
            samples = self._from_first(lambda gathering=gathering: gathering.samples)  # type: ignore[misc]
            complete = last or self.recorder.from_first(gathering.is_complete)
            self.leader.iterated.add((gathering.number, "train"))
            self._set_samples(gathering.probe, "train", samples, growing=not complete)
            if not complete:
                going_on.append(gathering)
        self._gathering["train"] = going_on
        if not going_on:
            self._rest("on_train_batch_start")
        if not self.recorder.is_bound:
            self._bind([gathering.probe for gathering in going_on])

    def _settle_validation(self) -> None:
        """Give the probes their validation samples, now that a validation has run."""
        for gathering in self._gathering["validation"]:
            # Lightning may have made the loader only after the start.
            samples = self._sample(gathering.probe, "validation")
            if samples is None:
                samples = self._from_first(lambda gathering=gathering: gathering.samples)  # type: ignore[misc]
                self.leader.iterated.add((gathering.number, "validation"))
            self._set_samples(gathering.probe, "validation", samples)
        self._gathering["validation"] = []
        self._rest("on_validation_batch_start")

    def _set_samples(self, probe: Probe, split: Split, samples: Drawn, *, growing: bool = False) -> None:
        assert self.recorder is not None
        self._drawn[probe][split] = samples
        if self.recorder.is_bound:
            self.recorder.set_samples(probe, split, samples, growing=growing)

    # Measuring and publishing.

    def _bind(self, growing: Sequence[Probe] = ()) -> None:
        assert self.recorder is not None
        try:
            self.recorder.bind(self._drawn, start=self.trainer.global_step, growing=growing)
            self._go_on_publishing()
            # Binding may fall before the first step, or before the first one of a resumed run, which was measured already.
            self.step()
        except MisconfigurationException:
            raise
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    def _go_on_publishing(self) -> None:
        """In a resumed run: early stopping asks for keys that are not due yet, and figures and texts have been logged."""
        assert self.recorder is not None
        self._put_in_callback_metrics(self.recorder.latest)
        if self.recorder.history:
            self._update_words()
            self._publish_standing()
        steps = [self.recorder.history[key].steps[-1] for key in self.recorder.latest]
        if steps:
            self._next_figure_step = self._figure_schedule.next_step(max(*steps, _FIRST_FIGURE - 1))

    def _publish_standing(self) -> None:
        """Tell a logger whose log begins with this fit what holds from before: its reader has nothing else to go by."""
        standing = {f"{monitor.prefix}/{key}": value for monitor in self.monitors for key, value in monitor.standing().items()}

        def publish(logger: Any) -> None:
            values = _loggers.unheard(logger, standing)
            if values:
                logger.log_metrics(values, step=self.trainer.global_step)

        for logger in self._working_loggers() if standing else ():
            self._try(logger, partial(publish, logger))

    def _record(self, event: Any = None, metrics: Mapping[str, float] | None = None) -> None:
        """Measure what is due, take note of metrics, and publish what follows."""
        assert self.recorder is not None
        if self.recorder.is_bound:
            trainer = self.trainer
            values = self.recorder.record(trainer.global_step, event=event, epoch=trainer.current_epoch, metrics=metrics)
            if values:
                self._publish(values)

    def _take_in_metrics(self, event: Any = None) -> None:
        """Put into the history what the module has logged and a monitor wants to read: rank 0's values on all ranks.

        Args:
            event: What has ended, if something may be due for it.
        """
        recorder = self.recorder
        if recorder is None or not recorder.is_bound:
            return
        available = self.trainer.callback_metrics
        if available.keys() != self._available:
            self._available = set(available)
            self._wanted = sorted({name for each in self.monitors for name in each.logged_metrics_wanted(available)})
        fresh = {name: float(available[name]) for name in self._wanted if self._is_fresh(name, available[name])}
        metrics = recorder.from_first(fresh)
        if metrics or event is not None:
            self._record(event, metrics)

    def _is_fresh(self, name: str, value: Tensor) -> bool:
        """Whether a metric was logged since the last look; until then Lightning shows the old one, in the same memory."""
        last = self._taken_in.get(name)
        if last is not None and last.data_ptr() == value.data_ptr():
            return False
        self._taken_in[name] = value
        return True

    def _publish(self, values: Mapping[str, float]) -> None:
        step = self.trainer.global_step
        self._put_in_callback_metrics(values)
        for logger in self._working_loggers():
            self._try(logger, lambda logger=logger: logger.log_metrics(dict(values), step=step))
        new_keys = values.keys() - self._layout_keys
        if new_keys:
            self._layout_keys |= new_keys
            self._publish_layout()
        self._publish_texts(self._update_words(), step)
        if self._next_figure_step is not None and step >= self._next_figure_step:
            self._next_figure_step = self._figure_schedule.next_step(step)
            self._publish_figures(step)
            self._drawn_at = step

    def _put_in_callback_metrics(self, values: Mapping[str, float]) -> None:
        tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
        self.trainer.callback_metrics.update(tensors)

    def _publish_layout(self) -> None:
        assert self.recorder is not None
        keys_of = self.recorder.keys_of
        layout = _loggers.layout([(monitor.question, monitor.prefix, keys_of(monitor)) for monitor in self.monitors])
        for logger in self._working_loggers():
            self._try(logger, lambda logger=logger: _loggers.add_layout(logger, layout))

    def _update_words(self) -> dict[str, str]:
        """Ask the monitors for their words, for the progress bar and for the loggers; returns the texts that have changed."""
        assert self.recorder is not None
        switched_off = set(self.recorder.switched_off)
        status: dict[str, str] = {}
        texts: dict[str, str] = {}
        for monitor in self.monitors:
            if monitor.label not in switched_off and monitor not in self._wordless:
                try:
                    status |= monitor.status()
                    texts |= {f"{monitor.prefix}/{key}": text for key, text in monitor.texts().items()}
                except Exception as error:
                    self._wordless.add(monitor)
                    warnings.warn(f"{monitor.label} could not put its words: {type(error).__name__}: {error}", stacklevel=2)
        if self._bar is not None:
            self._bar.words = status
        changed = {key: text for key, text in texts.items() if self._texts.get(key) != text}
        self._texts = texts
        return changed

    def _publish_texts(self, texts: Mapping[str, str], step: int) -> None:
        for logger in self._working_loggers() if texts else ():
            self._try(logger, lambda logger=logger: _loggers.add_texts(logger, texts, step))

    def _publish_figures(self, step: int) -> None:
        loggers = [logger for logger in self._working_loggers() if _loggers.holds_figures(logger)]
        if not loggers or self.trainer.global_rank != 0:
            return
        switched_off = self.recorder.switched_off if self.recorder is not None else []
        for monitor in self.monitors:
            if monitor.label not in switched_off:
                with _swept():
                    self._publish_figures_of(monitor, loggers, step)

    def _publish_figures_of(self, monitor: Monitor, loggers: Sequence[Any], step: int) -> None:
        try:
            figures = {f"{monitor.prefix}/{key}": figure for key, figure in monitor.figures().items()}
        except Exception as error:
            warnings.warn(f"{monitor.label} could not draw its figure: {type(error).__name__}: {error}", stacklevel=3)
            return
        for logger in loggers:
            self._try(logger, lambda logger=logger: _loggers.add_figures(logger, figures, step))

    def _working_loggers(self) -> list[Any]:
        return [logger for logger in self.trainer.loggers if id(logger) not in self._broken_loggers]

    def _try(self, logger: Any, write: Any) -> None:
        """A logger that raises (a lost connection) or soon would (a full disk) costs its own curves, not the run."""
        name = type(logger).__name__
        if self.trainer.is_global_zero and _loggers.is_short_of_space(logger):
            self._broken_loggers.add(id(logger))
            left = f"less than {_loggers.RESERVE} MiB are left on its disk, and the run may need them"
            warnings.warn(f"{name} gets no more measurements: {left}.", stacklevel=2)
            return
        try:
            write()
        except Exception as error:
            self._broken_loggers.add(id(logger))
            _loggers.excuse(logger)
            origin = _origin(error)
            warnings.warn(f"{name} failed and gets no more measurements: {type(origin).__name__}: {origin}", stacklevel=2)


@contextmanager
def _swept() -> Iterator[None]:
    """Free at once what becomes garbage within.

    A figure is a web of references to itself, which python's collector would find only when it next searches everything. Held
    back, it has all of that in its youngest generation.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)
        if was_enabled:
            gc.enable()


def _origin(error: BaseException) -> BaseException:
    """What began it: of a full disk Lightning's logger says only that a value could not be logged."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


#: What the leader's hooks do for all monitors.
_ACTIONS: dict[str, Callable[..., None]] = {
    "on_train_start": Session.start,
    "on_train_epoch_start": Session.epoch_start,
    "on_train_batch_start": Session.train_batch_start,
    "on_train_batch_end": Session.train_batch_end,
    "on_train_epoch_end": Session.epoch_end,
    "on_validation_batch_start": Session.validation_batch_start,
    "on_validation_epoch_end": Session.validation_epoch_end,
    "on_validation_end": Session.validation_end,
    "on_save_checkpoint": Session.flush,
    "on_train_end": Session.end,
    "on_exception": Session.fail,
}


class _Gathering:
    """Samples of one probe, taken from batches as they pass by.

    Args:
        probe: Whose samples.
        number: Its place among the probes.
        samples: What an interrupted run had gathered.
    """

    def __init__(self, probe: Probe, number: int, samples: Drawn = None) -> None:
        self.probe = probe
        self.number = number
        self.samples = samples
        self.is_complete = False
        # Decided by the size of the first batch, as what an interrupted run had is by that run's.
        self._size = samples.asked if isinstance(samples, Batch) else probe.size

    def take(self, batch: Any) -> None:
        """Copy a batch's samples, unless there are enough."""
        if self.is_complete:
            return
        before = self.samples if isinstance(self.samples, Batch) else None
        try:
            if self._size is None:
                self._size = self.probe.size_by(len(self.probe.join([batch], sys.maxsize)))
            self.samples = self.probe.join([batch], self._size, before)
            self.is_complete = len(self.samples) == self._size
        except ValueError as error:
            self.is_complete = True
            if before is None:
                self.samples = error
            else:
                warnings.warn(f"The probe holds {len(before)} samples and takes no more: {error}", stacklevel=2)


def _loaders(trainer: Trainer, split: Split) -> Any:
    """A loader, or several in the structure of the batches that they make together; ``None`` if there is none."""
    loop: Any = trainer.fit_loop if split == "train" else trainer.fit_loop.epoch_loop.val_loop
    combined = loop._combined_loader
    if combined is None:
        return None
    # One after the other: the first stands for all.
    return next(iter(combined.flattened), None) if combined._mode == "sequential" else combined.iterables


def _most_batches(trainer: Trainer, split: Split) -> float:
    """How many batches of a loader are used before it begins again."""
    loop: Any = trainer.fit_loop if split == "train" else trainer.fit_loop.epoch_loop.val_loop
    counts = [loop.max_batches] if split == "train" else loop.max_batches
    combined = loop._combined_loader
    # Of loaders that run one after the other, the first is looked at.
    counts = counts[:1] if combined is not None and combined._mode == "sequential" else counts
    return max(counts, default=math.inf) or math.inf


def _draw_structure(probe: Probe, loaders: Any, most_batches: float) -> Drawing | None:
    """Raw batches from a loader, or one batch in the structure of several loaders."""
    if isinstance(loaders, Mapping):
        drawn = {key: _draw_structure(probe, loader, most_batches) for key, loader in loaders.items()}
        return _in_structure(list(drawn.values()), lambda batches: dict(zip(drawn, batches, strict=True)))
    if isinstance(loaders, (list, tuple)):
        return _in_structure([_draw_structure(probe, loader, most_batches) for loader in loaders], list)
    return probe.draw(loaders, most_batches) if hasattr(loaders, "dataset") else None


def _in_structure(parts: Sequence[Drawing | None], join: Callable[[list[Any]], Any]) -> Drawing | None:
    drawn = [part for part in parts if part is not None]
    if len(drawn) < len(parts) or not drawn:
        return None
    return Drawing([join([part.batches[0] for part in drawn])], max(part.size for part in drawn))


def is_plain(batch: Batch) -> bool:
    """Whether a batch can be saved and loaded with ``weights_only=True``."""
    leaves = tree_flatten((batch.inputs, batch.targets))[0]
    return all(leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves)
