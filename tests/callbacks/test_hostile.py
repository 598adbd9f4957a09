"""Runs that go wrong, and Trainers set in unusual ways."""

from __future__ import annotations

import contextlib
import io
import math
import signal
import warnings

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from grok_callbacks import EverySteps, GrokkingDetector, Monitor, NormMonitor, Probe, SpectralEntropyMonitor, default_callbacks
from grok_callbacks._compat import MisconfigurationException
from tests._common import Classifier, Counting, Logits, Plain, Stream, events, fit, loader, samples, trainer
from tests.callbacks._all_monitors import ALL_MONITORS, ALONE, all_monitors

EVERY = EverySteps(1)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Weights.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("name", ALONE)
def test_no_monitor_fails_on_broken_weights_or_warns_twice(name, value):
    module = Plain()
    with torch.no_grad():
        module.net[0].weight[0] = value
    monitor = ALONE[name](schedule=EVERY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([monitor], module, validation=loader(8), max_steps=3)
    messages = [str(warning.message) for warning in caught if type(monitor).__name__ in str(warning.message)]
    assert not monitor._recorder.switched_off, messages
    values = [value for key in monitor._recorder.keys_of(monitor) for value in monitor.history[key].values]
    assert values
    assert len(messages) <= 1 if any(not math.isfinite(value) for value in values) else not messages


def test_weights_that_break_amid_the_run():
    class Breaking(Plain):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.global_step == 3:
                with torch.no_grad():
                    self.net[0].weight.fill_(math.nan)

    monitor = SpectralEntropyMonitor(schedule=EVERY)
    with pytest.warns(UserWarning, match="is nan at step 4; said once") as caught:
        fit([monitor], Breaking(), max_steps=6)
    assert sum("said once" in str(warning.message) for warning in caught) == 1
    values = monitor.history["grok/spectral_entropy/net.0.weight"].values
    assert [math.isnan(value) for value in values] == [False] * 4 + [True] * 3


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("rank", [0, 1])
def test_no_monitor_fails_on_zero_or_rank_one_matrices(name, rank, quiet):
    module = Plain(lr=0.0)
    with torch.no_grad():
        for layer in (module.net[0], module.net[2]):
            left, right = torch.linspace(1, 2, layer.out_features), torch.linspace(-1, 1, layer.in_features)
            layer.weight.copy_(rank * torch.outer(left, right))
    monitor = ALONE[name](schedule=EVERY)
    fit([monitor], module, validation=loader(8), max_steps=2)
    assert not monitor._recorder.switched_off


# Data.


@pytest.mark.parametrize("name", ALONE)
def test_no_monitor_fails_on_one_sample(name, quiet):
    one = DataLoader(samples(1), 1)
    monitor = ALONE[name](schedule=EVERY)
    fit([monitor], Plain(), one, one, max_steps=2)
    assert not monitor._recorder.switched_off
    assert monitor._recorder.keys_of(monitor)


def test_no_validation_loader():
    callbacks = default_callbacks("economy", schedule=EVERY)
    fit(callbacks, max_steps=3)
    assert callbacks[-1].history["grok/accuracy/train"].steps == [0, 1, 2, 3]
    assert "grok/accuracy/validation" not in callbacks[-1].history
    assert not callbacks[0]._recorder.switched_off


class NoData(IterableDataset):
    def __iter__(self):
        return iter(())


class SomeThenNone(IterableDataset):
    """A stream that is at its end after the first epoch."""

    def __init__(self):
        self.epochs = 0

    def __iter__(self):
        self.epochs += 1
        return iter([samples()[i] for i in range(16)] if self.epochs == 1 else ())


@pytest.mark.parametrize("train", [lambda: DataLoader(NoData(), 8), lambda: DataLoader(TensorDataset(torch.zeros(0, 6)), 8)])
def test_empty_training_data(train, quiet):
    callbacks = default_callbacks("economy")
    with contextlib.suppress(StopIteration):
        fit(callbacks, train=train(), max_steps=-1, max_epochs=2)
    # Lightning takes no step; nor is there anything to say about it.
    assert callbacks[0].history == {} or callbacks[0].history["grok/norm"].steps == [0]


def test_a_stream_that_dries_up():
    monitors = [Counting(schedule=EVERY), Logits(schedule=EVERY)]
    fit(monitors, train=DataLoader(SomeThenNone(), 8), max_steps=-1, max_epochs=3)
    assert monitors[0].steps == [0, 1, 2]


def test_empty_validation_data():
    callbacks = default_callbacks("economy")
    empty = DataLoader(TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(callbacks, validation=empty, max_steps=3)
    assert callbacks[0].history["grok/norm"].steps == [0, 1, 2, 3]


def test_an_empty_stream_for_validation():
    detector = GrokkingDetector(schedule=EVERY)
    fit([detector], validation=DataLoader(NoData(), 8), max_steps=9)
    assert "grok/accuracy/train" in detector.history
    assert "grok/accuracy/validation" not in detector.history


class Ragged(Dataset):
    """Batches of sequences of different lengths, as language models have them."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.arange(index % 4 + 2) % 5, index % 3


class Sequences(Plain):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 6)

    def forward(self, tokens):
        return self.net(self.embed(tokens).mean(1))


def pad(items):
    tokens, labels = zip(*items, strict=True)
    return nn.utils.rnn.pad_sequence(tokens, batch_first=True), torch.tensor(labels)


def test_batches_that_are_padded_as_they_are_collated():
    detector = GrokkingDetector(schedule=EVERY)
    fit([detector], Sequences(), DataLoader(Ragged(), 4, collate_fn=pad), max_steps=3)
    assert len(detector.history["grok/accuracy/train"]) == 4


def test_a_glob_that_matches_nothing_and_a_preset_that_minds_it_not():
    with pytest.raises(MisconfigurationException, match=r"matches nothing.*net.0.weight, net.0.bias"):
        fit([NormMonitor("encoder.*")])

    class Gains(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.LayerNorm(6)

    callbacks = default_callbacks("economy")
    with pytest.warns(UserWarning, match="are left out") as caught:
        fit(callbacks, Gains(), max_steps=2)
    said = [str(warning.message) for warning in caught if " left out" in str(warning.message)]
    assert len(said) == 1
    assert "SpectralEntropyMonitor, WeightEntropyMonitor are left out, as not applicable to this model: " in said[0]
    assert "no parameter with two or more dimensions" in said[0]


# Ways to run.

FAST = {"max_steps": ..., "logger": ...}
BARE = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "log_every_n_steps"), ...
)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"fast_dev_run": True, **FAST}, {"fast_dev_run": 3, **FAST}, {"barebones": True, **BARE},
        {"limit_train_batches": 2}, {"limit_train_batches": 0.5}, {"limit_val_batches": 0}, {"limit_val_batches": 1},
        {"overfit_batches": 2}, {"num_sanity_val_steps": -1}, {"num_sanity_val_steps": 0}, {"max_epochs": 2, "max_steps": -1},
        {"min_steps": 3}, {"max_time": "00:00:10:00"}, {"val_check_interval": 1},
        {"val_check_interval": 3, "check_val_every_n_epoch": None}, {"detect_anomaly": True}, {"profiler": "simple"},
        {"reload_dataloaders_every_n_epochs": 1}, {"deterministic": True}, {"gradient_clip_val": 0.5},
        {"accumulate_grad_batches": 3}, {"inference_mode": False}, {"use_distributed_sampler": False},
        {"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"precision": "64-true"}, {"precision": "16-true"},
    ],
    ids=lambda kwargs: " ".join(f"{key}={value}" for key, value in kwargs.items() if value is not ...),
)  # fmt: skip
def test_settings_of_the_trainer(kwargs, quiet):
    matters = {"fast_dev_run", "inference_mode", "precision"} & set(kwargs)
    monitors = all_monitors(schedule=EVERY) if matters else default_callbacks("economy", schedule=EVERY)
    counting = Counting(schedule=EVERY)
    # BatchNorm does not train in half precision on a CPU.
    module = Plain() if kwargs.get("precision", "").endswith("16-true") else Classifier()
    _, made = fit([*monitors, counting], module, validation=loader(16), **{"max_steps": 4, **kwargs})
    assert counting.steps == list(range(made.global_step + 1))
    assert not counting._recorder.switched_off
    if not kwargs.get("fast_dev_run"):
        assert made.global_step >= 3


def test_no_steps_at_all(tmp_path):
    monitor = Counting()
    fit([monitor], max_steps=0, logger=TensorBoardLogger(tmp_path))
    assert monitor.steps in ([], [0])


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_without_fit_monitors_rest(method):
    class Complete(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 1.0)

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    monitors = [Counting(), GrokkingDetector()]
    made = trainer(monitors)
    with contextlib.redirect_stdout(io.StringIO()):
        getattr(made, method)(Complete(), loader())
    assert monitors[0].steps == []
    # And before or after a fit they don't disturb it.
    module, made = fit(monitors, Complete(), validation=loader(8), max_steps=3)
    with contextlib.redirect_stdout(io.StringIO()):
        getattr(made, method)(module, loader())
    assert monitors[0].steps == [0, 1, 2, 3]


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.Adam(self.net[2].parameters())


def test_several_optimisers_by_hand():
    """Lightning counts the steps of all of them."""
    monitors = [Counting(schedule=EVERY), Counting("third", schedule=EverySteps(3))]
    fit(monitors, Manual(), max_steps=9)
    assert monitors[0].steps == [0, 1, 3, 4, 6, 7, 9]
    assert monitors[1].steps == [0, 3, 6, 9]


def test_half_precision_is_measured_in_double():
    class Types(Monitor):
        def bind(self, view):
            view.require_samples()

        def measure(self, snapshot):
            assert snapshot.weights["net.0.weight"].dtype == torch.bfloat16
            assert snapshot.spectrum("net.0.weight").dtype == torch.float64
            assert snapshot.logits().dtype == torch.bfloat16
            return {"loss": snapshot.loss()}

    monitor, norm = Types(on_error="raise"), NormMonitor()
    module, _ = fit([monitor, norm], precision="bf16-true", max_steps=2)
    assert module.net[0].weight.dtype == torch.bfloat16
    exact = torch.cat([p.detach().double().flatten() for p in module.parameters()]).norm().item()
    assert norm.history["grok/norm"].values[-1] == pytest.approx(exact, rel=1e-12)


class Compilable(Plain):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
def test_models_that_make_tensors_as_they_go(precision, quiet):
    class Making(Plain):
        def forward(self, x):
            return self.net(x + torch.zeros(6))

    detector = GrokkingDetector(schedule=EVERY, on_error="raise")
    fit([detector], Making(), precision=precision, max_steps=2)
    assert len(detector.history["grok/loss/train"]) == 3
    assert torch.get_default_dtype() == torch.float32


def test_a_compiled_module():
    module = Compilable()
    monitors = [NormMonitor(), GrokkingDetector(), *(make() for name, make in ALL_MONITORS.items() if "Sparsity" in name)]
    compiled = torch.compile(module, backend="eager")
    fit(monitors, compiled, max_steps=3)
    assert "grok/norm/net.0.weight" in monitors[0].history
    assert not monitors[0]._recorder.switched_off


def test_a_compiled_part():
    module = Compilable()
    module.net = torch.compile(module.net, backend="eager")
    monitors = [NormMonitor(), *(make() for name, make in ALL_MONITORS.items() if "Sparsity" in name)]
    fit(monitors, module, max_steps=3)
    assert "grok/norm/net.0.weight" in monitors[0].history
    assert any("/net.1" in key for key in monitors[1].history)


# Ends.


class Interrupted(Plain):
    def __init__(self, error, at=3):
        super().__init__()
        self.error, self.at = error, at

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.at:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.fixture
def _signals():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)  # Lightning leaves Ctrl-C ignored.


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt(), SystemExit), (RuntimeError("oh"), RuntimeError)])
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_interrupted(tmp_path, error, raised, kind):
    logger = kind(tmp_path)
    monitors = [Counting(schedule=EVERY), NormMonitor()]
    with pytest.raises(raised):
        fit(monitors, Interrupted(error), logger=logger)
    assert monitors[0].history["grok/count"].steps == [0, 1, 2, 3]
    if kind is TensorBoardLogger:
        assert [step for step, _ in events(logger.log_dir)["grok/count"]] == [0, 1, 2, 3]
    assert all(monitor.session is None for monitor in monitors)
    # In a notebook one tries again, perhaps in another order.
    fit(monitors[::-1], max_steps=4)
    assert monitors[0].history["grok/count"].steps == [0, 1, 2, 3, 4]


def test_a_trainer_that_failed_is_tried_again():
    monitor = Counting(schedule=EVERY)
    module = Interrupted(RuntimeError("once"))
    made = trainer([monitor])
    with pytest.raises(RuntimeError, match="once"):
        made.fit(module, loader())
    module.at = -1
    made.fit(module, loader())
    assert monitor.history["grok/count"].steps == list(range(9))


def test_a_failure_at_the_start_leaves_the_callbacks_usable():
    monitors = [Counting(schedule=EVERY), NormMonitor("nothing")]
    with pytest.raises(MisconfigurationException):
        fit(monitors)
    assert all(monitor.session is None for monitor in monitors)
    fit(monitors[:1], max_steps=2)
    assert monitors[0].history["grok/count"].steps == [0, 1, 2]


class Failing(Monitor):
    def measure(self, snapshot):
        if snapshot.step == 2:
            raise ZeroDivisionError("no more")
        return {"failing": 1.0}


def test_a_monitor_that_fails_is_switched_off_with_one_warning_and_the_run_goes_on(tmp_path):
    monitors = [Failing(schedule=EVERY), Counting(schedule=EVERY)]
    with pytest.warns(UserWarning, match="Failing.*switched off") as caught:
        module, _ = fit(monitors, logger=TensorBoardLogger(tmp_path))
    assert sum("switched off" in str(warning.message) for warning in caught) == 1
    assert len(module.losses) == 8
    assert monitors[1].steps == list(range(9))
    assert monitors[0].history["grok/failing"].steps == [0, 1]


def test_or_it_stops_the_run():
    module = Plain()
    with pytest.raises(ZeroDivisionError, match="no more"):
        fit([Failing(schedule=EVERY, on_error="raise")], module)
    assert len(module.losses) == 2


def test_a_loop_of_epochs_of_one_step_is_followed():
    """Full-batch training, as grokking experiments have it."""
    detector, monitor = GrokkingDetector(), Counting(schedule=EVERY)
    fit([detector, monitor], Plain(logs=True), loader(32, batch_size=32), loader(8), max_steps=-1, max_epochs=12)
    assert monitor.steps == list(range(13))
    assert detector.history["train_acc"].steps == list(range(1, 13))
    assert detector.history["val_acc"].steps == list(range(1, 13))


def test_a_module_whose_training_data_only_it_knows():
    """Loaders come from the module's own hooks."""

    class Own(Plain):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return [DataLoader(Stream(samples(8)), 4), loader(8)]

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    detector = GrokkingDetector(schedule=EVERY)
    made = trainer([detector])
    made.fit(Own())
    assert detector.history["grok/accuracy/train"].steps == list(range(9))
    assert detector.history["grok/accuracy/validation"].steps == [5, 6, 7, 8]


def test_a_manual_probe_where_the_trainers_data_cannot_be_read():
    class Strange(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["pair"], batch_idx)

    detector = GrokkingDetector(probe=Probe(train=samples(12), validation=samples(5, 1)), schedule=EVERY)
    strange = DataLoader([{"pair": pair, "note": "text"} for pair in samples(16)], 8)
    fit([detector], Strange(), strange, max_steps=3)
    assert len(detector.history["grok/accuracy/validation"]) == 4


def test_lightnings_own_callbacks_beside(tmp_path, quiet):
    callbacks = [
        L.callbacks.LearningRateMonitor(), Counting(schedule=EVERY),
        L.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2),
        L.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1), L.callbacks.GradientAccumulationScheduler({0: 2}),
        L.callbacks.Timer(), L.callbacks.LearningRateFinder(num_training_steps=3, update_attr=True), NormMonitor(),
    ]  # fmt: skip
    monitor = callbacks[1]
    settings = {"max_steps": -1, "max_epochs": 4, "enable_checkpointing": True, "default_root_dir": tmp_path}
    _, made = fit(callbacks, Classifier(), logger=TensorBoardLogger(tmp_path), **settings)
    assert monitor.history["grok/count"].steps == list(range(made.global_step + 1))
