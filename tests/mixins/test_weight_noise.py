"""Noisy weights against a loop written out by hand, and clean weights at every other moment."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grok_callbacks.mixins import WeightNoiseMixin, mixins_of, with_mixins
from grok_callbacks.mixins._random import generator
from tests.mixins._nets import (
    BY_NAMESPACE,
    NAMESPACES,
    Mlp,
    assert_close,
    assert_same,
    different,
    fit,
    loader,
    vectors,
    weights,
)

DELTA = 0.05


def noise_of(module, count, *, name="weight_noise", seed=0):
    """The noise of one draw, parameter by parameter."""
    source = generator(torch.device("cpu"), seed, name, count)
    return [torch.randn(parameter.shape, generator=source) for parameter in module.parameters()]


def by_hand(module, batches, *, accumulate=1, clip=None, epochs=1, lr=0.05):
    """Gradients at ``theta + delta * noise`` by finite ordinary means: a noisy copy of the module."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    count = 0
    for _ in range(epochs):
        for index, (x, y) in enumerate(batches):
            noisy = copy.deepcopy(module)
            with torch.no_grad():
                for parameter, noise in zip(noisy.parameters(), noise_of(module, count), strict=True):
                    parameter.add_(DELTA * noise)
            gradients = torch.autograd.grad(F.cross_entropy(noisy(x), y) / accumulate, list(noisy.parameters()))
            for buffer, new in zip(module.buffers(), noisy.buffers(), strict=True):
                buffer.copy_(new)
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            count += 1
            if (index + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.1), (2, 0.1)])
def test_equals_a_loop_by_hand(namespace, accumulate, clip):
    torch.manual_seed(0)
    module = BY_NAMESPACE[namespace][0](dropout=0.0)
    reference = copy.deepcopy(module)
    batches = loader(shuffle=False)
    by_hand(reference, batches, accumulate=accumulate, clip=clip, epochs=2)
    with_mixins(module, WeightNoiseMixin(DELTA))
    fit(module, batches, namespace=namespace, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    assert_close(weights(module), weights(reference), rtol=1e-5, atol=1e-6)


def test_noise_has_the_stated_law():
    module = with_mixins(Mlp(width=64, dropout=0.0), WeightNoiseMixin(DELTA))
    clean = [parameter.detach().clone() for parameter in module.parameters()]
    seen = []
    module.net[0].register_forward_hook(lambda *_: seen.append([p.detach().clone() for p in module.parameters()]))
    module.training_step(vectors(), 0)
    module.training_step(vectors(), 0)
    noise = torch.cat([((now - was) / DELTA).flatten() for now, was in zip(seen[0], clean, strict=True)])
    assert abs(noise.mean()) < 0.05
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert different(dict(enumerate(seen[0])), dict(enumerate(seen[1])))
    torch.testing.assert_close(seen[0], [p + DELTA * n for p, n in zip(clean, noise_of(module, 0), strict=True)])


def test_two_are_independent_and_add_up():
    module = with_mixins(Mlp(dropout=0.0), WeightNoiseMixin(DELTA), WeightNoiseMixin(2 * DELTA))
    clean = weights(module)
    expected = [
        p + DELTA * n + 2 * DELTA * m
        for p, n, m in zip(module.parameters(), noise_of(module, 0), noise_of(module, 0, name="weight_noise/1"), strict=True)
    ]
    seen = []
    module.net[0].register_forward_hook(lambda *_: seen.extend(p.detach().clone() for p in module.parameters()))
    loss = module.training_step(vectors(), 0)
    torch.testing.assert_close(seen, expected)
    module.backward(loss)
    assert_same(
        {name: weights(module)[name] for name in dict(module.named_parameters())},
        {k: clean[k] for k in clean if "running" not in k and "num" not in k},
    )


@pytest.mark.parametrize("settings", [{"seed": 1}, {"seed": 2}, {"parameters": "net.0.*"}, {"parameters": ["*", "!*.bias"]}])
def test_settings_choose_the_noise(settings):
    module = with_mixins(Mlp(dropout=0.0), WeightNoiseMixin(DELTA, **settings))
    clean = {name: p.detach().clone() for name, p in module.named_parameters()}
    noisy = {}
    module.net[0].register_forward_hook(lambda *_: noisy.update({n: p.detach().clone() for n, p in module.named_parameters()}))
    module.training_step(vectors(), 0)
    changed = {name for name in clean if not torch.equal(clean[name], noisy[name])}
    expected = {
        None: set(clean),
        "net.0.*": {"net.0.weight", "net.0.bias"},
        "*": {name for name in clean if not name.endswith("bias")},
    }
    patterns = settings.get("parameters")
    assert changed == expected[patterns[0] if isinstance(patterns, list) else patterns]


def test_frozen_weights_stay_clean_and_thawed_ones_join():
    module = with_mixins(Mlp(dropout=0.0), WeightNoiseMixin(DELTA))
    module.net[0].requires_grad_(False)
    seen = []
    module.net[0].register_forward_hook(lambda layer, *_: seen.append(layer.weight.detach().clone()))
    module.training_step(vectors(), 0)
    module.net[0].requires_grad_(True)
    module.training_step(vectors(), 0)
    assert torch.equal(seen[0], module.net[0].weight)
    assert not torch.equal(seen[1], module.net[0].weight)


class Watching(Mlp):
    """Notes whether its weights are the clean ones, hook by hook."""

    def look(self, where):
        self.__dict__.setdefault("seen", []).append((where, self.net[0].weight.detach().clone()))

    def on_train_batch_start(self, batch, batch_idx):
        self.look("start")

    def training_step(self, batch, batch_idx):
        self.look("step")
        return super().training_step(batch, batch_idx)

    def on_before_zero_grad(self, optimizer):
        self.look("zero grad")

    def on_before_backward(self, loss):
        self.look("before backward")

    def backward(self, loss):
        self.look("backward")
        super().backward(loss)

    def on_after_backward(self):
        self.look("after backward")

    def on_before_optimizer_step(self, optimizer):
        self.look("before step")

    def configure_gradient_clipping(self, *args, **kwargs):
        self.look("clipping")
        super().configure_gradient_clipping(*args, **kwargs)


def test_clean_at_every_moment_but_forward_and_backward():
    module = with_mixins(Watching(), WeightNoiseMixin(DELTA))
    clean = module.net[0].weight.detach().clone()
    fit(module, limit_train_batches=1, max_epochs=1, gradient_clip_val=0.5)
    noisy = {where for where, weight in module.seen if not torch.equal(weight, clean)}
    assert noisy == {"step", "backward"}
    assert len(module.seen) == 8
    (step,) = (weight for where, weight in module.seen if where == "step")
    (backward,) = (weight for where, weight in module.seen if where == "backward")
    assert torch.equal(step, backward)


class Failing(Mlp):
    """Raises where it is told to."""

    where = ""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.where == "step":
            raise KeyboardInterrupt
        if self.where == "graph":
            loss.register_hook(self.fail)
        return loss

    def fail(self, *_):
        raise RuntimeError("failed on purpose")

    def on_before_backward(self, loss):
        if self.where == "between":
            self.fail()

    def on_after_backward(self):
        if self.where == "after":
            self.fail()


@pytest.mark.parametrize("where", ["step", "graph", "between", "after"])
def test_clean_weights_come_back_whatever_fails(where):
    module = with_mixins(Failing(), WeightNoiseMixin(DELTA))
    clean = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.where = where
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        fit(module)
    assert_same({name: p.detach() for name, p in module.named_parameters()}, clean)
    module.where = ""
    assert fit(module).global_step == 8


def test_a_step_that_returns_none_leaves_clean_weights():
    module = with_mixins(Mlp(output="none", dropout=0.0), WeightNoiseMixin(DELTA))
    clean = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert module.training_step(vectors(), 1) is None
    assert_same({name: p.detach() for name, p in module.named_parameters()}, clean)


class Checkpointed(Mlp):
    """Recomputes its layers in the backward pass."""

    reentrant = False

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_at_the_noisy_weights(reentrant):
    gradients = []
    for cls in (Mlp, Checkpointed):
        torch.manual_seed(0)
        module = with_mixins(cls(), WeightNoiseMixin(DELTA))
        module.reentrant = reentrant
        x, y = vectors()
        torch.manual_seed(1)
        loss = module.training_step((x.requires_grad_(), y), 0)
        module.backward(loss)
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients)


class Recurrent(Mlp):
    """Keeps references to its weights, and ties two."""

    def __init__(self):
        super().__init__()
        self.net = nn.LSTM(4, 3, batch_first=True)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.net(x[:, None])[0][:, -1]))


def test_recurrent_and_tied_weights():
    torch.manual_seed(0)
    module = Recurrent()
    reference = copy.deepcopy(module)
    by_hand(reference, loader(shuffle=False))
    with_mixins(module, WeightNoiseMixin(DELTA))
    fit(module, loader(shuffle=False), max_epochs=1)
    assert_close(weights(module), weights(reference), rtol=1e-5, atol=1e-6)
    assert module.second.weight is module.first.weight


def test_backward_past_the_module_is_refused():
    module = with_mixins(Mlp(), WeightNoiseMixin(DELTA))
    loss = module.training_step(vectors(), 0)
    with pytest.raises(RuntimeError, match=r"module\.backward\(loss\)"):
        loss.backward()
    loss = module.training_step(vectors(), 0)
    module.backward(loss)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_second_order_optimizers_evaluate_several_times():
    class Lbfgs(Mlp):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    module = with_mixins(Lbfgs(dropout=0.0), WeightNoiseMixin(1e-3))
    fit(module)
    assert mixins_of(module)["weight_noise"].state_dict(module)["draws"] >= 16
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_weights_that_are_not_finite_do_not_crash():
    module = with_mixins(Mlp(), WeightNoiseMixin(DELTA))
    module.net[0].weight.data.fill_(torch.nan)
    assert fit(module).losses[0] != fit(module).losses[0]


@pytest.mark.parametrize("delta", [-0.1, float("nan"), float("inf"), "much", True])
def test_bad_delta(delta):
    with pytest.raises(ValueError, match="`delta`"):
        WeightNoiseMixin(delta)
