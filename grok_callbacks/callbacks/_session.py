"""The monitors of one Trainer, acting as one: from Lightning's hooks to the Recorder, and from the Recorder to the loggers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from grok_callbacks._compat import Callback, MisconfigurationException
from grok_callbacks._distributed import Ranks
from grok_callbacks._isolation import isolated_rng
from grok_callbacks.callbacks import _loggers
from grok_callbacks.probe import SPLITS, Batch, Probe, Split
from grok_callbacks.recorder import Recorder
from grok_callbacks.schedule import LogSpaced

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


class Session:
    """One fit of a Trainer with monitors. The first monitor's hooks drive it; the other monitors' hooks rest.

    Args:
        trainer: The Trainer.
        monitors: Its monitors, in its order.
    """

    def __init__(self, trainer: Trainer, monitors: Sequence[Monitor]) -> None:
        self.trainer = trainer
        self.monitors = list(monitors)
        self.leader = self.monitors[0]
        self.recorder: Recorder | None = None
        self._collected: dict[Split, list[Any]] = {"train": [], "validation": []}
        self._pending: dict[Split, list[Probe]] = {"train": [], "validation": []}
        self._drawn: dict[Probe, dict[Split, Batch | None]] = {}
        #: Splits whose data can only be iterated, so that their samples go into checkpoints.
        self.iterated: set[Split] = set()
        self._figure_schedule = LogSpaced(2)
        self._next_figure_step: int | None = 0
        self._broken_loggers: set[int] = set()
        self._layout_keys: set[str] = set()

    # Lightning's hooks, in the order of a run.

    def start(self) -> None:
        """Make the Recorder, give it samples, and measure the model as it is before training."""
        for monitor in self.monitors:
            monitor.prepare_to_go_on(resuming=self.trainer.global_step > 0)
        self._rest_idle_hooks()
        with _misconfiguration():
            recorder = self.recorder = Recorder(self.trainer.lightning_module, self.monitors)
            restored = {monitor.label: monitor.restored_recorder_state() for monitor in self.monitors}
            recorder.load_state_dict({label: state for label, state in restored.items() if state is not None})
            self._drawn = {probe: self._draw(number, probe) for number, probe in enumerate(recorder.probes)}
        if self.trainer.global_step > 0:
            _loggers.mark_resumed(self.trainer.loggers, self.trainer.global_step)
        if not self._pending["train"]:
            self._bind()

    def collect(self, split: Split, batch: Any) -> None:
        """Keep a batch of data that can only be iterated, until the probes are full."""
        if self.recorder is None and split == "validation":
            # A sanity check: what is pending is not known yet.
            self._collected[split] = [tree_map(_copy, batch)]
        elif self._pending[split] and self.recorder is not None:
            self._collected[split].append(tree_map(_copy, batch))
            if split == "train":
                with _misconfiguration():
                    self._settle_train()

    def step(self) -> None:
        """Measure what is due after an optimiser step."""
        assert self.recorder is not None
        values = self.recorder.record(self.trainer.global_step)
        if values:
            self._publish(values)

    def epoch_end(self) -> None:
        """Measure what is due at the end of a training epoch, and take in the module's own metrics."""
        if self._pending["train"]:
            self._settle_train(last=True)
        self._record_event("epoch")
        self._take_in_metrics()

    def validation_epoch_end(self) -> None:
        """Measure what is due at a validation's end, before early stopping looks."""
        if self.recorder is None or self.trainer.sanity_checking:
            return
        if self._pending["validation"]:
            self._settle_validation()
        self._record_event("validation")

    def validation_end(self) -> None:
        """Take in the module's own metrics, which are complete only now."""
        if self.recorder is not None and not self.trainer.sanity_checking:
            self._take_in_metrics()

    def flush(self) -> None:
        """Have everything that was logged on disk."""
        for logger in self._working_loggers():
            self._try(logger, lambda logger=logger: _loggers.flush(logger))

    def end(self) -> None:
        """Log the last figures."""
        if self.recorder is not None and self.recorder.history:
            self._publish_figures(self.trainer.global_step)
        self.flush()

    def leave(self) -> None:
        """Undo what :meth:`start` did to the monitors."""
        for monitor in self.monitors:
            for hook in _FREQUENT_HOOKS:
                monitor.__dict__.pop(hook, None)
            monitor.session = None

    # Samples.

    def _draw(self, number: int, probe: Probe) -> dict[Split, Batch | None]:
        """A probe's samples, and a note of what can only be had from batches that pass by."""
        samples: dict[Split, Batch | None] = {}
        for split in SPLITS:
            saved = self.leader.saved_samples(number, split)
            if saved is not None:
                self.iterated.add(split)
            samples[split] = saved if saved is not None else self._sample(probe, split)
            can_come = split == "train" or self.trainer.enable_validation
            if samples[split] is None and getattr(probe, split) is None and can_come:
                self._pending[split].append(probe)
        return samples

    def _sample(self, probe: Probe, split: Split) -> Batch | None:
        loaders = self.trainer.train_dataloader if split == "train" else self.trainer.val_dataloaders

        def sample() -> Batch | None:
            if getattr(probe, split) is not None or loaders is None:
                return probe.sample(split)
            with isolated_rng(), torch.inference_mode(False), torch.no_grad():
                batches = _draw_structure(probe, loaders if split == "train" else _first_loader(loaders))
                return None if batches is None else probe.join([self._transfer(batch) for batch in batches])

        return self._from_first(sample)

    def _transfer(self, batch: Any) -> Any:
        """What the Trainer does to a batch before the module sees it, the user's transfer hooks included."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        return self.trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _from_first(self, draw: Callable[[], Batch | None]) -> Batch | None:
        """Rank 0's result on all ranks, or its error."""
        ranks = Ranks(self.trainer.strategy.root_device)
        result: Batch | ValueError | None = None
        if ranks.rank == 0:
            try:
                result = draw()
            except ValueError as error:
                result = error
        result = ranks.from_first(result)
        if isinstance(result, ValueError):
            raise result
        return result

    def _settle_train(self, *, last: bool = False) -> None:
        """Give the probes the training batches that have passed, and bind with the first."""
        recorder, batches = self.recorder, self._collected["train"]
        assert recorder is not None
        self.iterated.add("train")
        growing: list[Probe] = []
        for probe in self._pending["train"]:
            samples = self._from_first(lambda probe=probe: probe.join(batches))  # type: ignore[misc]
            assert samples is not None
            self._drawn[probe]["train"] = samples
            if len(samples) < probe.size and not last:
                growing.append(probe)
        if recorder.is_bound:
            for probe in self._pending["train"]:
                recorder.set_samples(probe, "train", self._drawn[probe]["train"], growing=probe in growing)
        else:
            self._bind(growing)
        self._pending["train"] = growing
        if not growing:
            self._collected["train"] = []

    def _settle_validation(self) -> None:
        """Give the probes their validation samples, now that a validation has run."""
        recorder, batches = self.recorder, self._collected["validation"]
        assert recorder is not None
        for probe in self._pending["validation"]:
            samples = self._sample(probe, "validation")
            if samples is None:
                samples = self._from_first(lambda probe=probe: probe.join(batches) if batches else None)  # type: ignore[misc]
                self.iterated.add("validation")
            recorder.set_samples(probe, "validation", samples)
        self._pending["validation"] = []
        self._collected["validation"] = []

    # Measuring and publishing.

    def _bind(self, growing: Sequence[Probe] = ()) -> None:
        assert self.recorder is not None
        with _misconfiguration():
            self.recorder.bind(self._drawn, start=self.trainer.global_step, growing=growing)
            # Binding may fall before the first step, or before the first one of a resumed run, which was measured already.
            self.step()

    def _record_event(self, event: Any) -> None:
        assert self.recorder is not None
        if self.recorder.is_bound:
            values = self.recorder.record(self.trainer.global_step, event=event, epoch=self.trainer.current_epoch)
            if values:
                self._publish(values)

    def _take_in_metrics(self) -> None:
        """Put into the history what the module has logged and a monitor wants to read: rank 0's values on all ranks."""
        recorder, available = self.recorder, self.trainer.callback_metrics
        if recorder is None or not recorder.is_bound:
            return
        wanted = {name for monitor in self.monitors for name in monitor.logged_metrics_wanted(available)}
        metrics = recorder.from_first({name: float(available[name]) for name in sorted(wanted)})
        if metrics:
            values = recorder.record(self.trainer.global_step, metrics=metrics)
            if values:
                self._publish(values)

    def _publish(self, values: Mapping[str, float]) -> None:
        step = self.trainer.global_step
        self.trainer.callback_metrics.update({key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()})
        for logger in self._working_loggers():
            self._try(logger, lambda logger=logger: logger.log_metrics(dict(values), step=step))
        new_keys = values.keys() - self._layout_keys
        if new_keys:
            self._layout_keys |= new_keys
            self._publish_layout()
        if self._next_figure_step is not None and step >= self._next_figure_step:
            self._next_figure_step = self._figure_schedule.next_step(step)
            self._publish_figures(step)

    def _publish_layout(self) -> None:
        assert self.recorder is not None
        charts = {monitor: self.recorder.keys_of(monitor) for monitor in self.monitors}
        layout = _loggers.layout([(monitor.question, keys) for monitor, keys in charts.items()])
        for logger in self._working_loggers():
            self._try(logger, lambda logger=logger: _loggers.add_layout(logger, layout))

    def _publish_figures(self, step: int) -> None:
        loggers = [logger for logger in self._working_loggers() if _loggers.holds_figures(logger)]
        if not loggers or self.trainer.global_rank != 0:
            return
        for monitor in self.monitors:
            try:
                figures = {f"{monitor.prefix}/{key}": figure for key, figure in monitor.figures().items()}
            except Exception as error:
                warnings.warn(f"{monitor.label} could not draw its figure: {type(error).__name__}: {error}", stacklevel=2)
                continue
            for logger in loggers:
                self._try(logger, lambda logger=logger, figures=figures: _loggers.add_figures(logger, figures, step))

    def _working_loggers(self) -> list[Any]:
        return [logger for logger in self.trainer.loggers if id(logger) not in self._broken_loggers]

    def _try(self, logger: Any, write: Any) -> None:
        """A logger that raises (a full disk, a lost connection) costs its own curves, not the run."""
        try:
            write()
        except Exception as error:
            self._broken_loggers.add(id(logger))
            warnings.warn(
                f"{type(logger).__name__} failed and gets no more measurements: {type(error).__name__}: {error}",
                stacklevel=2,
            )

    def _rest_idle_hooks(self) -> None:
        """Shadow the frequent hooks that do nothing in this run, so that Lightning skips them."""
        from grok_callbacks.callbacks.monitor import Monitor

        for monitor in self.monitors:
            for hook in _FREQUENT_HOOKS:
                implementation = getattr(type(monitor), hook)
                is_ours = implementation in (getattr(Monitor, hook), getattr(Callback, hook))
                if is_ours and (monitor is not self.leader or implementation is getattr(Callback, hook)):
                    monitor.__dict__[hook] = None


@contextmanager
def _misconfiguration() -> Iterator[None]:
    try:
        yield
    except MisconfigurationException:
        raise
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _first_loader(loaders: Any) -> Any:
    """The first of several validation loaders, which Lightning runs one after the other."""
    if isinstance(loaders, Mapping):
        return next(iter(loaders.values()))
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders


def _draw_structure(probe: Probe, loaders: Any) -> list[Any] | None:
    """Raw batches from a loader, or one batch in the structure of several training loaders."""
    if isinstance(loaders, Mapping):
        drawn = {key: _draw_structure(probe, loader) for key, loader in loaders.items()}
        return None if None in drawn.values() else [{key: batches[0] for key, batches in drawn.items() if batches}]
    if isinstance(loaders, (list, tuple)):
        parts = [_draw_structure(probe, loader) for loader in loaders]
        return None if None in parts else [[batches[0] for batches in parts if batches]]
    return probe.draw(loaders) if hasattr(loaders, "dataset") else None


def is_plain(batch: Batch) -> bool:
    """Whether a batch can be saved and loaded with ``weights_only=True``."""
    leaves = tree_flatten((batch.inputs, batch.targets))[0]
    return all(leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves)
