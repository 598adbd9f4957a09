"""Killed at any moment, resumed from its last checkpoint: in the end the curves are those of a run that was left alone."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from grok_callbacks import EverySteps, NormMonitor
from grok_callbacks.report import read_run, summarize
from tests._common import events, fit

ROOT = Path(__file__).parents[2]
KILLS, SEED = 20, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An uninterrupted run, and one that was killed again and again."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults._killed", str(folder), str(KILLS), str(SEED)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=folder,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def outcome(folder):
    return json.loads((folder / "outcome.json").read_text())


def test_it_was_killed_in_many_places(outcome):
    assert [signal for _, _, signal in outcome["kills"]] == [9] * KILLS, outcome
    assert outcome["last"] == ["done", 0]
    steps = [int(told) for _, told, _ in outcome["kills"] if told]
    assert len(set(steps)) > KILLS // 2
    assert any(int(told) > start for start, told, _ in outcome["kills"] if told), "no step was taken twice"


def test_the_events_are_those_of_the_uninterrupted_run(folder, outcome):
    whole, killed = read_run(folder / "whole"), read_run(folder / "killed")
    assert set(killed) == set(whole)
    assert len([key for key in whole if key.startswith("grok/")]) > 20
    assert whole["grok/steps"].steps == list(range(111))
    for key in whole:
        found, wanted = (_by_step(zip(run[key].steps, run[key].values, strict=True)) for run in (killed, whole))
        assert len(found) == len(killed[key].steps), (key, outcome)
        assert found == (wanted if key.startswith("grok/") else _those_left(wanted, found)), (key, outcome)


def test_tensorboards_curves_do_not_go_back(folder):
    """Its own reader drops what a killed process logged later than the checkpoint that the next one went on from."""
    whole, killed = events(folder / "whole" / "events"), events(folder / "killed" / "events")
    assert set(killed) == set(whole)
    for key, series in whole.items():
        steps, values = zip(*killed[key], strict=True)
        # A checkpoint's own step may stand there twice: some of it was measured before the checkpoint, some behind.
        assert list(steps) == sorted(steps), key
        found, wanted = _by_step(zip(steps, values, strict=True)), _by_step(series)
        assert found == (wanted if key.startswith("grok/") else _those_left(wanted, found)), key


def _by_step(series):
    """Values exactly, where NaN is NaN."""
    return {step: struct.pack("<d", value) for step, value in series}


def _those_left(wanted, found):
    """Of a curve of Lightning's own, which it logs after the checkpoint of that step: a kill in between loses the point.

    With twenty kills that may happen to one or two.
    """
    assert len(found) >= len(wanted) - 2
    return {step: value for step, value in wanted.items() if step in found}


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_what_a_checkpoint_knows_is_on_disk(tmp_path, monkeypatch, kind):
    """However long a disk takes: a kill right behind the checkpoint loses nothing of what came before."""
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: [time.sleep(0.01), write(self, data)])
    found, monitor = [], NormMonitor(schedule=EverySteps(1))

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step in (3, 7):
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                found.append((read_run(tmp_path)["grok/norm"].steps, list(monitor.history["grok/norm"].steps)))

    fit([monitor, Look()], max_steps=9, logger=kind(tmp_path, name="", version=""))
    assert found == [(list(range(4)), list(range(4))), (list(range(8)), list(range(8)))]


# Files as a kill, a full disk or a bad one leaves them.


@pytest.fixture
def written(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for step in range(8):
        writer.add_scalar("grok/norm", 8.0 - step, step)
    writer.close()
    (file,) = tmp_path.glob("events*")
    return file


def test_a_file_that_is_cut_off_anywhere_gives_what_is_complete(written):
    content, lengths = written.read_bytes(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in range(len(content) + 1):
            written.write_bytes(content[:size])
            series = read_run(written.parent).get("grok/norm")
            assert series is None or series.values == [8.0 - step for step in range(len(series))]
            lengths.append(0 if series is None else len(series))
    assert lengths == sorted(lengths)
    assert set(lengths) == set(range(9))


def test_a_damaged_file_gives_what_comes_before(written):
    content = written.read_bytes()
    chance, warned = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        written.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            series = read_run(written.parent).get("grok/norm")
        assert series is None or series.values == [8.0 - step for step in range(len(series))]
        warned += any("is damaged" in str(warning.message) for warning in caught)
    # Where the damage is in a record's length, nothing tells it from a file that was cut off.
    assert warned > 75


def test_files_that_are_none(tmp_path):
    for number, content in enumerate([b"", b"\0" * 100, random.Random(0).randbytes(5000)]):
        (tmp_path / f"events.out.tfevents.{number}").write_bytes(content)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is damaged")
        assert not read_run(tmp_path)
    summarize(read_run_quietly(tmp_path))


def read_run_quietly(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_run(folder)


def test_two_processes_of_one_second(tmp_path):
    """Their files' names come in any order."""
    for name, values in (("b", [1.0, 2.0, 3.0]), ("a", [5.0])):
        writer = SummaryWriter(str(tmp_path / name))
        for step, value in enumerate(values, start=3 - len(values)):
            writer.add_scalar("grok/norm", value, step)
        writer.close()
        (file,) = (tmp_path / name).glob("events*")
        file.rename(tmp_path / f"events.out.tfevents.1.{name}")
        (tmp_path / name).rmdir()
    assert read_run(tmp_path)["grok/norm"].values == [1.0, 2.0, 5.0]


def test_a_table_that_is_cut_off_anywhere(tmp_path):
    logger = CSVLogger(tmp_path)
    for step in range(3):
        logger.log_metrics({"grok/norm": 100.25 + step, "loss": math.nan}, step=step)
    logger.save()
    file = Path(logger.log_dir, "metrics.csv")
    content = file.read_bytes()
    for size in range(len(content) + 1):
        file.write_bytes(content[:size])
        series = read_run(tmp_path).get("grok/norm")
        assert series is None or series.values == [100.25 + step for step in range(len(series))]
    assert len(series) == 3


def test_a_table_that_is_none(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"step,grok/norm\r\n1,2,3,4\r\nx,1\r\n2,word\r\n\xff\x00,1\r\ninf,1\r\n4,7.5\r\n")
    with pytest.warns(UserWarning, match="rows are left out whose step no run can have reached, 1 of them"):
        assert read_run(tmp_path)["grok/norm"].steps == [1, 4]
