from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import lightning.pytorch as L
import matplotlib
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import IMAGES, TENSORS, EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

from grok_callbacks import (
    EveryEpoch,
    EverySteps,
    GrokkingDetector,
    LogSpaced,
    Monitor,
    NormMonitor,
    WeightEntropyMonitor,
    default_callbacks,
)
from grok_callbacks.callbacks._loggers import layout
from grok_callbacks.measures import QUESTIONS
from tests._common import Classifier, Counting, Plain, events, fit, loader

matplotlib.use("Agg")


@pytest.mark.parametrize("log_every_n_steps", [1, 50])
def test_every_measurement_is_in_the_event_file_at_its_own_step(tmp_path, log_every_n_steps):
    callbacks = default_callbacks("economy")
    logger = TensorBoardLogger(tmp_path)
    fit(
        callbacks, Classifier(logs=True), validation=loader(8), logger=logger, max_steps=45, log_every_n_steps=log_every_n_steps
    )
    written = events(logger.log_dir)
    history = callbacks[0].history
    measured = {key: series for key, series in history.items() if key.startswith("grok/")}
    assert measured["grok/norm"].steps == [step for step in _steps(LogSpaced()) if step <= 45]
    for key, series in measured.items():
        assert [step for step, _ in written[key]] == series.steps
        assert [value for _, value in written[key]] == pytest.approx(series.values, rel=1e-6, nan_ok=True)


def _steps(schedule):
    step, steps = -1, []
    while step < 1000:
        step = schedule.next_step(step)
        steps.append(step)
    return steps


def test_csv_files(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = NormMonitor(schedule=EverySteps(3))
    fit([monitor], logger=logger, max_steps=10)
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): float(row["grok/norm"]) for row in csv.DictReader(file) if row["grok/norm"]}
    series = monitor.history["grok/norm"]
    assert list(rows) == series.steps == [0, 3, 6, 9]
    assert list(rows.values()) == pytest.approx(series.values)


class Memory(Logger):
    """A logger of the user's own, that may break."""

    def __init__(self, breaks_at=None, where="log_metrics"):
        super().__init__()
        self.logged, self.breaks_at, self.where, self.saves = [], breaks_at, where, 0

    name, version = "memory", 0

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if self.where == "log_metrics" and self.breaks_at is not None and step >= self.breaks_at:
            raise OSError("no space left")
        self.logged.append((step, dict(metrics)))

    def finalize(self, status):
        pass

    def save(self):
        if self.where == "save" and self.logged:
            raise OSError("connection lost")
        self.saves += 1


def test_several_loggers(tmp_path):
    loggers = [TensorBoardLogger(tmp_path), Memory(), Memory()]
    fit([Counting()], logger=loggers, max_steps=4)
    expected = [(step, step + 1.0) for step in range(5)]
    assert events(loggers[0].log_dir)["grok/count"] == expected
    for logger in loggers[1:]:
        assert [(step, values["grok/count"]) for step, values in logger.logged if "grok/count" in values] == expected


def test_a_logger_that_raises_costs_its_own_curves_only():
    broken, whole = Memory(breaks_at=3), Memory()
    with pytest.warns(UserWarning, match="Memory failed and gets no more measurements: OSError: no space left") as caught:
        module, _ = fit([Counting()], logger=[broken, whole], max_steps=8)
    assert sum("gets no more measurements" in str(warning.message) for warning in caught) == 1
    assert len(module.losses) == 8
    assert [step for step, _ in broken.logged] == [0, 1, 2]
    assert [step for step, _ in whole.logged] == list(range(9))


def test_a_logger_that_cannot_save():
    with pytest.warns(UserWarning, match="connection lost"):
        module, _ = fit([Counting()], logger=Memory(where="save"), max_steps=2)
    assert len(module.losses) == 2


def test_without_a_logger_everything_is_in_the_history_and_the_callback_metrics():
    monitor = Counting()
    _, trainer = fit([monitor], logger=False, max_steps=3)
    assert monitor.history["grok/count"].values == [1, 2, 3, 4]
    assert trainer.callback_metrics["grok/count"] == 4


def test_early_stopping_and_checkpoints_read_the_measurements(tmp_path):
    monitor = Counting(schedule=EveryEpoch())
    stopping = EarlyStopping("grok/count", mode="max", stopping_threshold=3.5, check_on_train_epoch_end=True)
    best = ModelCheckpoint(tmp_path, "{epoch}", "grok/count", mode="max")
    _, _trainer = fit([monitor, stopping, best], max_steps=-1, max_epochs=30, enable_checkpointing=True)
    assert stopping.stopped_epoch == 2  # Step 0 and three epochs.
    assert monitor.steps == [0, 4, 8, 12]
    assert best.best_model_score == 4


def test_early_stopping_at_validation_sees_what_was_measured_there():
    monitor = Counting(schedule=EverySteps(1))
    stopping = EarlyStopping("grok/count", mode="max", stopping_threshold=4.5, patience=99)
    fit([stopping, monitor], max_steps=-1, max_epochs=9, validation=loader(8))
    assert monitor.steps[-1] == 4


# TensorBoard.


def served_layout(folder):
    """What TensorBoard's own plugin makes of a run's layout."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    plugin = CustomScalarsPlugin(TBContext(data_provider=provider, multiplexer=multiplexer, logdir=str(folder)))
    return plugin.layout_impl(RequestContext(), "experiment")


def test_the_layout_groups_curves_by_question(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match="^CommutativityMonitor is left out, as not applicable"):
        fit(default_callbacks("full"), logger=logger, validation=loader(8), max_steps=3)
    served = json.loads(served_layout(tmp_path))
    charts = {category["title"]: [chart["title"] for chart in category["chart"]] for category in served["category"]}
    assert charts == {
        "Is it memorising?": ["Loss", "Accuracy"],
        "Is it compressing?": [
            "Weight norm", "Spectral entropy (nats)", "Effective rank", "Weight entropy (nats)", "Activation sparsity",
            "Circuit complexity (nats)", "Linear mapping number", "Description length (bits)", "Loss of the coarse model",
            "Bin size and threshold chosen", "Bound on the error rate",
        ],
        "Is it about to generalise?": [
            "Gradient coherence", "Entropy of the features", "Distance of the classes", "Entropy of the predictions (nats)",
            "Evenness of the answers", "Confidence and churn", "Information under noise (nats)", "Change by noise (nats)",
            "Input gradient", "Loss with cut weights", "Accuracy with cut weights", "Stage of feature learning",
            "Alignment of the gradient", "Norm of the gradient", "Residual and distance to ridge",
            "Directions that features use", "Largest cosine of two units", "Energy of units", "Change of the weights",
        ],
    }  # fmt: skip
    assert list(charts) == list(QUESTIONS)
    tags = {pattern for category in served["category"] for chart in category["chart"] for pattern in chart["multiline"]["tag"]}
    written = [tag for tag in events(logger.log_dir) if tag.startswith("grok/") and not tag.startswith("grok/onset/")]
    shown = {tag: sum(bool(re.fullmatch(pattern, tag)) for pattern in tags) for tag in written}
    assert len(shown) > 50
    # Every curve once, but for the error bars of others.
    error_bars = {"grok/circuit_complexity_std/net.2", "grok/robustness/pmi_se", "grok/robustness/pe_se"}
    assert shown == {tag: int(tag not in error_bars) for tag in written}


def test_layouts_take_tags_literally_and_quantities_apart():
    keys = [
        "grok/norm/a.b",
        "grok/norm",
        "grok/lmn/x[0]",
        "grok/lmn_standard_error/x[0]",
        "grok/robustness/pe",
        "grok/robustness/ed",
    ]
    charts = layout([("Q", "grok", keys), ("R", "grok", [])])
    assert charts == {
        "Q": {
            "Weight norm": ["Multiline", [r"^grok/norm/a\.b$", "^grok/norm$"]],
            "Linear mapping number": ["Multiline", [r"^grok/lmn/x\[0\]$"]],
            "Information under noise (nats)": ["Multiline", ["^grok/robustness/pe$"]],
            "Change by noise (nats)": ["Multiline", ["^grok/robustness/ed$"]],
        }
    }


def test_layouts_tell_prefixes_apart_and_take_measures_of_ones_own():
    question = "Is it compressing?"
    charts = layout([(question, "grok", ["grok/norm"]), (question, "my/first", ["my/first/norm", "my/first/largest_weight/a"])])
    assert charts[question] == {
        "Weight norm": ["Multiline", ["^grok/norm$"]],
        "Weight norm (my/first)": ["Multiline", ["^my/first/norm$"]],
        "Largest weight (my/first)": ["Multiline", ["^my/first/largest_weight/a$"]],
    }


def texts_of(folder):
    """Texts by tag: step and Markdown."""
    accumulator = EventAccumulator(str(folder), size_guidance={TENSORS: 0})
    accumulator.Reload()
    return {
        tag.removesuffix("/text_summary"): [
            (event.step, event.tensor_proto.string_val[0].decode()) for event in accumulator.Tensors(tag)
        ]
        for tag in accumulator.Tags()["tensors"]
        if tag.endswith("/text_summary")
    }


class Script(GrokkingDetector):
    """Memorises at step 2 and generalises at step 6."""

    def measure(self, snapshot):
        at = snapshot.step
        return {"accuracy/train": float(at >= 2), "accuracy/validation": float(at >= 6)}


def test_texts_are_logged_when_they_change_and_at_the_end(tmp_path):
    detector = Script("grok/accuracy/train", "grok/accuracy/validation", patience=1, schedule=EverySteps(1))
    logger = TensorBoardLogger(tmp_path)
    fit([detector], logger=[logger, CSVLogger(tmp_path)], max_steps=9)
    (summaries,) = texts_of(logger.log_dir).values()
    assert [step for step, _ in summaries] == [0, 2, 6, 9]
    first, memorised, generalised, last = (text for _, text in summaries)
    assert "**Phase: memorising**" in first
    assert "**Phase: memorised**" in memorised
    assert "| memorised | 2 |" in memorised
    assert "| generalised | - |" in memorised
    assert "**Phase: generalised**" in generalised
    assert "grokking, 4 steps after memorising" in generalised
    assert last == generalised


def test_names_in_texts_are_taken_literally(tmp_path):
    name = "<script>alert(1)</script>|*acc*"

    class Logs(Plain):
        def training_step(self, batch, batch_idx):
            self.log(name, 1.0)
            return super().training_step(batch, batch_idx)

    detector = GrokkingDetector(train_metric=name, schedule=EverySteps(1))
    fit([detector], Logs(), logger=TensorBoardLogger(tmp_path), max_steps=6, validation=loader(8))
    (summaries,) = texts_of(tmp_path / "lightning_logs" / "version_0").values()
    shown = markdown_to_safe_html(summaries[-1][1])
    assert "<script" not in shown
    assert "alert(1)&lt;/script&gt;|*acc*" in shown
    assert "<td>memorised</td>" in shown


def test_loggers_are_flushed_when_a_checkpoint_is_written(tmp_path):
    seen = {}

    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                # As another process would see the file now.
                seen.update(events(trainer.logger.log_dir))

    fit([Counting(schedule=EverySteps(1)), Crash()], logger=TensorBoardLogger(tmp_path), max_steps=8)
    assert [step for step, _ in seen["grok/count"]] == list(range(7))


class Drawing(Monitor):
    def measure(self, snapshot):
        return {"drawn": 1.0}

    def figures(self):
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(1, 1))
        axes.plot([1, 2])
        return {"picture": figure}


def test_figures_are_drawn_now_and_then_and_closed(tmp_path):
    import matplotlib.pyplot as plt

    open_before = len(plt.get_fignums())
    logger = TensorBoardLogger(tmp_path)
    fit([Drawing(), Counting()], logger=logger, max_steps=120)
    accumulator = EventAccumulator(logger.log_dir, size_guidance={IMAGES: 0})
    accumulator.Reload()
    steps = [event.step for event in accumulator.Images("grok/picture")]
    assert steps == [100, 120]
    assert len(plt.get_fignums()) == open_before


def test_loggers_with_log_image_get_figures_and_others_none_are_drawn_for(tmp_path):
    class Album(Memory):
        def log_image(self, key, images, step):
            self.logged.append((step, {key: len(images)}))

    album = Album()
    fit([Drawing()], logger=album, max_steps=1)
    assert (1, {"grok/picture": 1}) in album.logged

    class Expensive(Drawing):
        def figures(self):
            raise AssertionError("nobody can show it")

    fit([Expensive()], logger=CSVLogger(tmp_path), max_steps=1)


def test_a_figure_that_cannot_be_drawn_does_no_harm(tmp_path):
    class Clumsy(Drawing):
        def figures(self):
            raise ValueError("no paper")

    with pytest.warns(UserWarning, match="Clumsy could not draw its figure: ValueError: no paper"):
        module, _ = fit([Clumsy()], logger=TensorBoardLogger(tmp_path), max_steps=2)
    assert len(module.losses) == 2


def test_values_that_are_not_finite_reach_the_loggers(tmp_path):
    module = Plain()
    with torch.no_grad():
        module.net[0].weight[0, 0] = float("nan")
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(UserWarning, match="is nan at step 0"):
        fit([WeightEntropyMonitor()], module, logger=logger, max_steps=1)
    written = events(logger.log_dir)
    assert math.isnan(written["grok/weight_entropy/net.0.weight"][0][1])
    assert math.isfinite(written["grok/weight_entropy/net.2.weight"][0][1])
