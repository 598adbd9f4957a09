"""Full disks, folders that cannot be written, loggers that raise: training goes on, or ends as it would without monitors."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import warnings

import pytest
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
def tmpfs(tmp_path):
    """A real disk of 8 KiB, where mounting one is allowed."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", tmp_path], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


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
def test_a_disk_that_is_full(tmpfs, make):
    module, other = Quiet(), Memory()
    broken = CSVLogger(tmpfs, flush_logs_every_n_steps=1) if make is CSVLogger else TensorBoardLogger(tmpfs)
    callbacks, messages = fit_quietly(module, [broken, other])
    assert len(messages) == 1, messages
    assert make.__name__ in messages[0]
    assert "No space left" in messages[0]
    assert len(module.losses) == STEPS
    assert_everything_is_in(other, callbacks)
    # What was written before is there to be read.
    written = read_run(tmpfs)["grok/norm"]
    assert 0 < len(written) < STEPS
    assert written.steps == list(range(len(written)))


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_a_disk_that_fills_up_amid_the_run_and_is_emptied(tmp_path, make):
    """The logger has had its warning; the run ends in peace, whatever the logger still holds."""
    module, other = Quiet(), Memory()
    broken = CSVLogger(tmp_path, flush_logs_every_n_steps=1) if make is CSVLogger else TensorBoardLogger(tmp_path)
    with full_after(4000):
        callbacks, messages = fit_quietly(module, [broken, other])
    assert len(messages) == 1
    assert make.__name__ in messages[0]
    assert len(module.losses) == STEPS
    assert_everything_is_in(other, callbacks)


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
