"""Between measurements a batch costs a countdown; what is due, and what a checkpoint knows, must not hang on it."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch

from grok_callbacks import EverySteps, LogSpaced
from tests._common import Counting, Plain, fit


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


class Skipping(Plain):
    """Now and then a batch without a loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss


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


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("schedule", [EverySteps(1), EverySteps(3), EverySteps(7), LogSpaced()], ids=repr)
@pytest.mark.parametrize(
    ("module", "kwargs"),
    [(Plain, {}), (Plain, {"accumulate_grad_batches": 3}), (Twice, {}), (Skipping, {})],
    ids=["a step a batch", "a step every third batch", "two steps a batch", "batches without a loss"],
)
def test_all_that_is_due_is_measured(schedule, module, kwargs):
    monitor, watching = Counting(schedule=schedule), Watching()
    fit([monitor, watching], module(), max_steps=40, **kwargs)
    assert watching.steps[-1] == 40
    assert monitor.steps == due(schedule, watching.steps)


class Saving(L.Callback):
    """Saves a checkpoint at a hook, and keeps how many steps the Recorder knew of there."""

    def __init__(self, hook, path):
        self.known = {}

        def save(trainer, *args):
            trainer.save_checkpoint(path)
            states = torch.load(path, weights_only=True)["callbacks"].values()
            self.known[trainer.global_step] = [state["recorder"]["seen"] for state in states]

        setattr(self, hook, save)


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_train_batch_end"])
def test_checkpoints_know_all_steps(hook, tmp_path):
    schedules = [EverySteps(10), EverySteps(12)]
    saving = Saving(hook, tmp_path / "x.ckpt")
    monitors = [Counting(schedule=schedules[0]), Counting(prefix="b", schedule=schedules[1])]
    fit([*monitors, saving], max_steps=30)
    assert len(saving.known) == 30
    assert all(known == [step, step] for step, known in saving.known.items())
    # Saving leaves the plan as it was.
    assert [monitor.steps for monitor in monitors] == [[0, 10, 20, 30], [0, 12, 24]]


class Stopping(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 17:
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("ends", ["in peace", "early"])
def test_a_run_that_has_ended_knows_all_steps(ends):
    monitor = Counting(schedule=EverySteps(10))
    if ends == "in peace":
        fit([monitor], max_steps=17)
    else:
        with pytest.raises(RuntimeError, match="on purpose"):
            fit([monitor, Stopping()], max_steps=30)
    assert monitor.state_dict()["recorder"]["seen"] == 17


def test_a_resumed_run_with_another_schedule_goes_on_from_where_it_was(tmp_path):
    saving = Saving("on_train_end", tmp_path / "x.ckpt")
    saving.on_train_end = lambda trainer, *args: trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit([Counting(schedule=EverySteps(20)), saving], max_steps=17)
    resumed = Counting(schedule=EverySteps(20))
    resumed.schedule = EverySteps(4)
    fit([resumed], max_steps=25, ckpt_path=tmp_path / "x.ckpt")
    assert resumed.steps == [0, 20, 24]
