from __future__ import annotations

import random
from collections import deque
from contextlib import suppress

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchmetrics import MeanMetric

from grok_callbacks._isolation import fingerprint, isolated_rng, observing, untouched


def draws():
    """What the program's generators give next, without moving them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers = random.random(), np.random.rand(), torch.rand(1).item()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return numbers


def disturb():
    random.random()
    random.gauss(0, 1)  # Leaves half a pair behind.
    np.random.randn(3)
    torch.rand(5)
    torch.manual_seed(3)


def disturb_and_fail():
    disturb()
    raise ZeroDivisionError


class Sampler:
    """Keeps generators of its own, some of them deep inside."""

    def __init__(self):
        self.torch = torch.Generator().manual_seed(1)
        self.nested = {"numpy": [np.random.default_rng(1), np.random.RandomState(1)], "more": (object(),)}
        self.nested["me"] = self  # A cycle.
        self.python = random.Random(1)
        self.system = random.SystemRandom()

    def draw(self):
        numpy, legacy = self.nested["numpy"]
        self.system.random()
        return torch.rand(1, generator=self.torch).item(), numpy.random(), legacy.rand(), self.python.random()


def test_generators_get_their_states_back():
    expected = draws()
    with isolated_rng():
        disturb()
    assert draws() == expected


def test_generators_get_their_states_back_after_an_error():
    expected = draws()
    with pytest.raises(ZeroDivisionError), isolated_rng():
        disturb_and_fail()
    assert draws() == expected


def test_generators_that_an_object_keeps_get_theirs_back():
    first, second = Sampler(), Sampler()
    with isolated_rng(first):
        first.draw()
    assert first.draw() == second.draw()


def test_a_seed_makes_the_inside_independent_of_the_outside():
    inside = []
    for seed in (11, 12):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        with isolated_rng(seed=5):
            inside.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert inside[0] == inside[1]


@pytest.mark.parametrize("seed", [0, -3, 2**40, 2**70])
def test_any_whole_number_is_a_seed(seed):
    with isolated_rng(seed=seed):
        pass


class Meddler(nn.Module):
    """A module whose forward does to it all that a forward can."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("reassigned", torch.zeros(2))
        self.register_buffer("cache", None)
        self.register_buffer("broken", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("graph", torch.eye(2).to_sparse())
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        self.calls += 1
        self.reassigned = self.reassigned + 1
        self.cache = x.detach().clone()
        self.register_buffer("new", torch.ones(1))
        self.broken.mul_(2)
        self.train()
        return self.norm(self.linear(x)) + torch.rand(2) + torch.rand(2, generator=self.generator)


def state_of(model):
    return {
        "buffers": {
            name: (id(b), None if b is None else b._version) for m in model.modules() for name, b in m._buffers.items()
        },
        "values": [b.to_dense().nan_to_num(-1).tolist() for b in model.buffers()],
        "modes": [module.training for module in model.modules()],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "generator": model.generator.get_state().tolist(),
    }


@pytest.mark.parametrize("grad", [False, True])
def test_observing_leaves_the_model_as_it_was(grad):
    model = Meddler()
    model.norm.eval()  # A module that was set apart.
    before, expected = state_of(model), draws()
    with observing(model, grad=grad):
        assert not any(module.training for module in model.modules())
        assert torch.is_grad_enabled() == grad
        model(torch.randn(4, 3))
    assert state_of(model) == before
    assert draws() == expected


def test_observing_leaves_the_model_as_it_was_after_an_error():
    model = Meddler()
    before, expected = state_of(model), draws()
    with pytest.raises(RuntimeError), observing(model):
        nn.Sequential(model, model)(torch.randn(4, 3))  # The second call gets the wrong shape.
    assert state_of(model) == before
    assert draws() == expected


def test_observing_works_within_inference_mode_and_autocast():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), observing(model, grad=True):
        x = torch.randn(4, 3, requires_grad=True)
        y = model(x)
        assert y.dtype == torch.float32
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert not gradient.is_inference()


def test_observing_a_model_with_inference_buffers():
    model = nn.BatchNorm1d(2)
    with torch.inference_mode():
        model.running_mean = torch.zeros(2)
    with observing(model):
        model(torch.randn(4, 2))


def test_untouched_gives_gradients_modes_and_generators_back():
    model = Meddler()
    model.linear.weight.grad = torch.full((2, 3), 5.0)
    before, expected = state_of(model), draws()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad(), torch.inference_mode(), untouched(model, seed=1):
        sum((p**2).sum() for p in model.parameters()).backward()
        assert all(p.grad is not None for p in model.parameters())
        model.eval()
        disturb()
    assert state_of(model) == before
    assert draws() == expected
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128, torch.int8, torch.bool]
)
def test_a_thorough_fingerprint_tells_of_any_change(dtype):
    model = nn.Module()
    model.register_buffer("buffer", torch.zeros(3, 4, dtype=dtype).t())
    model.register_buffer("graph", torch.eye(2).to_sparse())
    model.register_buffer("empty", torch.zeros(0))
    before = fingerprint(model, thorough=True)
    assert fingerprint(model, thorough=True) == before
    model.buffer.data[1, 1] = 1
    assert fingerprint(model, thorough=True) != before
    assert fingerprint(model, thorough=False) == fingerprint(model, thorough=False)


class Restless(nn.Module):
    """Changes in its forward pass whatever a module may keep outside of parameters and buffers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.calls = 0
        self.state = None
        self.seen, self.last = [torch.zeros(2)], deque([1, 2], maxlen=2)
        self.table = {"a": 1, "t": torch.ones(2)}
        self.total = torch.zeros(())
        self.mean = MeanMetric()
        self.log_of_many = list(range(100_000))
        self.mean.update(2.0)

    def forward(self, x):
        self.calls += 1
        self.state = (x,)
        self.new = x
        self.seen[0] += 1
        self.seen.append(x)
        self.last.append(3)
        self.table["a"], self.table["b"] = 2, 3
        self.table["t"].mul_(2)
        self.total += 1
        self.mean.update(5.0)
        self.log_of_many.append(0)
        return self.layer(x)


def contents(module):
    return (
        module.calls, module.state, hasattr(module, "new"), [each.tolist() for each in module.seen], list(module.last),
        {key: torch.as_tensor(value).tolist() for key, value in module.table.items()}, float(module.total),
        float(module.mean.compute()), module.mean.update_count, len(module.log_of_many),
    )  # fmt: skip


def test_observing_gives_attributes_back():
    module = Restless()
    before, objects = contents(module), [id(module.seen), id(module.table), id(module.total), id(module.mean.mean_value)]
    with observing(module):
        module(torch.ones(4, 3))
        assert contents(module) != before
        assert module.calls == 1
    assert contents(module) == before
    assert [id(module.seen), id(module.table), id(module.total), id(module.mean.mean_value)] == objects


def test_observing_lets_the_log_of_a_module_rest():
    class Logging(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            self.log("mean", x.mean())
            self.log_dict({"sum": x.sum()})
            return self.layer(x)

    outer = nn.Sequential(Logging())
    with observing(outer):
        outer(torch.ones(4, 3))  # Without a Trainer a log would raise.
    assert "log" not in vars(outer[0])
    assert outer[0].log.__func__ is LightningModule.log


class Unit(nn.Linear):
    """Keeps its weight at unit length, as layers of prototypes do, in one of several ways."""

    def __init__(self, way):
        super().__init__(3, 2)
        self.way = way

    def forward(self, x):
        with torch.no_grad():
            unit = nn.functional.normalize(self.weight, dim=-1)
            if self.way == "copy":
                self.weight.copy_(unit)
            elif self.way == "out":
                torch.mul(unit, 1, out=self.weight)
            elif self.way == "foreach":
                torch._foreach_mul_([self.weight.data, self.bias], 0.5)
            else:
                self.weight.data.div_(self.weight.norm(dim=-1, keepdim=True))
        return super().forward(x)


@pytest.mark.parametrize("way", ["copy", "out", "foreach", "data"])
def test_observing_gives_weights_back_that_the_forward_pass_writes_to(way):
    model = nn.Sequential(nn.Linear(3, 3), Unit(way))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    versions = fingerprint(model, thorough=True)
    for _ in range(3):
        with observing(model):
            model(torch.ones(4, 3))
            assert not torch.equal(model[1].weight, before[2])
        assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
        assert fingerprint(model, thorough=True) == versions
    # What training wrote meanwhile is what comes back.
    with torch.no_grad():
        model[1].weight.fill_(2.0)
    with observing(model):
        model(torch.ones(4, 3))
    assert (model[1].weight == 2).all()


@pytest.mark.parametrize("first", ["none", "fails"])
def test_a_pass_that_was_none_or_failed_does_not_tell_what_is_written(first):
    model = nn.Sequential(nn.Linear(3, 3), Unit("copy"))
    before = model[1].weight.detach().clone()
    with suppress(RuntimeError), observing(model):
        model(torch.ones(4, 5)) if first == "fails" else torch.ones(4, 5)
    with observing(model):
        model(torch.ones(4, 3))
    assert torch.equal(model[1].weight, before)


def test_sparse_and_meta_tensors_among_attributes_are_left_alone():
    model = nn.Sequential(Unit("copy"))
    model[0].sparse, model[0].several = torch.eye(3).to_sparse(), [torch.eye(3).to_sparse(), torch.ones(2, device="meta")]
    kept = list(model[0].several)
    with observing(model):
        model(torch.ones(4, 3))
    assert all(now is then for now, then in zip(model[0].several, kept, strict=True))


@pytest.mark.parametrize("position", [0, 2])
def test_looking_at_a_weight_of_spectral_norm_moves_nothing(position):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    spectral_norm(model[position])
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with untouched(model, seed=0):
        model[position].weight  # noqa: B018 - computed when it is read
        assert not model[position].training
    assert model[position].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
