"""A run with monitors is bit for bit the run without them."""

from __future__ import annotations

import random
from functools import cache

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from grok_callbacks import AtValidation, EveryEpoch, EverySteps, GrokkingForecast, Monitor, Probe
from tests._common import Classifier, Counting, Plain, Stream, fit, loader, samples
from tests.callbacks._all_monitors import ALONE, all_monitors

# A measure may have no value for an untrained model; that is not what is looked at here.
pytestmark = pytest.mark.filterwarnings("ignore:.*; said once")


class Augmenting(Dataset):
    """Draws random numbers for every sample from all generators there are, one of its own included."""

    def __init__(self):
        self.data = samples(24)
        self.own = np.random.default_rng(0)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + 0.1 * (torch.rand(1) + random.random() + np.random.rand() + self.own.random()).float(), y


class Stateful(Classifier):
    """Counts its calls in a buffer, keeps a generator, and stays in part in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(0)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        return self.net(self.frozen(x)) + 0.1 * torch.rand(1, generator=self.generator)

    def on_train_start(self):
        self.net[1].eval()


class Manual(Classifier):
    """Two optimisers by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.Adam(self.net[4].parameters(), 0.01)


def shuffled(data=None, **kwargs):
    return DataLoader(samples(24) if data is None else data, 8, shuffle=True, **kwargs)


SCENARIOS = {
    "dropout and BatchNorm, shuffled, accumulated, validated": lambda: {
        "train": shuffled(),
        "validation": shuffled(),
        "accumulate_grad_batches": 2,
        "val_check_interval": 2,
    },
    "persistent workers": lambda: {
        "train": shuffled(num_workers=1, persistent_workers=True),
        "validation": loader(num_workers=1, persistent_workers=True),
    },
    "a generator of the loader's own": lambda: {"train": shuffled(generator=torch.Generator().manual_seed(5))},
    "random samples": lambda: {"train": shuffled(Augmenting()), "validation": DataLoader(Augmenting(), 8)},
    "a random sampler": lambda: {"train": DataLoader(samples(24), 8, sampler=WeightedRandomSampler(torch.ones(24), 24))},
    "data that can only be iterated": lambda: {
        "train": DataLoader(Stream(samples(24)), 8),
        "validation": DataLoader(Stream(samples(24)), 8),
    },
    "a model with a state": lambda: {"module": Stateful()},
    "several optimisers by hand": lambda: {"module": Manual()},
    "half the precision": lambda: {"precision": "bf16-true", "module": Plain()},
    "mixed precision": lambda: {"precision": "bf16-mixed"},
    "gradient clipping and no inference mode": lambda: {
        "gradient_clip_val": 0.1,
        "inference_mode": False,
        "validation": loader(),
        "accumulate_grad_batches": 2,
    },
}


def run(scenario, callbacks=()):
    """Everything that a monitor could change."""
    L.seed_everything(7, verbose=False)
    settings = {"module": Classifier(), "max_steps": 12, **SCENARIOS[scenario]()}
    # Made anew, so that all initial weights are drawn alike.
    module, trainer = fit(callbacks, **settings)
    return {
        "losses": module.losses,
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "moments": [list(state.values()) for optimizer in trainer.optimizers for state in optimizer.state.values()],
        "gradients": [parameter.grad for parameter in module.parameters()],
        "modes": [submodule.training for submodule in module.modules()],
        "generators": (torch.get_rng_state(), random.getstate(), [str(part) for part in np.random.get_state()]),
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
    }


baseline = cache(run)


def assert_same(first, second, path=""):
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{path}/{index}")
    else:
        assert first == second, path


def assert_all_measured(monitors):
    for monitor in monitors:
        recorder = monitor._recorder
        assert monitor.label not in recorder.switched_off
        if type(monitor) is GrokkingForecast:
            continue
        assert recorder.keys_of(monitor)
        assert len(recorder.history[recorder.keys_of(monitor)[0]]) >= 3


def test_the_baseline_is_repeatable_and_would_show_a_difference():
    scenario = next(iter(SCENARIOS))
    assert_same(run(scenario), baseline(scenario))

    class Actor(L.Callback):
        def on_train_batch_end(self, *args):
            torch.rand(1)

    with pytest.raises(AssertionError):
        assert_same(run(scenario, [Actor()]), baseline(scenario))


@pytest.mark.parametrize("name", ALONE)
def test_every_monitor_alone(name):
    scenario = next(iter(SCENARIOS))
    monitor = ALONE[name](schedule=EverySteps(1), on_error="raise")
    assert_same(run(scenario, [monitor]), baseline(scenario))
    assert_all_measured([monitor])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_monitors_together(scenario):
    monitors = all_monitors(schedule=EverySteps(2), on_error="raise", probe=Probe(size=12))
    assert_same(run(scenario, monitors), baseline(scenario))
    assert_all_measured(monitors)


@pytest.mark.parametrize("schedule", [EveryEpoch(), AtValidation()])
def test_measuring_at_events(schedule):
    scenario = next(iter(SCENARIOS))
    monitors = all_monitors(schedule=schedule, on_error="raise")
    assert_same(run(scenario, monitors), baseline(scenario))
    assert_all_measured(monitors)


class Gambler(Monitor):
    """Consumes random numbers of every kind."""

    def measure(self, snapshot):
        torch.manual_seed(1)
        return {"gamble": random.random() + np.random.rand() + torch.rand(1).item() + random.gauss(0, 1)}


class Differentiating(Monitor):
    """Measures gradients in both ways there are."""

    def bind(self, view):
        view.require_samples()

    def measure(self, snapshot):
        parameters = list(snapshot.view.parameters.values())
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        run = snapshot.forward(grad=True)
        loss = snapshot.loss_of(*snapshot.view.probe.align(run.logits, snapshot.batch().targets))
        by_hand = torch.autograd.grad(loss, parameters, retain_graph=True)
        loss.backward()
        assert all(torch.equal(gradient, parameter.grad) for gradient, parameter in zip(by_hand, parameters, strict=True))
        return {"gradient": sum(gradient.double().norm() for gradient in by_hand)}


class Switching(Monitor):
    """Leaves the model in another mode, with gradients cleared."""

    def measure(self, snapshot):
        model = snapshot.view.model
        model.train(not model.training)
        model.zero_grad()
        return {"mode": float(model.training)}


@pytest.mark.parametrize("scenario", list(SCENARIOS)[:4])
def test_monitors_that_take_liberties(scenario):
    monitors = [Gambler(), Differentiating(), Switching(), Counting()]
    for monitor in monitors:
        monitor.schedule, monitor.on_error = EverySteps(1), "raise"
    assert_same(run(scenario, monitors), baseline(scenario))
    assert_all_measured(monitors)


def test_a_monitor_that_writes_weights_stops_the_run():
    class Writer(Monitor):
        def measure(self, snapshot):
            snapshot.weights["net.0.weight"].mul_(0.5)
            return {}

    with pytest.raises(RuntimeError, match="Writer wrote into the model's weights"):
        fit([Writer()])


def test_a_monitor_that_fails_changes_nothing():
    class Failing(Monitor):
        def bind(self, view):
            view.require_samples()

        def measure(self, snapshot):
            torch.manual_seed(0)
            snapshot.forward(grad=True).logits.sum().backward()
            snapshot.view.model.train()
            raise RuntimeError("in the middle")

    scenario = next(iter(SCENARIOS))
    with pytest.warns(UserWarning, match="in the middle"):
        watched = run(scenario, [Failing()])
    assert_same(watched, baseline(scenario))
