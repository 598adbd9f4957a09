"""Several fits in one folder: those that ended keep their curves, those that were interrupted are continued."""

from __future__ import annotations

import warnings

import lightning.pytorch as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from grok_callbacks import EverySteps
from grok_callbacks._fits import mark_begun, mark_ended, was_interrupted
from grok_callbacks.report import read_run
from tests._common import Counting, Plain, events, fit, loader

LONG, SHORT = 12, 5


@pytest.fixture(autouse=True)
def _files_in_order(monkeypatch):
    """TensorBoard reads files by their names; those of one second end in a counter, of which 10 would stand before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


class Told(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


class Fails(L.Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == LONG:
            raise RuntimeError("power cut")


def run(folder, steps, *more, monitored=True, logger=None):
    callbacks = [Counting(schedule=EverySteps(1))] if monitored else []
    logger = logger or TensorBoardLogger(folder, name="", version="")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Checkpoint directory.*|.*logs_dir|.*hparams")
        fit([*callbacks, *more], Told(), loader(), logger=logger, max_steps=steps, log_every_n_steps=1)


def interrupt(folder):
    with pytest.raises(RuntimeError, match="power cut"):
        run(folder, LONG + 1, Fails())


def steps_of(folder, key):
    return [step for step, _ in events(folder)[key]]


@pytest.mark.parametrize("one_logger", [False, True])
def test_a_second_fit_leaves_the_first_ones_curves(tmp_path, one_logger):
    logger = TensorBoardLogger(tmp_path, name="", version="") if one_logger else None
    run(tmp_path, LONG, logger=logger)
    run(tmp_path, SHORT, logger=logger)
    assert steps_of(tmp_path, "train_loss") == [*range(LONG), *range(SHORT)]
    assert steps_of(tmp_path, "grok/count") == [*range(LONG + 1), *range(SHORT + 1)]


def test_the_report_is_about_the_last_fit(tmp_path):
    run(tmp_path, LONG)
    run(tmp_path, SHORT)
    series = read_run(tmp_path)
    assert series["train_loss"].steps == list(range(SHORT))
    assert series["grok/count"].steps == list(range(SHORT + 1))
    last = events(tmp_path)["train_loss"][-SHORT:]
    assert list(zip(series["train_loss"].steps, series["train_loss"].values, strict=True)) == last


def test_a_fit_that_was_interrupted_before_its_first_checkpoint_is_begun_again(tmp_path):
    interrupt(tmp_path)
    run(tmp_path, SHORT)
    # The step before training stands there twice.
    assert steps_of(tmp_path, "train_loss") == [0, *range(SHORT)]
    # What has ended has, whatever was interrupted before it.
    run(tmp_path, SHORT)
    assert steps_of(tmp_path, "train_loss") == [0, *range(SHORT), *range(SHORT)]


def test_a_fit_without_monitors_is_left_alone(tmp_path):
    run(tmp_path, LONG, monitored=False)
    run(tmp_path, SHORT)
    assert steps_of(tmp_path, "train_loss") == [*range(LONG), *range(SHORT)]


def test_marks_are_in_the_order_of_time_not_of_names(tmp_path, monkeypatch):
    assert not was_interrupted(tmp_path)
    for second, (name, mark) in enumerate([("c", "begun"), ("a", "ended"), ("b", "begun")]):
        monkeypatch.setattr("time.time_ns", lambda second=second: second * 10**9)
        writer = SummaryWriter(str(tmp_path / name))
        mark_begun(writer, 0, goes_on=False) if mark == "begun" else mark_ended(writer, 5)
        writer.close()
        (file,) = (tmp_path / name).glob("events*")
        file.rename(tmp_path / f"events.out.tfevents.{name}")
        assert was_interrupted(tmp_path) == (mark == "begun")


def test_files_that_tell_nothing(tmp_path):
    for number, content in enumerate([b"", b"\0" * 100, b"grok_callbacks: fit begun at soon"]):
        (tmp_path / f"events.out.tfevents.{number}").write_bytes(content)
    (tmp_path / "events.out.tfevents.folder").mkdir()
    assert not was_interrupted(tmp_path)
