"""One run, three loggers at once: each holds every measurement, at its own step, and the figures that it can show."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from grok_callbacks import EverySteps, GrokkingDetector, LinearMappingNumberMonitor, Monitor, NormMonitor
from tests._common import Plain, events, fit, loader

matplotlib.use("Agg")

_BLOCK = 32768
_HAS_WANDB = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not _HAS_WANDB, reason="wandb is not installed")


class Kinds(Monitor):
    """Everything that a measure may return."""

    def measure(self, snapshot):
        values = {
            "kinds/float": 0.1 + snapshot.step,
            "kinds/int": snapshot.step,
            "kinds/bool": True,
            "kinds/numpy": np.float32(0.1),
            "kinds/double": torch.tensor(1 / 3, dtype=torch.float64),
            "kinds/half": torch.tensor([0.5], dtype=torch.float16),
            "kinds/count": torch.tensor(2**40),
            "kinds/huge": 1e300,
            "kinds/nan": math.nan,
            "kinds/inf": math.inf,
            "kinds/-inf": -math.inf,
        }
        # Some keys come later than others.
        return values if snapshot.step < 6 else {**values, "kinds/late": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The loggers and what was measured."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("loggers")
    loggers = {"tensorboard": TensorBoardLogger(folder), "csv": CSVLogger(folder, "csv")}
    schedule = EverySteps(3)
    monitors = [Kinds(schedule=schedule), NormMonitor(), GrokkingDetector(), LinearMappingNumberMonitor(schedule=schedule)]
    with pytest.MonkeyPatch.context() as patch:
        if _HAS_WANDB:
            for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
                patch.setenv(f"WANDB_{name}", str(folder / "wandb_home"))
            patch.setenv("WANDB_SILENT", "true")
            patch.setenv("WANDB_CONSOLE", "off")
            loggers["wandb"] = WandbLogger(save_dir=folder, offline=True)
        with pytest.warns(UserWarning, match="Kinds.*: grok/kinds/nan is nan at step 0; said once"):
            fit(
                monitors, Plain(logs=True), validation=loader(8), logger=list(loggers.values()), max_steps=30,
                log_every_n_steps=1,
            )  # fmt: skip
        if _HAS_WANDB:
            import wandb

            wandb.finish()
    measured = {key: series for key, series in monitors[0].history.items() if key.startswith("grok/")}
    assert {len(series.steps) for series in measured.values()} >= {11, 9}
    return loggers, measured, folder


def same(found, series, *, single=False):
    steps, values = zip(*found, strict=True)
    with np.errstate(over="ignore"):
        expected = np.float32(series.values) if single else np.asarray(series.values)
    return list(steps) == series.steps and np.array_equal(np.asarray(values, dtype=expected.dtype), expected, equal_nan=True)


def test_tensorboard(run):
    loggers, measured, _ = run
    written = events(loggers["tensorboard"].log_dir)
    assert all(same(written[key], series, single=True) for key, series in measured.items())


def test_figures_in_tensorboard(run):
    loggers, _, _ = run
    accumulator = EventAccumulator(loggers["tensorboard"].log_dir, size_guidance={IMAGES: 0}).Reload()
    (tag,) = [tag for tag in accumulator.Tags()[IMAGES] if "lmn" in tag]
    assert [event.step for event in accumulator.Images(tag)] == [30]


def test_csv(run):
    loggers, measured, _ = run
    with Path(loggers["csv"].log_dir, "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for key, series in measured.items():
        assert same([(int(row["step"]), float(row[key])) for row in rows if row[key]], series), key
    # What the module logs is there as well, and stands where Lightning puts it.
    assert [int(row["step"]) for row in rows if row["val_acc"]] == list(range(3, 30, 4))


def records(path):
    """The records of a wandb file: a LevelDB log of protocol buffers, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # A whole record, or the last part of one.
            yield Record.FromString(parts)
            parts = b""


@pytest.fixture(scope="module")
def history(run):
    """The rows of the offline run, as they would be sent."""
    (path,) = run[2].rglob("run-*.wandb")
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.HasField("history")
    ]


@needs_wandb
def test_wandb(run, history):
    _, measured, _ = run
    for key, series in measured.items():
        assert same([(row["trainer/global_step"], row[key]) for row in history if key in row], series), key
    assert [row["trainer/global_step"] for row in history if "val_acc" in row] == list(range(3, 30, 4))


@needs_wandb
def test_figures_in_wandb(run, history):
    key = "grok/lmn_connectivity/net.0"
    (row,) = [row for row in history if f"{key}/filenames" in row]
    assert row["trainer/global_step"] == 30
    assert row[f"{key}/count"] == 1
    (picture,) = run[2].rglob(row[f"{key}/filenames"][0])
    assert picture.stat().st_size > 5000
