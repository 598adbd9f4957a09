"""Monitors that fail, in whatever they do: one warning that names them, and training goes on as if they were not there."""

from __future__ import annotations

import math
import random
import signal
import warnings

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from grok_callbacks import EverySteps, Monitor, NormMonitor, Recorder, default_callbacks
from grok_callbacks.report import read_run
from tests._common import Classifier, Counting, Plain, fit, loader, same_weights

EVERY = EverySteps(1)


class Failing(Monitor):
    """Fails where it is told to."""

    def __init__(self, where, error=ZeroDivisionError, **kwargs):
        super().__init__(**kwargs)
        self.where, self.error, self.measured = where, error, 0

    def _maybe(self, where):
        if self.where == where:
            raise self.error("by design")

    def bind(self, view):
        self._maybe("bind")

    def measure(self, snapshot):
        self.measured += 1
        if snapshot.step == 3:
            self._maybe("measure")
        return {"measured": math.nan if self.where == "nan" else {} if self.where == "value" else 1.0}

    def analyse(self, history, step):
        if step == 3:
            self._maybe("analyse")
        return {}

    def figures(self):
        self._maybe("figures")
        return {}

    def texts(self):
        self._maybe("texts")
        return {}

    def status(self):
        self._maybe("status")
        return {}

    def own_state(self):
        self._maybe("own_state")
        return {"measured": self.measured}

    def load_own_state(self, state):
        self._maybe("load_own_state")
        self.measured = state["measured"]


def run(callbacks, module=None, **kwargs):
    module = module or Classifier()
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callbacks, module, validation=loader(8), **{"max_steps": 8, **kwargs})
    return module, [str(warning.message) for warning in caught if "Failing" in str(warning.message)]


@pytest.fixture(scope="module")
def alone():
    torch.manual_seed(0)
    return run([])[0]


FAILURES = {
    "bind": "is left out, since looking at the model failed: ZeroDivisionError: by design",
    "measure": "failed and is switched off for the rest of this run: ZeroDivisionError: by design",
    "value": "failed and is switched off for the rest of this run: TypeError",
    "analyse": "failed and is switched off for the rest of this run: ZeroDivisionError: by design",
    "figures": "could not draw its figure: ZeroDivisionError: by design",
    "texts": "could not put its words: ZeroDivisionError: by design",
    "status": "could not put its words: ZeroDivisionError: by design",
    "own_state": "could not give its state; a resumed run goes on without: ZeroDivisionError: by design",
    "nan": "grok/measured is nan at step 0; said once",
}


@pytest.mark.parametrize("where", FAILURES)
def test_one_warning_and_the_run_goes_on(tmp_path, alone, where):
    failing, counting = Failing(where, schedule=EVERY), Counting(schedule=EVERY)
    failing.optional = where == "bind"  # As a preset makes it; otherwise the user hears at the start.
    callbacks = [failing, counting, ModelCheckpoint(tmp_path, every_n_train_steps=3)]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module, messages = run(callbacks, logger=logger, enable_checkpointing=True)
    assert len(messages) == 1, messages
    assert FAILURES[where] in messages[0]
    assert messages[0].startswith("Failing(where=")
    # To the last bit the run that it would have been, and the others measured all.
    assert module.losses == alone.losses
    assert same_weights(module, alone)
    assert counting.steps == list(range(9))
    assert read_run(tmp_path)["grok/count"].steps == list(range(9))


@pytest.mark.parametrize("where", ["bind", "measure", "analyse", "own_state"])
def test_or_it_is_to_be_seen(tmp_path, where):
    module = Classifier()
    with pytest.raises(ZeroDivisionError, match="by design"):
        run(
            [Failing(where, schedule=EVERY, on_error="raise"), ModelCheckpoint(tmp_path, every_n_train_steps=3)],
            module, enable_checkpointing=True,
        )  # fmt: skip
    assert len(module.losses) == (0 if where == "bind" else 3)


def test_a_state_that_was_not_given_is_not_missed(tmp_path):
    def go(where, max_steps, **kwargs):
        failing = Failing(where, schedule=EVERY)
        saving = ModelCheckpoint(tmp_path, "x", every_n_train_steps=4)
        _, messages = run([failing, saving], Plain(), max_steps=max_steps, enable_checkpointing=True, **kwargs)
        return failing, messages

    failing, messages = go("own_state", 4)
    assert len(messages) == 1
    # Its label holds the setting, and the state goes by the label.
    failing, messages = go("own_state", 8, ckpt_path=tmp_path / "x.ckpt")
    assert failing.history["grok/measured"].steps == list(range(9))
    assert failing.measured == 4


def test_states_that_cannot_be_taken_up(tmp_path):
    """An error where the user has set the monitor; a preset's starts afresh."""
    torch.manual_seed(0)
    _, trainer = fit([Failing("load_own_state", schedule=EVERY)], max_steps=4)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    failing, counting = Failing("load_own_state", schedule=EVERY), Counting(schedule=EVERY)
    with pytest.raises(Exception, match=r"saved state of Failing.* does not fit this run: ZeroDivisionError: by design"):
        fit([failing], max_steps=8, ckpt_path=tmp_path / "x.ckpt")
    failing = Failing("load_own_state", schedule=EVERY)
    failing.optional = True
    _, messages = run([failing, counting], Plain(), ckpt_path=tmp_path / "x.ckpt")
    assert len([message for message in messages if "starts afresh" in message]) == 1
    assert failing.history["grok/measured"].steps == [4, 5, 6, 7, 8]


# Losses and weights that are not finite.


class Diverging(Plain):
    """From the third step on the loss is NaN, and with the optimiser's step the weights are."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.global_step == 3 else loss


def test_a_loss_that_is_nan_amid_the_run(tmp_path):
    torch.manual_seed(0)
    alone, _ = run([], Diverging())
    torch.manual_seed(0)
    callbacks = default_callbacks("full", schedule=EVERY)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    module = Diverging()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        fit(callbacks, module, validation=loader(8), logger=logger, max_steps=8)
    assert module.losses[:4] == alone.losses[:4]
    assert len(module.losses) == 8
    assert all(map(math.isnan, module.losses[4:]))
    messages = [str(warning.message) for warning in caught]
    assert not [message for message in messages if "failed" in message]
    said = [message.split(":")[0] for message in messages if "said once" in message]
    assert len(said) == len(set(said)) >= 3
    norms = read_run(tmp_path)["grok/norm"]
    assert norms.steps == list(range(9))
    assert [math.isnan(value) for value in norms.values] == [False] * 4 + [True] * 5


# Ctrl-C.


class Interrupting(Monitor):
    """Is interrupted while it has the model in hand: other modes, hooks, random numbers, gradients and buffers."""

    def __init__(self, inside, **kwargs):
        super().__init__(**kwargs)
        self.inside = inside

    def bind(self, view):
        view.require_samples()

    def measure(self, snapshot):
        if snapshot.step < 3:
            return {}
        random.random(), np.random.rand(), torch.rand(3)
        model = snapshot.view.model
        if self.inside:
            hook = model.net[0].register_forward_hook(self._interrupt)
            try:
                snapshot.forward(capture=["net.0", "net.2"], weights={"net.0.weight": torch.zeros(8, 6)}, grad=True)
            finally:
                hook.remove()
        self._interrupt()
        return {}

    def _interrupt(self, *args):
        signal.raise_signal(signal.SIGINT)


class Watching(L.Callback):
    """What is seen before the batch in which it happens, and afterwards."""

    def see(self, module):
        self.seen = (
            [inner.training for inner in module.modules()],
            [len(inner._forward_hooks) + len(inner._forward_pre_hooks) for inner in module.modules()],
            torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(),
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
            [buffer.clone() for buffer in module.buffers()],
            [parameter.grad is None for parameter in module.parameters()],
        )  # fmt: skip
        return self.seen

    def on_train_batch_end(self, trainer, module, *args):
        self.see(module)


@pytest.mark.parametrize("inside", [True, False])
def test_an_interrupt_within_a_measurement_stops_the_run_and_leaves_no_trace(tmp_path, inside):
    handler = signal.getsignal(signal.SIGINT)
    watching, counting = Watching(), Counting(schedule=EVERY)
    module, logger = Classifier(), TensorBoardLogger(tmp_path, name="", version="")
    module.train()
    module.net[1].eval()
    monitors = [watching, counting, Interrupting(inside, schedule=EVERY), NormMonitor(schedule=EVERY)]
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            fit(monitors, module, logger=logger)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves Ctrl-C ignored.
    before, after = watching.seen, watching.see(module)
    for one, other in zip(before, after, strict=True):
        if isinstance(one, list) and one and isinstance(one[0], torch.Tensor):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        else:
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    # What was measured up to then is on disk, and the callbacks can be used again.
    assert read_run(tmp_path)["grok/count"].steps in ([0, 1, 2], [0, 1, 2, 3])
    assert all(monitor.session is None for monitor in monitors[1:])
    fit([counting], max_steps=2)
    assert counting.history["grok/count"].steps == [0, 1, 2]


def test_an_interrupt_in_a_loop_of_ones_own():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))

    class Stopping(Monitor):
        def measure(self, snapshot):
            torch.rand(2)
            raise KeyboardInterrupt

    recorder = Recorder(model, [Stopping()])
    state = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recorder.record(0)
    assert torch.equal(torch.get_rng_state(), state)
