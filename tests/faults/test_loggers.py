"""Full disks, folders that cannot be written, loggers that raise: training goes on, or ends as it would without monitors."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
import sys
import warnings

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from grok_callbacks import EverySteps, Monitor, default_callbacks
from grok_callbacks.report import read_run
from tests._common import Counting, Plain, fit, loader

# The event writer's thread ends with the error of the disk; it says so in its own way.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
STEPS = 40


class Quiet(Plain):
    """Logs nothing itself, so that all that is written is the monitors'."""


@contextlib.contextmanager
def full_after(size):
    """No file of this process may become larger: writes beyond fail, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def disk(tmp_path):
    """Makes real disks of a size, where mounting one is allowed."""
    mounted = []

    def make(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


class Logs(Plain):
    """Logs its loss at every step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss


class Fills(L.Callback):
    """Leaves nothing of a disk from a step on."""

    def __init__(self, folder, at):
        self.folder, self.at = folder, at

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.at:
            with (self.folder / "others").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * 4096)


def make_logger(make, folder):
    return CSVLogger(folder, flush_logs_every_n_steps=1) if make is CSVLogger else TensorBoardLogger(folder)


def fit_quietly(module, loggers, callbacks=None):
    callbacks = default_callbacks("economy", schedule=EverySteps(1)) if callbacks is None else callbacks
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callbacks, module, validation=loader(8), logger=loggers, max_steps=STEPS)
    return callbacks, [str(warning.message) for warning in caught if "gets no more measurements" in str(warning.message)]


class Memory(Logger):
    name, version = "memory", 0

    def __init__(self, fails=()):
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}
        self.fails, self.finalized = fails, 0

    def _maybe_fail(self, what):
        if what in self.fails and self.logged:
            raise RuntimeError(f"no {what}")

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if len(self.logged) > 5:
            self._maybe_fail("log_metrics")
        self.logged.setdefault(step, {}).update(metrics)

    def save(self):
        self._maybe_fail("save")

    def finalize(self, status):
        self.finalized += 1
        self._maybe_fail("finalize")


def assert_everything_is_in(memory, callbacks):
    assert list(memory.logged) == list(range(STEPS + 1))
    for key, series in callbacks[0].history.items():
        assert [step for step, values in memory.logged.items() if key in values] == series.steps


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
@pytest.mark.parametrize("full_at", [0, 10])
def test_a_disk_that_is_full(disk, make, full_at):
    folder, other = disk("20m"), Memory()
    module = Quiet()
    callbacks = [*default_callbacks("economy", schedule=EverySteps(1)), Fills(folder, full_at)]
    _, messages = fit_quietly(module, [make_logger(make, folder), other], callbacks)
    assert len(messages) == 1, messages
    assert f"{make.__name__} gets no more measurements: less than 16 MiB are left on its disk" in messages[0]
    assert len(module.losses) == STEPS
    assert_everything_is_in(other, callbacks)
    # What was written before is there to be read.
    written = read_run(folder)["grok/norm"]
    assert written.steps == list(range(full_at + 1))


def how_it_ends(folder, make, callbacks, steps):
    """Its error, down to the first cause, and its losses."""
    torch.manual_seed(0)
    module, error = Logs(), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fit(callbacks, module, logger=make_logger(make, folder), max_steps=steps, log_every_n_steps=1)
        except Exception as raised:
            error = raised
            while error.__cause__ is not None:
                error = error.__cause__
    return repr(error), module.losses


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
@pytest.mark.parametrize("size", ["8k", "64k"])
def test_measurements_take_no_room_that_a_module_needs_which_logs(disk, make, size):
    """On the smaller disk the run ends with one error, with and without us; on the larger one it finishes."""
    callbacks = default_callbacks("economy", schedule=EverySteps(1))
    (error, losses), (our_error, our_losses) = (how_it_ends(disk(size), make, each, 400) for each in ([], callbacks))
    assert (len(losses) < 400) == ("No space left" in error) == (size == "8k")
    assert our_error == error
    # TensorBoard's thread writes later than the module logs, by up to ten values.
    assert abs(len(our_losses) - len(losses)) <= 10
    shorter = min(len(losses), len(our_losses))
    assert our_losses[:shorter] == losses[:shorter]


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_a_disk_that_others_fill_ends_a_module_that_logs_as_it_would_without_us(disk, make):
    """To the step, that depends on what is left of the file's last block."""
    ends = []
    for callbacks in ([], default_callbacks("economy", schedule=EverySteps(1))):
        folder = disk("20m")
        ends.append(how_it_ends(folder, make, [Fills(folder, 10), *callbacks], 1000))
    (error, losses), (our_error, our_losses) = ends
    assert "No space left" in error
    assert our_error == error
    shorter = min(len(losses), len(our_losses))
    assert 11 < shorter < 1000
    assert our_losses[:shorter] == losses[:shorter]


@pytest.mark.parametrize("free", [(0, 0, 0), OSError("gone")])
def test_a_disk_that_tells_nothing_of_its_room_is_written_to(tmp_path, monkeypatch, free):
    def disk_usage(folder):
        if isinstance(free, Exception):
            raise free
        return shutil._ntuple_diskusage(*free)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    _, messages = fit_quietly(Quiet(), [TensorBoardLogger(tmp_path)])
    assert not messages
    assert read_run(tmp_path)["grok/norm"].steps == list(range(STEPS + 1))


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_a_disk_that_fills_up_amid_the_run_and_is_emptied(tmp_path, make):
    """A quota, of which the disk does not tell; the run ends in peace, whatever the logger still holds."""
    module, other = Quiet(), Memory()
    broken = make_logger(make, tmp_path)
    with full_after(4000):
        callbacks, messages = fit_quietly(module, [broken, other])
    assert len(messages) == 1
    assert f"{make.__name__} failed and gets no more measurements: OSError" in messages[0]
    assert len(module.losses) == STEPS
    assert_everything_is_in(other, callbacks)
    written = read_run(tmp_path)["grok/norm"]
    assert 0 < len(written) < STEPS
    assert written.steps == list(range(len(written)))


def outcome(logger, callbacks):
    module = Plain(logs=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(callbacks, module, validation=loader(8), logger=logger, max_steps=4, log_every_n_steps=1)
    except Exception as error:
        return type(error), len(module.losses)
    return None, len(module.losses)


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_a_folder_that_cannot_be_made_ends_the_run_as_lightning_alone_does(tmp_path, make):
    (tmp_path / "file").write_text("in the way")
    plain = outcome(make(tmp_path / "file" / "logs"), [])
    assert plain[0] is not None
    assert outcome(make(tmp_path / "file" / "logs"), default_callbacks("economy")) == plain


FAILURES = [("log_metrics",), ("save",), ("finalize",), ("log_metrics", "finalize"), ("log_metrics", "save", "finalize")]


@pytest.mark.parametrize("fails", FAILURES, ids="+".join)
def test_a_logger_that_raises(fails):
    """Of a logger that nobody else uses, only the monitors' own use can make it raise."""
    module, broken, other = Quiet(), Memory(fails), Memory()
    if fails == ("finalize",):
        # Lightning calls it, whoever has logged.
        with pytest.raises(RuntimeError):
            fit_quietly(module, [broken, other])
        assert len(module.losses) == STEPS
        return
    callbacks, messages = fit_quietly(module, [broken, other])
    assert len(messages) == 1
    assert "Memory failed" in messages[0]
    assert len(module.losses) == STEPS
    assert_everything_is_in(other, callbacks)
    assert broken.finalized == other.finalized == 1


def test_a_logger_that_has_failed_is_tried_again_by_the_next_fit():
    broken = Memory(("save",))
    fit_quietly(Quiet(), [broken])
    broken.fails, broken.logged = (), {}
    callbacks, messages = fit_quietly(Quiet(), [broken])
    assert not messages
    assert_everything_is_in(broken, callbacks)
    broken.fails = ("finalize",)
    with pytest.raises(RuntimeError, match="no finalize"):
        broken.finalize("success")


class Drawing(Monitor):
    def measure(self, snapshot):
        return {"value": 1.0}

    def figures(self):
        raise KeyError("no axes")


def test_figures_that_raise_are_said_once_a_time(tmp_path):
    counting = Counting(schedule=EverySteps(1))
    with pytest.warns(UserWarning, match=r"Drawing.* could not draw its figure: KeyError") as caught:
        module, _ = fit([Drawing(schedule=EverySteps(1)), counting], logger=TensorBoardLogger(tmp_path), max_steps=5)
    assert sum("could not draw" in str(warning.message) for warning in caught) == 1
    assert len(module.losses) == 5
    assert counting.steps == list(range(6))


if sys.platform != "linux":
    pytestmark = [pytestmark, pytest.mark.skip(reason="limits of file sizes and mounts are Linux's")]
