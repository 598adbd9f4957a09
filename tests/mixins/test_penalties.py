"""The penalties of weights against loops written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.mixins import NormPenaltyMixin, SpectralEntropyMixin, WeightNoiseMixin, with_mixins
from tests.mixins._nets import BY_NAMESPACE, NAMESPACES, Mlp, assert_close, different, fit, loader, vectors, weights


def entropy(matrix):
    """By autograd through the singular values, in float64."""
    probabilities = torch.linalg.svdvals(matrix.double().flatten(1))
    probabilities = probabilities / probabilities.sum()
    return -(probabilities * probabilities.log()).sum()


def mean_entropy(module):
    return 0.1 * torch.stack([entropy(p) for p in module.parameters() if p.ndim > 1]).mean()


def squared_norm(module):
    return 0.01 * sum(p.square().sum() for p in module.parameters())


def growing_norm(module):
    return -0.02 * sum(p.abs().sum() for name, p in module.named_parameters() if not name.endswith("bias"))


def cubic(module):
    return 0.01 * sum(p.abs().pow(3).sum() for p in module.net[0].parameters())


def largest(module):
    return 0.3 * max(p.abs().max() for p in module.parameters()) ** 2


PENALTIES = {
    "spectral": (SpectralEntropyMixin(0.1), mean_entropy),
    "squared": (NormPenaltyMixin(0.01), squared_norm),
    "negative l1": (NormPenaltyMixin(-0.02, ord=1, power=1, parameters=["*", "!*.bias"]), growing_norm),
    "cubic": (NormPenaltyMixin(0.01, ord=3, power=3, parameters="net.0.*"), cubic),
    "largest": (NormPenaltyMixin(0.3, ord=torch.inf), largest),
}


def by_hand(module, batches, penalty, *, accumulate=1, clip=None):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for index, (x, y) in enumerate(batches):
        ((F.cross_entropy(module(x), y) + penalty(module)) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize(("accumulate", "clip", "output"), [(1, None, "tensor"), (2, 0.1, "dict")])
def test_equals_a_loop_by_hand(namespace, name, accumulate, clip, output):
    mixin, penalty = PENALTIES[name]
    torch.manual_seed(0)
    module = BY_NAMESPACE[namespace][0](dropout=0.0, output=output)
    reference = copy.deepcopy(module)
    batches = loader(shuffle=False)
    by_hand(reference, batches, penalty, accumulate=accumulate, clip=clip)
    with_mixins(module, mixin)
    settings = {"namespace": namespace, "max_epochs": 1, "accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer = fit(module, batches, **settings)
    assert_close(weights(module), weights(reference), rtol=1e-4, atol=1e-6)
    assert f"grok/penalty/{mixin.kind}" in trainer.callback_metrics


@pytest.mark.parametrize("name", PENALTIES)
def test_logged_is_what_was_added(name):
    mixin, _ = PENALTIES[name]
    torch.manual_seed(0)
    plain, module = Mlp(dropout=0.0), Mlp(dropout=0.0)
    module.load_state_dict(plain.state_dict())
    with_mixins(module, mixin)
    settings = {"max_epochs": 1, "limit_train_batches": 1}
    first, second = fit(plain, loader(shuffle=False), **settings), fit(module, loader(shuffle=False), **settings)
    added = second.losses[0] - first.losses[0]
    assert second.callback_metrics[f"grok/penalty/{mixin.kind}"].item() == pytest.approx(added, rel=1e-3)
    # The user's own curve stays the loss without it.
    assert second.callback_metrics["train_loss"] == first.callback_metrics["train_loss"]


def test_norm_grows_under_a_negative_weight_and_entropy_falls_under_a_positive_one():
    torch.manual_seed(0)
    plain, norm, spectral = Mlp(), Mlp(), Mlp()
    for module in (norm, spectral):
        module.load_state_dict(plain.state_dict())
    fit(plain, max_epochs=10)
    fit(with_mixins(norm, NormPenaltyMixin(-0.1)), max_epochs=10)
    fit(with_mixins(spectral, SpectralEntropyMixin(3.0)), max_epochs=10)
    assert squared_norm(norm) > 1.2 * squared_norm(plain)
    assert mean_entropy(spectral) < 0.9 * mean_entropy(plain)


@pytest.mark.parametrize("name", PENALTIES)
def test_under_weight_noise_the_penalty_is_that_of_the_clean_weights(name):
    mixin, penalty = PENALTIES[name]
    torch.manual_seed(0)
    module = Mlp(dropout=0.0)
    gradients = []
    for mixins in ((WeightNoiseMixin(0.3),), (WeightNoiseMixin(0.3), mixin)):
        twin = with_mixins(copy.deepcopy(module), *mixins)
        twin.backward(twin.training_step(vectors(), 0))
        gradients.append([p.grad for p in twin.parameters()])
    expected = torch.autograd.grad(penalty(module), list(module.parameters()), allow_unused=True)
    for noisy, both, clean in zip(*gradients, expected, strict=True):
        added = torch.zeros_like(noisy) if clean is None else clean.float()
        torch.testing.assert_close(both - noisy, added, atol=2e-5, rtol=1e-3)


def test_frozen_parameters_are_left_out_until_they_thaw():
    module = Mlp(dropout=0.0)
    module.net[0].requires_grad_(False)
    for mixin in (SpectralEntropyMixin(1.0), NormPenaltyMixin(1.0)):
        before = mixin.penalty(module)
        module.net[0].requires_grad_(True)
        assert mixin.penalty(module) != before
        module.requires_grad_(False)
        assert mixin.penalty(module) == 0
        module.requires_grad_(True)
        module.net[0].requires_grad_(False)


def test_tied_weights_count_once_and_convolutions_are_flattened():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.conv = nn.Conv2d(2, 3, 2)

    net = Net()
    expected = (entropy(net.head.weight) + entropy(net.conv.weight)) / 2
    torch.testing.assert_close(SpectralEntropyMixin(1.0).penalty(net).double(), expected, rtol=1e-5, atol=1e-6)
    total = net.head.weight.square().sum() + net.conv.weight.square().sum() + net.conv.bias.square().sum()
    torch.testing.assert_close(NormPenaltyMixin(1.0).penalty(net), total)


@pytest.mark.parametrize("wrapped", [lambda net: torch.compile(net, backend="eager"), nn.utils.parametrizations.weight_norm])
def test_names_are_clean(wrapped):
    net = nn.Sequential(wrapped(nn.Linear(3, 3)))
    assert NormPenaltyMixin(1.0, parameters="0.*weight*").penalty(net) > 0
    with pytest.raises(ValueError, match=r"matches nothing.*0\."):
        NormPenaltyMixin(1.0, parameters="0._orig_mod.*").check(net)


def test_only_matrices_have_a_spectrum():
    with pytest.raises(MisconfigurationException, match=r"SpectralEntropyMixin: `parameters`: '\*\.bias' matches nothing"):
        fit(with_mixins(Mlp(), SpectralEntropyMixin(0.1, parameters="*.bias")))
    with pytest.raises(ValueError, match="nothing to choose from"):
        SpectralEntropyMixin(0.1).check(nn.LayerNorm(3))


@pytest.mark.parametrize("mixin", [SpectralEntropyMixin(0.1), NormPenaltyMixin(0.1), NormPenaltyMixin(0.1, ord=3.5, power=1)])
def test_zero_and_infinite_weights(mixin):
    module = with_mixins(Mlp(dropout=0.0), mixin)
    for parameter in module.net[4:].parameters():
        nn.init.zeros_(parameter)
    assert fit(module).losses[-1] < float("inf")
    assert all(tensor.isfinite().all() for tensor in weights(module).values())
    zero = with_mixins(Mlp(dropout=0.0), mixin)
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    zero.backward(zero.training_step(vectors(), 0))
    assert all(parameter.grad.isfinite().all() for parameter in zero.parameters())
    module.net[0].weight.data[0, 0] = torch.inf
    losses = fit(module).losses
    assert len(losses) == 8
    assert not any(loss < float("inf") for loss in losses)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"weight": float("nan")}, "weight"),
        ({"weight": "big"}, "weight"),
        ({"weight": 1.0, "ord": 0.5}, "ord"),
        ({"weight": 1.0, "ord": float("nan")}, "ord"),
        ({"weight": 1.0, "power": 0}, "power"),
    ],
)
def test_bad_norm_settings(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        NormPenaltyMixin(**arguments)


@pytest.mark.parametrize("beta", [float("nan"), float("inf"), None])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="`beta`"):
        SpectralEntropyMixin(beta)


def test_a_negative_beta_raises_the_entropy():
    torch.manual_seed(0)
    low, high = Mlp(), Mlp()
    high.load_state_dict(low.state_dict())
    fit(with_mixins(low, SpectralEntropyMixin(1.0)), max_epochs=5)
    fit(with_mixins(high, SpectralEntropyMixin(-1.0)), max_epochs=5)
    assert mean_entropy(high) > mean_entropy(low)
    assert different(weights(high), weights(low))
