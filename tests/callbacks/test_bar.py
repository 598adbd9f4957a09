"""The phase in Lightning's own progress bars, and nowhere where it could do harm."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pickle
from functools import partial

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from grok_callbacks import EverySteps, GrokkingDetector, Monitor, NormMonitor
from tests._common import Classifier, Counting, Plain, fit, loader, trainer

needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich is not installed")
wide_rich_bar = partial(RichProgressBar, console_kwargs={"width": 200})


class Words(Monitor):
    """Says how far it is."""

    def __init__(self, fails_at=None):
        super().__init__(schedule=EverySteps(1))
        self.fails_at = fails_at
        self.step = -1

    def measure(self, snapshot):
        self.step = snapshot.step
        return {"step": float(snapshot.step)}

    def status(self):
        if self.step == self.fails_at:
            raise RuntimeError("lost for words")
        return {"seen": f"step {self.step}"}


class Watch(L.Callback):
    """Notes what the bar shows."""

    def __init__(self):
        self.shown = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        bar = trainer.progress_bar_callback
        self.shown.append(bar.get_metrics(trainer, pl_module))


def shown_by(bar, callbacks, module=None, **kwargs):
    watch = Watch()
    with contextlib.redirect_stderr(io.StringIO()):
        _, made = fit([*callbacks, watch, bar], module, enable_progress_bar=True, **kwargs)
    return watch, made


class Script(GrokkingDetector):
    """Its three events fall on steps 2, 4 and 6."""

    def measure(self, snapshot):
        at = snapshot.step
        return {"accuracy/train": float(at >= 2), "accuracy/validation": 1.0 if at >= 6 else 0.5 if at >= 4 else 0.0}


def groks(every=1):
    return Script("grok/accuracy/train", "grok/accuracy/validation", patience=1, schedule=EverySteps(every))


@pytest.mark.parametrize("bar", [TQDMProgressBar, pytest.param(RichProgressBar, marks=needs_rich)])
def test_lightnings_bars_show_the_phase(bar):
    watch, _ = shown_by(bar(), [groks()], max_steps=7)
    phases = [shown["phase"] for shown in watch.shown]
    assert phases == ["memorising", "memorised", "memorised", "generalising", "generalising", "generalised", "generalised"]


@pytest.mark.parametrize(
    ("bar", "words"),
    [
        pytest.param(TQDMProgressBar, "phase=generalised", id="tqdm"),
        pytest.param(wide_rich_bar, "phase: generalised", id="rich", marks=needs_rich),
    ],
)
def test_it_is_what_the_user_sees(capsys, bar, words):
    trainer([groks(), bar()], max_steps=7, enable_progress_bar=True).fit(Plain(), loader())
    assert words in "".join(capsys.readouterr())


def test_other_namespace():
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.plain = Plain()
            self.net = self.plain.net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            import torch.nn.functional as F

            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            import torch

            return torch.optim.SGD(self.parameters(), 0.1)

    class Look(other.Callback):
        def on_train_end(self, trainer, pl_module):
            self.shown = trainer.progress_bar_callback.get_metrics(trainer, pl_module)

    look = Look()
    with contextlib.redirect_stderr(io.StringIO()):
        fit([groks(), look], Module(), namespace=other, max_steps=7, enable_progress_bar=True)
    assert look.shown["phase"] == "generalised"


def test_the_bar_is_as_it_was_afterwards():
    bar = TQDMProgressBar()
    before = set(vars(bar))
    _, made = shown_by(bar, [groks()], max_steps=3)
    assert set(vars(bar)) - before <= {"log", "log_dict"}, "Lightning's own"
    assert "phase" not in bar.get_metrics(made, made.lightning_module)
    assert "phase" not in made.progress_bar_metrics, "readers of it expect numbers"


class Pickle(L.Callback):
    """What a process that is spawned would get."""

    def on_train_batch_end(self, trainer, *args):
        self.bar = None
        self.bar = pickle.loads(pickle.dumps(trainer.progress_bar_callback))


def test_a_bar_that_shows_the_phase_pickles():
    copier = Pickle()
    with contextlib.redirect_stderr(io.StringIO()):
        fit([groks(), copier], max_steps=2, enable_progress_bar=True)
    assert copier.bar.get_metrics.words == {"phase": "memorised"}


def test_and_after_a_run_that_fails():
    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("out of luck")

    bar = TQDMProgressBar()
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(RuntimeError, match="out of luck"):
        fit([groks(), bar], Fails(), enable_progress_bar=True)
    assert "get_metrics" not in vars(bar)


def test_what_the_user_shows_comes_first():
    class Logs(Plain):
        def training_step(self, batch, batch_idx):
            self.log("phase", 3.0, prog_bar=True)
            return super().training_step(batch, batch_idx)

    watch, _ = shown_by(TQDMProgressBar(), [groks()], Logs(), max_steps=3)
    assert [shown["phase"] for shown in watch.shown] == [3.0, 3.0, 3.0]


def test_a_bar_whose_metrics_are_overridden_keeps_them():
    class Quiet(TQDMProgressBar):
        def get_metrics(self, *args, **kwargs):
            items = super().get_metrics(*args, **kwargs)
            items.pop("v_num", None)
            return {name: f"{float(value):.1f}" for name, value in items.items()}

    watch, _ = shown_by(Quiet(), [groks()], Classifier(logs=True), validation=loader(8), max_steps=3, logger=True)
    assert watch.shown[-1] == {"phase": "memorised"}


def test_a_bar_of_the_users_own_is_left_alone():
    class Own(ProgressBar):
        def enable(self):
            pass

        def disable(self):
            pass

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.line = {name: float(value) for name, value in self.get_metrics(trainer, pl_module).items()}

    class Numbers(TQDMProgressBar):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.line = {name: float(value) for name, value in self.get_metrics(trainer, pl_module).items()}

    for bar in (Own(), Numbers()):
        watch, _ = shown_by(bar, [groks()], max_steps=3)
        assert all("phase" not in shown for shown in watch.shown)


@pytest.mark.parametrize("has_bar", [True, False])
def test_without_a_detector_or_a_bar_nothing_is_shown(has_bar):
    with contextlib.redirect_stderr(io.StringIO()):
        _, made = fit([NormMonitor()], max_steps=2, enable_progress_bar=has_bar)
    assert (made.progress_bar_callback is not None) == has_bar
    if has_bar:
        assert "phase" not in made.progress_bar_callback.get_metrics(made, made.lightning_module)
    else:
        fit([groks()], max_steps=2)


def test_words_of_a_monitor_of_ones_own():
    watch, _ = shown_by(TQDMProgressBar(), [Words(), Counting()], max_steps=3)
    assert [shown["seen"] for shown in watch.shown] == ["step 1", "step 2", "step 3"]


def test_a_monitor_without_words_does_no_harm():
    with pytest.warns(UserWarning, match="Words.* could not put its words: RuntimeError: lost for words") as caught:
        watch, _ = shown_by(TQDMProgressBar(), [Words(fails_at=2)], max_steps=6)
    assert sum("lost for words" in str(warning.message) for warning in caught) == 1
    assert len(watch.shown) == 6
    assert "seen" in watch.shown[0]
    assert "seen" not in watch.shown[-1]


def test_a_resumed_run_shows_its_phase_at_once(tmp_path):
    checkpoint = tmp_path / "x.ckpt"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 5:
                trainer.save_checkpoint(checkpoint)

    fit([groks(every=4), Save()], max_steps=5)
    watch, _ = shown_by(TQDMProgressBar(), [groks(every=4)], max_steps=6, ckpt_path=checkpoint)
    assert watch.shown[0]["phase"] == "generalising"
