"""A run that is stopped and resumed logs what the uninterrupted one logs."""

from __future__ import annotations

import math
import random
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Dataset

from grok_callbacks import (
    AtValidation,
    EveryEpoch,
    EverySteps,
    GrokkingDetector,
    Monitor,
    NormMonitor,
    Probe,
)
from grok_callbacks.report.read import read_run
from tests._common import Counting, Logits, Plain, Stream, events, fit, loader, same_weights, samples
from tests.callbacks._all_monitors import ALONE, all_monitors

pytestmark = pytest.mark.filterwarnings("ignore:.*; said once")


class Random(Monitor):
    """A measure that draws random numbers."""

    def measure(self, snapshot):
        return {"random": random.random() + np.random.rand() + torch.rand(1).item()}


class Augmenting(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        x, y = samples(32)[index]
        return x + 0.1 * torch.rand(1), y


def monitors():
    return [
        Random(),
        NormMonitor(),
        Logits(probe=Probe(size=20)),
        Counting("steps", schedule=EverySteps(5)),
        Counting("epochs", schedule=EveryEpoch()),
        Counting("validations", schedule=AtValidation()),
        GrokkingDetector(memorized_threshold=0.5, schedule=EverySteps(2), chance=0.0),
    ]


def run(folder, *, max_steps, ckpt_path=None, callbacks=None, make=None, checkpoints=(), **kwargs):
    """A run with shuffling off, which is what Lightning resumes exactly."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    callbacks = monitors() if callbacks is None else callbacks
    logger = TensorBoardLogger(folder, name="", version="")
    settings = {"train": loader(), "validation": loader(16, seed=1), "logger": logger, **kwargs}
    module, trainer = fit(
        [*callbacks, *checkpoints], make() if make else Plain(logs=True), max_steps=max_steps, ckpt_path=ckpt_path, **settings
    )
    return module, callbacks, trainer


def grok(folder):
    return {tag: points for tag, points in events(folder).items() if tag.startswith("grok/")}


def assert_same_history(first, second):
    for one, other in zip(first, second, strict=True):
        assert one._recorder.keys_of(one) == other._recorder.keys_of(other)
    histories = [callbacks[0].history for callbacks in (first, second)]
    assert set(histories[0]) == set(histories[1])
    for key, series in histories[0].items():
        assert series.steps == histories[1][key].steps, key
        assert series.values == pytest.approx(histories[1][key].values, nan_ok=True), key


class SaveAt(L.Callback):
    """Saves amid an epoch, as someone might do by hand."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step and not Path(self.path).exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("stop", [4, 8, 12, 24])
def test_stopped_at_the_end_of_an_epoch(tmp_path, stop):
    _, whole, _ = run(tmp_path / "whole", max_steps=30)
    _module, _, trainer = run(tmp_path / "parts", max_steps=stop)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(99)  # Lightning saves no generators.
    _resumed, parts, _ = run(tmp_path / "parts", max_steps=30, ckpt_path=tmp_path / "x.ckpt")
    assert_same_history(whole, parts)
    assert grok(tmp_path / "parts") == grok(tmp_path / "whole")
    assert parts[-1].memorized_step == whole[-1].memorized_step is not None
    assert len(grok(tmp_path / "parts")["grok/onset/memorized_step"]) == 1


@pytest.mark.filterwarnings("ignore:No validation in this run")
@pytest.mark.parametrize("stop", [1, 2, 7, 10, 13])
def test_stopped_amid_an_epoch(tmp_path, stop):
    """With one batch that is always the same, so that Lightning comes out at the same weights."""

    class Same(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return samples(8)[:]

    def data():
        return DataLoader(Same(), batch_size=None)

    whole_module, whole, _ = run(tmp_path / "whole", max_steps=19, train=data(), validation=None, make=Plain)
    save = SaveAt(tmp_path / "x.ckpt", stop)
    run(tmp_path / "parts", max_steps=stop, train=data(), validation=None, make=Plain, checkpoints=[save])
    resumed, parts, _ = run(
        tmp_path / "parts", max_steps=19, train=data(), validation=None, make=Plain, ckpt_path=tmp_path / "x.ckpt",
        checkpoints=[save],
    )  # fmt: skip
    assert same_weights(whole_module, resumed)
    # Counted epochs depend on where Lightning takes up the epoch.
    histories = [{key: s for key, s in callbacks[0].history.items() if "epochs" not in key} for callbacks in (whole, parts)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("saved", ["after a batch", "amid an epoch", "after validation", "after an epoch"])
def test_a_run_that_was_killed_leaves_no_double_events(tmp_path, saved):
    """It went on past its last checkpoint; what it logged there is logged anew, perhaps with other values."""

    class Kill(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 11:
                raise RuntimeError("killed")

    def checkpoints():
        if saved in ("after a batch", "amid an epoch"):
            return SaveAt(tmp_path / "x.ckpt", 8 if saved == "after a batch" else 6)
        return ModelCheckpoint(tmp_path, "x", save_on_train_epoch_end=saved == "after an epoch")

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "run", max_steps=20, checkpoints=[checkpoints(), Kill()], enable_checkpointing=True)
    assert max(step for step, _ in grok(tmp_path / "run")["grok/norm"]) == 11
    # A resumed run that differs shows which values are there in the end.
    _, callbacks, _ = run(
        tmp_path / "run", max_steps=20, ckpt_path=tmp_path / "x.ckpt", make=lambda: Plain(logs=True, lr=0.0),
        checkpoints=[checkpoints()], enable_checkpointing=True,
    )  # fmt: skip
    assert read_run(tmp_path / "run")["grok/norm"].steps == callbacks[0].history["grok/norm"].steps
    for tag, points in grok(tmp_path / "run").items():
        steps = [step for step, _ in points]
        # Of an epoch that ended after the checkpoint at the very same step, the file alone knows, or it ends once more.
        assert [step for step in steps if step != 8] == sorted(set(steps) - {8}), tag
        assert steps.count(8) <= 1 + (tag == "grok/epochs" and saved == "after validation")
        series = callbacks[0].history[tag]
        known = dict(zip(series.steps, series.values, strict=True))
        assert set(steps) - set(known) <= {8}
        assert {step: value for step, value in points if step in known} == pytest.approx(known, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("stop", [2, 4, 9])
def test_samples_of_iterable_data_come_from_the_checkpoint(tmp_path, stop):
    """Also when the probe was not full yet: it goes on filling."""

    def data(seed=0):
        return DataLoader(Stream(samples(32, seed)), 8)

    def callbacks():
        return [Logits(probe=Probe(size=27), schedule=EverySteps(1)), Counting(schedule=EverySteps(1))]

    _, whole, _ = run(tmp_path / "whole", max_steps=12, callbacks=callbacks(), train=data(), validation=data(1))
    save = SaveAt(tmp_path / "x.ckpt", stop)
    run(tmp_path / "a", max_steps=stop, callbacks=callbacks(), train=data(), validation=data(1), checkpoints=[save])
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"][whole[0].state_key]["samples"]
    assert (saved[0]["split"], saved[0]["complete"], len(saved[0]["inputs"])) == ("train", stop > 3, min(8 * stop, 27))
    # The stream goes on with other samples, as streams do.
    _, parts, _ = run(
        tmp_path / "b", max_steps=12, callbacks=callbacks(), train=data(7), validation=data(8), ckpt_path=tmp_path / "x.ckpt",
        checkpoints=[save],
    )  # fmt: skip
    series = parts[0].history["grok/logits/size"]
    assert set(series.values) == {27.0}
    first = parts[0]._recorder.samples(parts[0].probe)["train"].inputs
    assert torch.equal(first[: 8 * min(stop, 3)], samples(32).tensors[0][: 8 * min(stop, 3)])
    assert parts[1].history["grok/count"].steps == list(range(13))


def test_a_checkpoint_written_after_the_run_holds_them_too(tmp_path):
    monitor = Logits()
    _, trainer = fit([monitor], train=DataLoader(Stream(samples(32)), 8), max_steps=9)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    (saved,) = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"][monitor.state_key]["samples"]
    assert torch.equal(saved["inputs"], samples(32).tensors[0])


def test_augmented_samples_are_drawn_alike(tmp_path):
    def go(**kwargs):
        callbacks = [Logits(schedule=EverySteps(1))]
        _module, trainer = fit(callbacks, train=DataLoader(Augmenting(), 8), max_steps=kwargs.pop("max_steps"), **kwargs)
        return callbacks[0], trainer

    _, trainer = go(max_steps=4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    torch.manual_seed(5)
    first, _ = go(max_steps=4)
    torch.manual_seed(6)
    resumed, _ = go(max_steps=6, ckpt_path=tmp_path / "x.ckpt")
    inputs = [monitor._recorder.samples(monitor._recorder.probes[0])["train"].inputs for monitor in (first, resumed)]
    assert torch.equal(*inputs)


def test_validation_samples_are_there_at_once_where_validation_is_rare(tmp_path):
    def callbacks():
        return [GrokkingDetector(schedule=EverySteps(1))]

    settings = {"validation": loader(16, seed=1), "check_val_every_n_epoch": 3, "make": Plain}
    _, whole, _ = run(tmp_path / "whole", max_steps=20, callbacks=callbacks(), **settings)
    _, _, trainer = run(tmp_path / "parts", max_steps=5, callbacks=callbacks(), **settings)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    _, parts, _ = run(
        tmp_path / "parts",
        max_steps=20,
        callbacks=callbacks(),
        ckpt_path=tmp_path / "x.ckpt",
        **settings,
    )
    assert whole[0].history["grok/accuracy/validation"].steps == list(range(21))
    assert parts[0].history["grok/accuracy/validation"].steps == list(range(21))


def test_checkpoints_load_safely_and_hold_all_monitors(tmp_path):
    callbacks = all_monitors(schedule=EverySteps(1))
    _, trainer = fit(callbacks, validation=loader(8), max_steps=3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    states = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    resumed = all_monitors(schedule=EverySteps(1))
    _, trainer = fit(resumed, validation=loader(8), max_steps=6, ckpt_path=tmp_path / "x.ckpt")
    for monitor, twin in zip(callbacks, resumed, strict=True):
        assert states[monitor.state_key]["recorder"]["measurements"] == 4
        assert not twin._recorder.switched_off
        keys = twin._recorder.keys_of(twin)
        assert bool(keys) == (type(twin).__name__ in ALONE)
        assert all(twin.history[key].steps == list(range(7)) for key in keys[:1])


def test_the_metric_and_its_count_are_restored(tmp_path):
    monitor = NormMonitor()
    _, trainer = fit([monitor], max_steps=3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    seen = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            seen.setdefault("count", twin.metric["of:net:0:weight"]._update_count)
            seen.setdefault("value", twin.metric["of:net:0:weight"].compute())

    twin = NormMonitor()
    fit([twin, Look()], max_steps=4, ckpt_path=tmp_path / "x.ckpt")
    assert seen == {"count": 1, "value": pytest.approx(monitor.history["grok/norm/net.0.weight"].values[-1])}


def test_early_stopping_finds_its_key_before_the_next_measurement(tmp_path):
    def callbacks():
        return [Counting(schedule=EverySteps(100)), EarlyStopping("grok/count", patience=99)]

    settings = {"validation": loader(8), "logger": False}
    best = ModelCheckpoint(tmp_path, "best", monitor="grok/count")
    _, trainer = fit([*callbacks(), best], max_steps=4, enable_checkpointing=True, **settings)
    resumed = callbacks()
    _, trainer = fit([*resumed, ModelCheckpoint(tmp_path, "best", monitor="grok/count")], max_steps=12,
                     ckpt_path=best.best_model_path, enable_checkpointing=True, **settings)  # fmt: skip
    assert trainer.global_step == 12
    assert resumed[0].history["grok/count"].steps == [0]


def test_figures_go_on_where_they_were(tmp_path):
    drawn = []

    class Drawing(Counting):
        def figures(self):
            import matplotlib.pyplot as plt

            drawn.append(self.session.trainer.global_step)
            return {"figure": plt.figure(figsize=(1, 1))}

    run(tmp_path / "whole", max_steps=40, callbacks=[Drawing()])
    whole, drawn[:] = list(drawn), []
    _, _, trainer = run(tmp_path / "parts", max_steps=20, callbacks=[Drawing()])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    drawn.pop()  # The last one of the first part.
    run(tmp_path / "parts", max_steps=40, callbacks=[Drawing()], ckpt_path=tmp_path / "x.ckpt")
    assert drawn == whole


def test_fit_called_again_goes_on():
    monitor = Counting(schedule=EverySteps(1))
    detector = GrokkingDetector(memorized_threshold=0.5, schedule=EverySteps(1))
    module, trainer = fit([monitor, detector], Plain(), loader(), max_steps=5)
    memorized = detector.memorized_step
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(module, loader())
    assert monitor.history["grok/count"].steps == list(range(10))
    assert monitor.steps == list(range(10))
    assert memorized is None or detector.memorized_step == memorized


def test_the_same_callbacks_in_another_trainer_start_over():
    callbacks = [
        Counting(schedule=EverySteps(1)),
        GrokkingDetector(memorized_threshold=0.3, schedule=EverySteps(1), chance=0.0),
    ]
    fit(callbacks, max_steps=6)
    assert callbacks[1].memorized_step is not None
    fit(callbacks, Plain(lr=0.0), max_steps=3)
    assert callbacks[0].history["grok/count"].steps == [0, 1, 2, 3]
    assert callbacks[1].tracker.memorized_step in (None, 0)


def test_callbacks_that_the_checkpoint_does_not_know_measure_at_once(tmp_path):
    _, trainer = fit([Counting()], max_steps=5)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    new = [Counting("late", schedule=EverySteps(100)), NormMonitor(schedule=EveryEpoch())]
    with pytest.warns(UserWarning, match="Please add the following callbacks"):
        fit(new, max_steps=7, ckpt_path=tmp_path / "x.ckpt")
    assert new[0].history["grok/late"].steps == [5]
    assert new[1].history["grok/norm"].steps[0] == 5


def test_a_state_that_is_none_is_refused(tmp_path):
    monitor = Counting()
    _, trainer = fit([monitor], max_steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    checkpoint["callbacks"]["Counting"]["recorder"]["history"] = 5
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="The state of Counting is not one that a Recorder made"):
        fit([Counting()], max_steps=4, ckpt_path=tmp_path / "x.ckpt")


def test_values_that_are_not_finite_survive(tmp_path):
    class Broken(Monitor):
        def measure(self, snapshot):
            return {"broken": math.nan}

    _, trainer = fit([Broken()], max_steps=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = Broken()
    fit([resumed], max_steps=2, ckpt_path=tmp_path / "x.ckpt")
    assert [math.isnan(value) for value in resumed.history["grok/broken"].values] == [True] * 3
