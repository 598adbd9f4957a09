"""Between measurements a batch costs a countdown; what is due, and what a checkpoint knows, must not hang on it."""

from __future__ import annotations

from contextlib import nullcontext

import lightning.pytorch as L
import pytest
import torch

from grok_callbacks import EverySteps, LogSpaced, Recorder
from tests._common import Counting, Plain, fit, loader


class Twice(Plain):
    """Two optimiser steps a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()


class Gappy:
    """Every second batch is missing."""

    def __iter__(self):
        return (batch for each in loader() for batch in (each, None))


class Watching(L.Callback):
    """The steps that had been made at the end of each batch."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *args):
        self.steps.append(trainer.global_step)


def due(schedule, steps):
    """The first of these steps at or after each planned one, and step 0."""
    found, planned = [0], schedule.next_step(0)
    for step in steps:
        if step >= planned:
            found.append(step)
            planned = schedule.next_step(step)
    return found


@pytest.mark.filterwarnings("ignore:.*yielded None")
@pytest.mark.parametrize("schedule", [EverySteps(1), EverySteps(3), EverySteps(7), LogSpaced()], ids=repr)
@pytest.mark.parametrize(
    ("module", "gaps", "kwargs"),
    [(Plain, False, {}), (Plain, False, {"accumulate_grad_batches": 3}), (Twice, False, {}), (Plain, True, {})],
    ids=["a step a batch", "gradient accumulation", "two steps a batch", "batches that are missing"],
)
def test_all_that_is_due_is_measured(schedule, module, gaps, kwargs):
    monitor, watching = Counting(schedule=schedule), Watching()
    fit([monitor, watching], module(), Gappy() if gaps else loader(), max_steps=40, **kwargs)
    assert watching.steps[-1] >= 40
    assert (len(set(watching.steps)) < len(watching.steps)) == (gaps or "accumulate_grad_batches" in kwargs)
    assert monitor.steps == due(schedule, watching.steps)


def test_batches_are_passed_over(monkeypatch):
    record, steps = Recorder.record, []
    monkeypatch.setattr(Recorder, "record", lambda self, step, **kwargs: steps.append(step) or record(self, step, **kwargs))
    fit([Counting(schedule=EverySteps(50))], max_steps=120, train=loader(8 * 120))
    # At the start, at the end of the first batch, when it is seen how the module optimises, what is due, and the epoch's end.
    assert steps == [0, 1, 50, 100, 120]


class Saving(L.Callback):
    """Saves checkpoints at a hook, and keeps up to which step the Recorder knew of each; the last one stays."""

    def __init__(self, hook, path):
        self.known = {}

        def save(trainer, *args):
            trainer.save_checkpoint(path)
            states = torch.load(path, weights_only=True)["callbacks"].values()
            self.known[trainer.global_step] = [state["recorder"]["seen"] for state in states]

        setattr(self, hook, save)


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_train_batch_end"])
def test_checkpoints_know_all_steps(hook, tmp_path):
    saving = Saving(hook, tmp_path / "x.ckpt")
    monitors = [Counting(schedule=EverySteps(10)), Counting(prefix="b", schedule=EverySteps(12))]
    fit([*monitors, saving], max_steps=30)
    assert len(saving.known) == 30
    assert all(known == [step, step] for step, known in saving.known.items())
    # Saving leaves the plan as it was.
    assert [monitor.steps for monitor in monitors] == [[0, 10, 20, 30], [0, 12, 24]]


def test_a_checkpoint_between_a_step_and_its_measurement_leaves_it_to_be_made(tmp_path):
    saving = Saving("on_train_batch_end", tmp_path / "x.ckpt")
    # The callback that saves comes first.
    fit([saving, Counting(schedule=EverySteps(9))], max_steps=18)
    assert all(known == [step - (step % 9 == 0)] for step, known in saving.known.items())
    resumed = Counting(schedule=EverySteps(9))
    fit([resumed], max_steps=28, ckpt_path=tmp_path / "x.ckpt")
    assert resumed.steps == [0, 9, 18, 27]


@pytest.mark.parametrize("ends", ["in peace", "early"])
def test_a_run_that_has_ended_knows_all_steps(ends):
    class Stopping(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 17 and ends == "early":
                raise RuntimeError("on purpose")

    monitor = Counting(schedule=EverySteps(10))
    with pytest.raises(RuntimeError, match="on purpose") if ends == "early" else nullcontext():
        fit([monitor, Stopping()], max_steps=17)
    assert monitor.state_dict()["recorder"]["seen"] == 17


def test_a_resumed_run_with_another_schedule_goes_on_from_where_it_was(tmp_path):
    fit([Counting(schedule=EverySteps(20)), Saving("on_train_batch_end", tmp_path / "x.ckpt")], max_steps=17)
    resumed = Counting(schedule=EverySteps(20))
    # Afterwards: a monitor that was made with another schedule would not find its state.
    resumed.schedule = EverySteps(4)
    fit([resumed], max_steps=25, ckpt_path=tmp_path / "x.ckpt")
    assert resumed.steps == [0, 20, 24]
