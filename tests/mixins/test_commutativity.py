"""The penalty on answers that change under a mirroring."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.mixins import CommutativityMixin, InputNoiseMixin, WeightNoiseMixin, with_mixins
from grok_callbacks.mixins.commutativity import swap_operands
from tests.mixins._nets import (
    BY_NAMESPACE,
    NAMESPACES,
    Mlp,
    Tokens,
    assert_close,
    assert_same,
    fit,
    loader,
    token_loader,
    vectors,
    weights,
)


def flip(inputs):
    return inputs.flip(1)


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def test_swaps_the_first_two_positions():
    tokens = torch.arange(12).reshape(3, 4)
    assert torch.equal(swap_operands(tokens), tokens[:, [1, 0, 2, 3]])
    vectors = torch.randn(3, 4, 5)
    assert torch.equal(swap_operands(vectors), vectors[:, [1, 0, 2, 3]])
    pairs = torch.randn(3, 2)
    assert torch.equal(swap_operands(pairs), pairs.flip(1))
    assert torch.equal(swap_operands(swap_operands(tokens)), tokens)
    assert swap_operands(("a", "b", "c")) == ("b", "a", "c")
    assert swap_operands(["a", "b"]) == ["b", "a"]
    with pytest.raises(ValueError, match="`swap`"):
        swap_operands(torch.randn(3, 8))  # One-hot operands side by side, perhaps.
    for bad in (torch.arange(3), torch.zeros(3, 1, dtype=torch.long), torch.zeros(2, 3, 4, 4), {"a": 1}, ("a",), None):
        with pytest.raises(ValueError, match="`swap`"):
            swap_operands(bad)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_a_loop_by_hand(namespace, accumulate):
    torch.manual_seed(0)
    module = BY_NAMESPACE[namespace][1]()
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for index, batch in enumerate(token_loader()):
        logits, mirrored = reference(batch["tokens"]), reference(batch["tokens"].flip(1))
        loss = F.cross_entropy(logits, batch["labels"]) + 5 * (logits - mirrored).square().mean()
        (loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    with_mixins(module, CommutativityMixin(weight=5.0))
    trainer = fit(module, token_loader(), namespace=namespace, max_epochs=1, accumulate_grad_batches=accumulate)
    assert_close(weights(module), weights(reference))
    assert trainer.callback_metrics["grok/penalty/commutativity"] > 0


def test_makes_a_network_commutative():
    torch.manual_seed(0)
    plain, module = Tokens(), Tokens()
    module.load_state_dict(plain.state_dict())
    fit(plain, token_loader(), max_epochs=20)
    fit(with_mixins(module, CommutativityMixin(weight=5.0)), token_loader(), max_epochs=20)
    tokens = torch.cartesian_prod(torch.arange(7), torch.arange(7))

    def distance(net):
        return (net(tokens) - net(tokens.flip(1))).square().mean()

    assert distance(module) < 0.1 * distance(plain)


def test_dropout_is_no_asymmetry_and_statistics_are_not_touched():
    torch.manual_seed(0)
    module = with_mixins(Mlp(dropout=0.5), CommutativityMixin(1.0, swap=lambda x: x))
    plain = Mlp(dropout=0.5)
    plain.load_state_dict(module.state_dict())
    states = []
    for each in (plain, module):
        torch.manual_seed(1)
        loss = each.training_step(vectors(), 0)
        states.append((loss.item(), torch.get_rng_state(), dict(each.named_buffers())))
    # With a mirroring that does nothing the penalty is exactly zero: the same masks in both passes.
    assert states[0][0] == states[1][0]
    assert torch.equal(states[0][1], states[1][1])
    assert_same(states[0][2], states[1][2])
    owners = [buffer for buffer in module.net[1]._buffers.values() if buffer is not None]
    loss.backward()  # The buffers that autograd saved are the originals, unharmed.
    assert [id(buffer) for buffer in module.buffers()] == [id(buffer) for buffer in owners]


def test_sees_the_clean_batch_and_the_noisy_weights():
    torch.manual_seed(0)
    module = Mlp(dropout=0.0)
    x, y = vectors()
    inputs = []
    weights_seen = []
    twin = with_mixins(
        copy.deepcopy(module), CommutativityMixin(1.0, swap=flip), InputNoiseMixin(0.1, 0.1), WeightNoiseMixin(0.1)
    )

    def look(layer, arguments, _):
        inputs.append(arguments[0])
        weights_seen.append(layer.weight.detach().clone())

    twin.net[0].register_forward_hook(look)
    twin.training_step((x, y), 0)
    assert not torch.equal(inputs[0], x)
    assert torch.equal(inputs[1], x)
    assert torch.equal(inputs[2], x.flip(1))
    assert torch.equal(weights_seen[0], weights_seen[2])
    assert not torch.equal(weights_seen[0], module.net[0].weight)


class PerPosition(Tokens):
    """Logits at every position, of which the last alone is asked."""

    def forward(self, tokens):
        return self.head(torch.nn.functional.pad(torch.cumsum(self.embedding(tokens), 1), (0, 2)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


def test_ignored_positions_do_not_count():
    module = PerPosition()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    labels = torch.tensor([[-100, 3, 1], [-100, -100, 4]])
    batch = {"tokens": tokens, "labels": labels}
    logits, mirrored = module(tokens), module(tokens[:, [1, 0, 2]])
    expected = (logits - mirrored)[labels != -100].square().mean()
    plain = module.training_step(batch, 0)
    torch.testing.assert_close(with_mixins(module, CommutativityMixin(1.0)).training_step(batch, 0), plain + expected)


class Triple(Mlp):
    """A batch that no rule understands, and no ``forward``."""

    def forward(self, x):
        raise NotImplementedError

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[1]), batch[2])


def test_unpack_and_forward_of_the_user():
    x, y = vectors()
    batch = (torch.zeros(len(x)), x, y)
    module = with_mixins(Triple(dropout=0.0), CommutativityMixin(1.0, swap=flip))
    with pytest.raises(MisconfigurationException, match=r"CommutativityMixin: .*Set `unpack`: a function"):
        module.training_step(batch, 0)
    mixin = CommutativityMixin(1.0, swap=flip, unpack=lambda batch: batch[1:], forward=lambda module, x: module.net(x))
    module = Triple(dropout=0.0)
    expected = module.training_step(batch, 0) + (module.net(x) - module.net(x.flip(1))).square().mean()
    torch.testing.assert_close(with_mixins(module, mixin).training_step(batch, 0), expected)


def test_what_can_not_be_swapped_is_an_error_that_names_the_setting():
    with pytest.raises(MisconfigurationException, match=r"CommutativityMixin: .*set `swap`"):
        fit(with_mixins(Mlp(), CommutativityMixin()))
    for weight in (float("nan"), "much"):
        with pytest.raises(ValueError, match="`weight`"):
            CommutativityMixin(weight)


def test_random_states_are_as_without():
    torch.manual_seed(0)
    fit(Mlp(), loader())
    expected = torch.rand(3)
    torch.manual_seed(0)
    fit(with_mixins(Mlp(), CommutativityMixin(1.0, swap=flip)), loader())
    assert torch.equal(torch.rand(3), expected)
