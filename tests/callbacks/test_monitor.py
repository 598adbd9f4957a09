from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
import warnings

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset
from torchmetrics import Metric

from grok_callbacks import (
    AtValidation,
    EveryEpoch,
    EverySteps,
    GrokkingDetector,
    LogSpaced,
    Monitor,
    NormMonitor,
    Probe,
    SpectralEntropyMonitor,
    default_callbacks,
)
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks._packing import unpack
from tests._common import Classifier, Counting, Logits, Plain, Stream, fit, loader, samples, trainer
from tests.callbacks._all_monitors import ALONE


def every(**kwargs):
    return EverySteps(1, **kwargs)


# When.


def test_measures_at_log_spaced_steps_by_default():
    monitor = Counting()
    fit([monitor], max_steps=60)
    expected = [step for step in itertools.takewhile(lambda s: s is not None, _steps(LogSpaced())) if step <= 60]
    assert monitor.steps == expected


def _steps(schedule):
    step = -1
    while step < 10**4:
        step = schedule.next_step(step)
        yield step


@pytest.mark.parametrize(
    ("schedule", "kwargs", "expected"),
    [
        (EverySteps(3), {}, [0, 3, 6, 9]),
        (EverySteps(3), {"accumulate_grad_batches": 4}, [0, 3, 6, 9]),
        (EveryEpoch(), {}, [0, 4, 8, 10]),
        (EveryEpoch(2), {}, [0, 8]),
        (EveryEpoch(), {"accumulate_grad_batches": 4}, list(range(11))),
        (EveryEpoch(), {"accumulate_grad_batches": 3}, list(range(0, 11, 2))),
        (AtValidation(), {"validation": loader(8)}, [0, 4, 8]),
        (AtValidation(), {"validation": loader(8), "val_check_interval": 2}, [0, 2, 4, 6, 8, 10]),
        (AtValidation(), {"validation": loader(8), "num_sanity_val_steps": 2, "check_val_every_n_epoch": 2}, [0, 8]),
    ],
)
def test_schedules_in_a_trainer(schedule, kwargs, expected):
    """The loader has four batches."""
    monitor = Counting(schedule=schedule)
    fit([monitor], max_steps=10, **kwargs)
    assert monitor.steps == expected


def test_waiting_for_a_validation_that_never_comes_is_said():
    waiting, other = Counting("waiting", schedule=AtValidation()), Counting("other", schedule=EverySteps(5))
    with pytest.warns(UserWarning, match=r"No validation in this run: Counting\(name='waiting'.*\)\) will measure"):
        fit([waiting, other], max_steps=10)
    assert (waiting.steps, other.steps) == ([0], [0, 5, 10])


def test_step_0_is_the_model_before_training_and_step_s_the_weights_after_s_steps():
    class Weights(Monitor):
        def measure(self, snapshot):
            return {"weight": snapshot.weights["net.0.weight"][0, 0]}

    module = Plain()
    initial = module.net[0].weight[0, 0].item()
    seen = []

    class After(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(pl_module.net[0].weight[0, 0].item())

    monitor = Weights(schedule=every())
    fit([monitor, After()], module)
    assert monitor.history["grok/weight"].values == [initial, *seen]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("counted", [False, True])
def test_optimiser_steps_that_lightning_does_not_count_are_said(counted):
    class Manual(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=counted)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    monitor = Counting(schedule=every())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([monitor], Manual(), max_steps=-1, max_epochs=3)
    said = [message for message in (str(warning.message) for warning in caught) if "counted no optimiser step" in message]
    assert len(said) == (0 if counted else 1)
    assert monitor.steps == (list(range(13)) if counted else [0])


# Whom it looks at.


class Inputs(Monitor):
    """Remembers its probe."""

    def __init__(self, split="train", **kwargs):
        super().__init__(**kwargs)
        self.split = split
        self.seen = {}

    def bind(self, view):
        if self.split == "train":
            view.require_samples("train")

    def measure(self, snapshot):
        if snapshot.has(self.split):
            self.seen[snapshot.step] = snapshot.batch(self.split)
        return {f"has/{self.split}": float(snapshot.has(self.split))}


def test_all_monitors_share_one_pass_a_split():
    class Counted(Plain):
        def forward(self, x):
            # Of the class: a module's own attributes are given back after a pass.
            Counted.calls += not self.training
            return super().forward(x)

    Counted.calls = 0
    counts = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            counts.append(pl_module.calls)

    module = Counted()
    callbacks = [
        *default_callbacks("economy", schedule=every()),
        Logits(prefix="a"),
        Logits(prefix="b", schedule=every()),
        Count(),
    ]
    fit(callbacks, module, validation=loader(seed=1))
    assert set(torch.tensor(counts).diff().tolist()) == {2}


def test_the_probe_is_the_users_data():
    train, validation = Inputs(), Inputs("validation")
    fit([train, validation], validation=loader(16, seed=1))
    rows = {tuple(row) for row in samples(32).tensors[0].tolist()}
    assert {tuple(row) for row in train.seen[0].inputs.tolist()} == rows
    assert {tuple(row) for row in validation.seen[0].inputs.tolist()} == {tuple(r) for r in samples(16, 1).tensors[0].tolist()}
    assert torch.equal(train.seen[0].inputs, train.seen[8].inputs)


def test_a_probe_of_ones_own():
    own = Inputs(probe=Probe(size=3, train=TensorDataset(torch.ones(9, 6), torch.zeros(9, dtype=torch.long))))
    others = Inputs(prefix="others", probe=Probe(size=5))
    fit([own, others])
    assert own.seen[0].inputs.sum() == 18
    assert len(others.seen[0]) == 5


def test_of_a_dataset_split_by_samplers_each_split_has_its_share():
    data = TensorDataset(torch.arange(40.0)[:, None].expand(40, 6), torch.zeros(40, dtype=torch.long))
    train, validation = Inputs(), Inputs("validation")
    fit(
        [train, validation],
        train=DataLoader(data, 8, sampler=SubsetRandomSampler(range(24))),
        validation=DataLoader(data, 8, sampler=SubsetRandomSampler(range(24, 40))),
    )
    assert train.seen[0].inputs.max() == 23
    assert validation.seen[0].inputs.min() == 24


class Dictionaries(Dataset):
    def __init__(self, count=16):
        self.tokens = torch.randint(5, (count, 4), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = self.tokens[index]
        return {"input_ids": tokens, "attention_mask": torch.ones(4), "labels": tokens.masked_fill(tokens == 0, -100)}


class Language(L.LightningModule):
    """Shifts its labels itself, as causal language models do."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_language_models():
    module = Language()
    monitor = GrokkingDetector(schedule=EverySteps(100))
    with torch.no_grad():
        expected = module.training_step(Dictionaries()[:], 0).item()
    fit([monitor], module, DataLoader(Dictionaries(), 4, shuffle=True))
    assert monitor.history["grok/loss/train"].values[0] == pytest.approx(expected, rel=1e-6)


def test_transfer_hooks_apply_to_the_probe():
    class Scaling(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 0, batch[1]

    monitor = Inputs()
    fit([monitor], Scaling())
    assert monitor.seen[0].inputs.abs().sum() == 0


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
@pytest.mark.parametrize("key", ["a", 0])
def test_combined_loaders(mode, key):
    class Combined(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[key], batch_idx)

        def validation_step(self, batch, batch_idx, dataloader_idx):
            pass

    train, validation = Inputs(probe=Probe(unpack=lambda batch: batch[key])), Inputs("validation", probe=Probe())
    loaders = [loader(16), loader(8, seed=1)]
    iterables = loaders if key == 0 else {"a": loaders[0], "b": loaders[1]}
    # Validation loaders run one after the other, and the first is looked at.
    fit([train, validation], Combined(), CombinedLoader(iterables, mode), validation=loaders[::-1])
    # Of the longer loader, whose order stays the same, the shorter one leaves a batch.
    assert len(train.seen[0]) == (16 if mode == "max_size_cycle" else 8)
    assert len(validation.seen[0]) == 8


def test_loaders_without_automatic_batching():
    class Batches(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return loader().dataset[8 * index : 8 * index + 8]

    monitor = Logits(probe=Probe(size=12))
    fit([monitor], train=DataLoader(Batches(), batch_size=None))
    assert monitor.history["grok/logits/size"].values[0] == 12


# Data that can only be iterated.


def stream(count=32, seed=0):
    return DataLoader(Stream(samples(count, seed)), 8)


def test_of_iterable_data_the_first_batches_are_kept():
    weights, data, validation = Counting(schedule=every()), Inputs(schedule=every()), Inputs("validation", schedule=every())
    probe = Probe(size=20)
    for monitor in (weights, data, validation):
        monitor.probe = probe
    fit([weights, data, validation], train=stream(), validation=stream(12, seed=1), max_steps=8)
    assert weights.steps == list(range(9))
    # Three batches make a full probe: the third passes when two steps have been taken.
    assert sorted(data.seen) == [3, 4, 5, 6, 7, 8]
    assert torch.equal(data.seen[3].inputs, samples(32).tensors[0][:20])
    assert torch.equal(data.seen[8].inputs, data.seen[3].inputs)
    # The sanity check's batches do not count.
    assert min(validation.seen) == 5
    assert torch.equal(validation.seen[5].inputs, samples(12, 1).tensors[0])


def test_iterable_data_that_are_fewer_than_the_probe_are_kept_whole():
    data = Inputs(schedule=every())
    fit([data], train=stream(24), max_steps=7)
    # They are known to be all when the epoch ends, after its three steps.
    assert sorted(data.seen) == [4, 5, 6, 7]
    assert len(data.seen[4]) == 24


def test_iterable_batches_that_do_not_fit_together_make_a_smaller_probe():
    class Ragged(Dataset):
        def __iter__(self):
            for length in (3, 4, 5, 6):
                yield torch.zeros(2, length, dtype=torch.long), torch.zeros(2, dtype=torch.long)

    class Summing(Plain):
        def forward(self, x):
            return self.net(x.float().mean(1, keepdim=True).expand(-1, 6))

    monitor = Inputs(schedule=every())
    with pytest.warns(UserWarning, match="probe holds 2 samples and takes no more.*different shapes"):
        fit([monitor], Summing(), list(iter(Ragged())) and _Loader(list(iter(Ragged()))))
    assert len(monitor.seen[8]) == 2


class _Loader:
    """Not torch's, and cannot be indexed."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


# What can't be inferred.


def unreadable():
    return _Loader([(*loader().dataset[:8], "a third")] * 4)


class Triples(Plain):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch[:2], batch_idx)


class TripleData(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return (*samples()[index], index)


@pytest.mark.parametrize("train", [unreadable, lambda: DataLoader(TripleData(), 8)])
class TestBatchesThatCannotBeRead:
    def test_stop_a_monitor_of_the_users(self, train):
        module = Triples()
        with pytest.raises(MisconfigurationException, match=r"`unpack` of the Probe"):
            fit([GrokkingDetector()], module, train())
        assert module.losses == []

    def test_do_not_concern_a_monitor_that_needs_none(self, train):
        monitor = NormMonitor()
        fit([monitor], Triples(), train())
        assert monitor.history["grok/norm"].steps == list(range(9))

    def test_cost_a_preset_the_monitors_that_need_them(self, train):
        callbacks = default_callbacks("standard")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(callbacks, Triples(logs=True), train())
        said = [str(warning.message) for warning in caught if " left out" in str(warning.message)]
        # They have one reason, so they are named together.
        assert len(said) == 1
        assert {"ActivationSparsityMonitor", "RobustnessMonitor"} < set(said[0].partition(" are left out")[0].split(", "))
        assert "since the probe does not fit this data and model: " in said[0]
        assert "`unpack` of the Probe" in said[0]
        assert "grok/norm" in callbacks[0].history
        # The detector goes by what the module logs.
        assert "train_acc" in callbacks[0].history

    def test_are_read_with_unpack(self, train):
        monitor = GrokkingDetector(probe=Probe(unpack=lambda batch: batch[:2]), schedule=every())
        fit([monitor], Triples(), train())
        assert "grok/accuracy/train" in monitor.history


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormMonitor("nothing.*"), r"`parameters`: 'nothing\.\*' matches nothing.*net.0.weight"),
        (lambda: SpectralEntropyMonitor("*.bias"), "`parameters`"),
        (lambda: GrokkingDetector(probe=Probe(forward=lambda model, x: 3)), "returned a int.*`forward` of the Probe"),
        (lambda: GrokkingDetector(probe=Probe(forward=lambda model, x: model.nothing)), "could not be called.*`forward`"),
        (lambda: GrokkingDetector(probe=Probe(unpack=lambda b: (b[0], b[1][:, None]))), "don't fit"),
        (lambda: GrokkingDetector(probe=Probe(unpack=lambda b: 1 / 0)), "ZeroDivisionError"),
        (lambda: GrokkingDetector(probe=Probe(train=torch.zeros(0, 6))), "empty"),
    ],
)
def test_what_cannot_work_is_said_at_the_start_and_names_the_argument(make, message):
    module = Plain()
    with pytest.raises(MisconfigurationException, match=message):
        fit([make()], module)
    assert module.losses == []


def test_validation_data_that_cannot_be_read_are_said_at_the_start_too():
    with pytest.raises(MisconfigurationException, match=r"`unpack` of the Probe.*`validation_metric`"):
        fit([GrokkingDetector()], Plain(), validation=DataLoader(TripleData(), 8), num_sanity_val_steps=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prefix": ""}, "`prefix`"), ({"prefix": "a/"}, "`prefix`"), ({"budget": 0}, "`budget`"),
        ({"on_error": "ignore"}, "`on_error`"), ({"probe": samples()}, "`probe`"), ({"schedule": 5}, "`schedule`"),
    ],
)  # fmt: skip
def test_settings(kwargs, message):
    with pytest.raises(MisconfigurationException, match=message):
        Counting(**kwargs)


# Hooks.


def stand_ins(monitor):
    return [name for name in vars(monitor) if hasattr(L.Callback, name)]


def test_idle_hooks_are_out_of_the_way_while_fitting_and_back_afterwards():
    during = {}

    class Spy(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            for number, callback in enumerate(c for c in trainer.callbacks if isinstance(c, Monitor)):
                during[number] = [callable(getattr(callback, hook)) for hook in ("on_train_batch_end", "on_before_zero_grad")]

    monitors = [Counting(), Counting(prefix="b")]
    fit([*monitors, Spy()])
    assert during == {0: [True, False], 1: [False, False]}
    for monitor in monitors:
        assert not stand_ins(monitor)
        assert callable(monitor.on_before_zero_grad)


def calls_of(hooks):
    """A monitor class that overrides hooks without calling ``super()``, as Lightning's callbacks may."""
    calls = []

    def override(name):
        return lambda self, trainer, pl_module, *args, **kwargs: calls.append(name)

    return type("Overriding", (Counting,), {hook: override(hook) for hook in hooks}), calls


HOOKS = [
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_after_backward",
    "on_train_batch_end", "on_train_epoch_end", "on_validation_batch_start", "on_validation_batch_end",
    "on_validation_epoch_end", "on_validation_end", "on_train_end", "on_save_checkpoint", "on_fit_start", "on_fit_end",
]  # fmt: skip


@pytest.mark.parametrize("position", ["first", "second"])
def test_hooks_of_a_subclass_are_called_and_do_not_stop_the_others(position, tmp_path):
    overriding, calls = calls_of(HOOKS)
    monitors = [overriding(prefix="o", schedule=every()), Counting(schedule=every())]
    if position == "second":
        monitors.reverse()
    _, made = fit(monitors, validation=loader(8))
    made.save_checkpoint(tmp_path / "x.ckpt")
    assert all(monitor.steps == list(range(9)) for monitor in monitors)
    assert set(calls) == set(HOOKS)
    assert calls.count("on_train_batch_end") == 8
    assert calls.count("on_train_start") == 1


def test_a_callback_that_is_a_monitor_and_more():
    class Both(Counting, ModelCheckpoint):
        def __init__(self):
            ModelCheckpoint.__init__(self)
            Counting.__init__(self)

    seen = []

    class Cooperating(Counting):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            seen.append(batch_idx)

    monitor = Cooperating(schedule=every())
    fit([monitor])
    assert monitor.steps == list(range(9))
    assert len(seen) == 8
    assert issubclass(Both, Monitor)


# Identity, copies.


def test_labels_tell_the_settings():
    assert Counting().label == "Counting"
    assert NormMonitor("net.*", ord=1).label == "NormMonitor(parameters='net.*', ord=1)"
    assert Counting(probe=Probe(size=5)).state_key == "Counting(probe=Probe(size=5, seed=0))"
    assert GrokkingDetector(probe=Probe(unpack=F.relu)).state_key == GrokkingDetector(probe=Probe(unpack=F.relu)).state_key
    assert " at 0x" not in type("Odd", (Counting,), {})(name=object()).state_key


def test_a_signature_that_does_not_fit():
    with pytest.raises(TypeError, match="nothing"):
        NormMonitor(nothing=3)


def test_two_of_one_class_have_states_of_their_own(tmp_path):
    monitors = [NormMonitor("net.0.*"), NormMonitor("net.2.*", prefix="other")]
    _, made = fit(monitors)
    made.save_checkpoint(tmp_path / "x.ckpt")
    states = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    assert {monitor.state_key for monitor in monitors} <= set(states)
    assert set(unpack(states[monitors[1].state_key]["recorder"]["history"])) == {
        "other/norm",
        "other/norm/net.2.weight",
        "other/norm/net.2.bias",
    }


def test_two_that_are_the_same_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer([NormMonitor(), NormMonitor()])


def test_two_that_log_the_same_keys_are_told_so_at_the_start():
    module = Plain()
    with pytest.raises(MisconfigurationException, match="give one of them another `prefix`"):
        fit([NormMonitor(), NormMonitor("net.*")], module)
    assert module.losses == []


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_monitors_are_copied_before_amid_and_after_a_run(name, copied):
    copies = {}

    class Copy(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                copies["amid"] = copied(monitor)

    monitor = ALONE[name](schedule=every())
    copies["before"] = copied(monitor)
    fit([monitor, Copy()], max_steps=4, train=loader(), validation=loader(8))
    copies["after"] = copied(monitor)
    for made in copies.values():
        assert made.label == monitor.label
        assert made.session is None
        assert not stand_ins(made)
    key = monitor._recorder.keys_of(monitor)[0]
    # A copy is a monitor of its own: it can be used, and knows nothing of the model.
    for made in copies.values():
        fit([made], max_steps=2)
        assert made.history[key].steps == [0, 1, 2]


def test_a_trainer_is_copied():
    monitors = [NormMonitor(), GrokkingDetector()]
    _, made = fit(monitors, max_steps=2)
    twin = copy.deepcopy(made)
    twins = [callback for callback in twin.callbacks if isinstance(callback, Monitor)]
    assert [callback.label for callback in twins] == [callback.label for callback in monitors]


# Metrics.


def test_the_metric_holds_the_last_measurement():
    monitor = NormMonitor()
    module, _ = fit([monitor], max_steps=3)
    weight = module.net[0].weight.detach().double()
    assert monitor.metric["of:net:0:weight"].compute() == pytest.approx(weight.norm().item())
    assert monitor.metric["of:net:0:weight"]._update_count == 1


@pytest.mark.parametrize("name", ALONE)
def test_every_monitor_has_a_metric_that_works_on_its_own(name):
    monitor = ALONE[name]()
    fit([monitor], max_steps=1, validation=loader(8))
    members = [monitor.metric] if isinstance(monitor.metric, Metric) else list(monitor.metric.values())
    assert all(isinstance(member, Metric) for member in members)
    for member in members:
        assert not any(state.is_inference() for state in member.metric_state.values() if isinstance(state, torch.Tensor))


# Reading what the module logs.


def test_the_modules_metrics_stand_in_the_history_at_the_right_step():
    """Lightning shows the last epoch's training accuracy during validation; it is no measurement of that moment."""

    class Recording(Classifier):
        def __init__(self):
            super().__init__(logs=True)
            self.train_accuracies, self.val_accuracies = {}, {}

        def on_train_epoch_end(self):
            self.train_accuracies[self.trainer.global_step] = self.trainer.callback_metrics["train_acc"].item()

        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                self.val_accuracies[self.trainer.global_step] = self.trainer.callback_metrics["val_acc"].item()

    module, monitor = Recording(), GrokkingDetector()
    fit([monitor], module, loader(shuffle=True), validation=loader(16, seed=1), max_steps=22, val_check_interval=2)
    for key, expected in [("train_acc", module.train_accuracies), ("val_acc", module.val_accuracies)]:
        assert dict(zip(monitor.history[key].steps, monitor.history[key].values, strict=True)) == pytest.approx(expected)
    assert monitor.history["train_acc"].steps == [4, 8, 12, 16, 20, 22]


def test_metrics_logged_in_the_modules_own_hook_at_the_end_of_an_epoch():
    class Late(Plain):
        def on_train_epoch_end(self):
            self.log("train_acc", 0.01 * self.trainer.global_step)

        def on_validation_epoch_end(self):
            self.log("val_acc", 0.02 * self.trainer.global_step)

    monitor = GrokkingDetector()
    fit([monitor], Late(), validation=loader(8), max_steps=12)
    assert monitor.history["train_acc"].steps == monitor.history["val_acc"].steps == [4, 8, 12]
    assert monitor.history["train_acc"].values == pytest.approx([0.04, 0.08, 0.12])
    assert monitor.history["val_acc"].values == pytest.approx([0.08, 0.16, 0.24])
    assert all(math.isfinite(value) for value in monitor.history["grok/accuracy/train"].values)


def test_a_class_shows_its_settings():
    assert list(inspect.signature(NormMonitor).parameters) == ["parameters", "ord", "kwargs"]
    assert "prefix" in inspect.signature(Monitor).parameters
