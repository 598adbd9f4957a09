"""The report of a real run says what the run's detector says, whatever its settings, and wherever the run was resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from grok_callbacks import EverySteps, GrokkingDetector
from grok_callbacks.report import read_run, summarize
from tests._common import events, loader, trainer
from tests.callbacks.test_detector import TRAIN, VALIDATION, Scripted

GROKS = VALIDATION["grokking"]
NAMES = ("my/fit", "my/test")


def run(logger, detector, module, epochs, ckpt_path=None):
    made = trainer([detector], max_steps=-1, max_epochs=epochs, logger=logger)
    made.fit(module, loader(8), loader(8, seed=1), ckpt_path=ckpt_path)
    return made


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (Scripted(TRAIN, GROKS), {}),
        (Scripted(TRAIN, [0.52] * 10), {"chance": 0.5}),
        (Scripted(TRAIN, [value / 2 for value in GROKS]), {"target": 0.5}),
        (Scripted(TRAIN, GROKS, NAMES), {"train_metric": NAMES[0], "validation_metric": NAMES[1], "memorized_threshold": 0.8}),
        (
            Scripted([1 - value for value in TRAIN], [1 - value for value in GROKS], NAMES),
            {
                "train_metric": NAMES[0], "validation_metric": NAMES[1], "mode": "min", "memorized_threshold": 0.01,
                "target": 0.0, "chance": 1.0,
            },
        ),
        (Scripted(TRAIN, [0.3] * 10), {"patience": 1}),
        (Scripted([0.3] * 10, [0.3] * 10), {}),
    ],
)  # fmt: skip
def test_whatever_the_settings(tmp_path, module, settings):
    detector = GrokkingDetector(schedule=EverySteps(100), **settings)
    logger = TensorBoardLogger(tmp_path)
    run(logger, detector, module, 10)
    summary = summarize(read_run(tmp_path))
    assert summary.outcome == detector.outcome is not None
    assert summary.events == detector.tracker.events
    assert summary.remarks == []


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
@pytest.mark.parametrize("stop", [5, 7, 9])
def test_a_run_that_is_resumed_into_a_folder_of_its_own(tmp_path, kind, stop):
    """As Lightning's loggers do it unless told otherwise."""
    first = run(kind(tmp_path), GrokkingDetector(), Scripted(TRAIN, GROKS), stop)
    first.save_checkpoint(tmp_path / "x.ckpt")
    detector = GrokkingDetector()
    resumed = run(kind(tmp_path), detector, Scripted(TRAIN, GROKS), 10, tmp_path / "x.ckpt")
    assert (detector.memorized_step, detector.onset_step, detector.grokked_step) == (3, 6, 8)
    folders = [Path(made.logger.log_dir) for made in (first, resumed)]
    assert folders[0] != folders[1]
    summary = summarize(read_run(folders[1]))
    assert summary.events == detector.tracker.events
    assert summary.outcome == "grokking"
    assert f"begin at step {stop}" in summary.remarks[0]


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_run_that_is_resumed_into_its_own_folder(tmp_path, kind):
    """TensorBoard's curves go on, and have each event once; of a table Lightning keeps only what is logged from then on."""

    def logger():
        return kind(tmp_path, name="", version="")

    made = run(logger(), GrokkingDetector(), Scripted(TRAIN, GROKS), 6)
    made.save_checkpoint(tmp_path / "x.ckpt")
    detector = GrokkingDetector()
    run(logger(), detector, Scripted(TRAIN, GROKS), 10, tmp_path / "x.ckpt")
    assert summarize(read_run(tmp_path)).events == detector.tracker.events
    if kind is TensorBoardLogger:
        assert events(tmp_path)["grok/onset/memorized_step"] == [(4, 3.0)]
