"""Noise on inputs and embeddings, as strong as the training accuracy is low."""

from __future__ import annotations

import copy
import importlib
from collections import UserDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.mixins import InputNoiseMixin, mixins_of, with_mixins
from grok_callbacks.mixins._random import generator
from tests.mixins._nets import (
    BY_NAMESPACE,
    NAMESPACES,
    Mlp,
    Tokens,
    assert_close,
    fit,
    loader,
    token_loader,
    vectors,
    weights,
)


def normal(shape, count, rank=0, name="input_noise", seed=0):
    return torch.randn(shape, generator=generator(torch.device("cpu"), seed, name, count, rank))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_inputs_equal_a_loop_by_hand(namespace, accumulate):
    torch.manual_seed(0)
    module = BY_NAMESPACE[namespace][0](dropout=0.0)
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    accuracy, sigmas = 0.0, []
    for index, (x, y) in enumerate(loader(shuffle=False)):
        sigmas.append(max(0.5 * (1 - accuracy), 0.2))
        logits = reference(x + sigmas[-1] * normal(x.shape, index))
        accuracy = (logits.argmax(1) == y).float().mean().item()
        (F.cross_entropy(logits, y) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with_mixins(module, InputNoiseMixin(0.5, 0.2))
    trainer = fit(module, loader(shuffle=False), namespace=namespace, max_epochs=1, accumulate_grad_batches=accumulate)
    assert_close(weights(module), weights(reference))
    assert trainer.callback_metrics["grok/input_noise/sigma"].item() == pytest.approx(sigmas[-1])
    assert mixins_of(module)["input_noise"].state_dict(module) == {"draws": 4, "accuracy": accuracy}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_embeddings_equal_a_loop_by_hand(namespace):
    torch.manual_seed(0)
    module = BY_NAMESPACE[namespace][1]()
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    accuracy = 0.0
    for index, batch in enumerate(token_loader()):
        embedded = reference.embedding(batch["tokens"])
        embedded = embedded + max(0.5 * (1 - accuracy), 0.4) * normal(embedded.shape, index)
        logits = reference.head(torch.tanh(reference.hidden(embedded.flatten(1))))
        accuracy = (logits.argmax(1) == batch["labels"]).float().mean().item()
        optimizer.zero_grad()
        F.cross_entropy(logits, batch["labels"]).backward()
        optimizer.step()
    with_mixins(module, InputNoiseMixin(0.5, 0.4, on="embedding"))
    fit(module, token_loader(), namespace=namespace, max_epochs=1)
    assert_close(weights(module), weights(reference))
    # The hook is there during training steps alone.
    assert not module.embedding._forward_hooks
    assert torch.equal(module(torch.tensor([[1, 2]])), module(torch.tensor([[1, 2]])))


def test_constant_noise_asks_for_no_accuracy():
    class Regression(Mlp):
        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]).sum(1) - batch[1]).square().mean()

    x, y = vectors()
    module = with_mixins(Regression(), InputNoiseMixin(0.0, 0.3))
    trainer = fit(module, loader((x, y.float())))
    assert trainer.callback_metrics["grok/input_noise/sigma"].item() == pytest.approx(0.3)
    assert "grok/input_noise/accuracy" not in trainer.callback_metrics
    with pytest.raises(MisconfigurationException, match=r"InputNoiseMixin: no logits.*`accuracy`"):
        fit(with_mixins(Regression(), InputNoiseMixin(0.1, 0.3)), loader((x, y.float())))


class Parts(Mlp):
    """Calls its children, never itself; the last that fits the targets is the network's answer."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.measure = nn.CrossEntropyLoss()
        self.head = nn.Linear(3, 5)

    def training_step(self, batch, batch_idx):
        self.answer = self.head(self.net(batch[0]))
        return self.measure(self.answer, batch[1])


def test_the_accuracy_is_of_the_last_child_that_fits():
    module = with_mixins(Parts(), InputNoiseMixin(0.1, 0.1))
    x, y = vectors()
    module.training_step((x, y), 0)
    expected = (module.answer.argmax(1) == y).float().mean().item()
    assert mixins_of(module)["input_noise"].state_dict(module)["accuracy"] == pytest.approx(expected)


def test_one_hot_targets_and_outputs_with_logits():
    class Output(NamedTuple):
        logits: torch.Tensor

    class Wrapped(Mlp):
        def forward(self, x):
            return Output(self.net(x))

        def training_step(self, batch, batch_idx):
            self.answer = self(batch[0]).logits
            return F.mse_loss(self.answer, batch[1])

    module = with_mixins(Wrapped(dropout=0.0), InputNoiseMixin(0.1, 0.1))
    x, y = vectors()
    module.training_step((x, F.one_hot(y, 3).float()), 0)
    expected = (module.answer.argmax(1) == y).float().mean().item()
    assert mixins_of(module)["input_noise"].state_dict(module)["accuracy"] == pytest.approx(expected)


class LoggingAccuracy(Mlp):
    """Logs what the noise shall follow."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_acc", 0.25 * (self.current_epoch + 1), on_step=False, on_epoch=True)
        return loss


def sigmas(trainer_module, **settings):
    """The noise of every step."""
    pl = importlib.import_module(NAMESPACES[0])
    seen = []

    class Sigmas(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.callback_metrics["grok/input_noise/sigma"].item())

    trainer = fit(trainer_module, loader(shuffle=False), callbacks=[Sigmas()], **settings)
    return seen, trainer


def test_a_logged_accuracy(tmp_path):
    mixin = InputNoiseMixin(1.0, 0.3, accuracy="train_acc")
    seen, _ = sigmas(with_mixins(LoggingAccuracy(), mixin), max_epochs=4)
    assert seen == pytest.approx([1.0] * 4 + [0.75] * 4 + [0.5] * 4 + [0.3] * 4)
    first, trainer = sigmas(with_mixins(LoggingAccuracy(), mixin), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, _ = sigmas(with_mixins(LoggingAccuracy(), mixin), max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert first + second == pytest.approx(seen)


def test_an_accuracy_that_is_never_logged():
    with pytest.raises(MisconfigurationException, match=r"InputNoiseMixin: `accuracy`: 'acc' was not logged.*train_loss"):
        fit(with_mixins(Mlp(), InputNoiseMixin(0.1, 0.1, accuracy="acc")), max_epochs=3)


def test_an_accuracy_that_is_none():
    class Percent(Mlp):
        def training_step(self, batch, batch_idx):
            self.log("train_acc", 95.0)
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match="between 0 and 1"):
        fit(with_mixins(Percent(), InputNoiseMixin(0.1, 0.1, accuracy="train_acc")))


def batch_seen(batch, mixin):
    """What ``training_step`` gets for a batch."""

    class Receiving(Mlp):
        def training_step(self, batch, batch_idx):
            self.received = batch
            return self.net[0].weight.sum()

    module = with_mixins(Receiving(), mixin)
    module.training_step(batch, 0)
    return module.received


class Sample(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


def test_batches_keep_their_type_and_the_original_stays():
    x, y = vectors()
    noise = 0.1 * normal(x.shape, 0)
    mixin = InputNoiseMixin(0.0, 0.1)
    for batch in ((x, y), [x, y], Sample(x, y)):
        seen = batch_seen(batch, mixin)
        assert type(seen) is type(batch)
        torch.testing.assert_close(seen[0], x + noise)
        assert seen[1] is y
        assert batch[0] is x
    for batch in ({"image": x, "label": y}, UserDict({"image": x, "label": y}), {"x": x, "labels": y, "index": y}):
        seen = batch_seen(batch, mixin)
        assert type(seen) is type(batch)
        name = "x" if "x" in batch else "image"
        torch.testing.assert_close(seen[name], x + noise)
        assert batch[name] is x
        assert list(seen) == list(batch)
    torch.testing.assert_close(batch_seen(x, mixin), x + noise)
    torch.testing.assert_close(batch_seen((y, x, y), InputNoiseMixin(0.0, 0.1, key=1))[1], x + noise)
    torch.testing.assert_close(batch_seen((y, x), InputNoiseMixin(0.0, 0.1, key=-1))[1], x + noise)
    torch.testing.assert_close(batch_seen({"a": x, "b": x, "y": y}, InputNoiseMixin(0.0, 0.1, key="b"))["b"], x + noise)
    pair = batch_seen(((x, x), y), mixin)[0]
    torch.testing.assert_close(pair[0], x + noise)
    assert not torch.equal(pair[0], pair[1])
    half = batch_seen((x.bfloat16(), y), mixin)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), x + noise, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(3, 2, dtype=torch.long), torch.ones(3)), r'torch.int64.*`on="embedding"`'),
        ((torch.ones(3, 2, dtype=torch.uint8), torch.ones(3)), r'torch.uint8.*`on="embedding"`'),
        ({"tokens": torch.ones(3, 2, dtype=torch.long), "labels": torch.ones(3)}, r'torch.int64.*`on="embedding"`'),
        ({"a": torch.ones(3), "b": torch.ones(3), "y": torch.ones(3)}, r"\['a', 'b'\].*`key`"),
        (["text"], r'str.*`on="embedding"`'),
        ((), "can't tell the inputs.*`key`"),
        (3, "can't tell the inputs.*`key`"),
    ],
)
def test_what_can_not_be_jittered_is_an_error_that_names_the_setting(batch, message):
    with pytest.raises(MisconfigurationException, match=f"InputNoiseMixin: .*{message}"):
        batch_seen(batch, InputNoiseMixin(0.0, 0.1))


def test_a_wrong_key():
    x, y = vectors()
    for batch, key in (((x, y), 5), ((x, y), "x"), ({"x": x, "y": y}, "z")):
        with pytest.raises(MisconfigurationException, match="`key`"):
            batch_seen(batch, InputNoiseMixin(0.0, 0.1, key=key))


def test_choice_of_layers():
    class Positions(Tokens):
        def __init__(self):
            super().__init__()
            self.positions = nn.Embedding(2, 6)

        def forward(self, tokens):
            embedded = self.embedding(tokens) + self.positions(torch.arange(2))
            self.sum = embedded
            return self.head(self.hidden(embedded.flatten(1)))

    module = Positions()
    batch = next(iter(token_loader()))
    clean = module.embedding(batch["tokens"]) + module.positions(torch.arange(2))
    for layers, expected in ((None, 2), ("embedding", 1), (["*embedding*", "!positions"], 1), ("hidden", 0)):
        twin = with_mixins(copy.deepcopy(module), InputNoiseMixin(0.0, 1.0, on="embedding", layers=layers))
        twin.training_step(batch, 0)
        variance = (twin.sum - clean).var().item()
        assert (round(variance) == expected) if expected else variance == 0
    with pytest.raises(MisconfigurationException, match=r"`layers`: 'x' matches nothing.*positions"):
        fit(with_mixins(Positions(), InputNoiseMixin(0.0, 1.0, on="embedding", layers="x")), token_loader())
    with pytest.raises(MisconfigurationException, match=r"no nn.Embedding.*`layers`.*net\.0"):
        fit(with_mixins(Mlp(), InputNoiseMixin(0.0, 1.0, on="embedding")))


class CheckpointedTokens(Tokens):
    """Recomputes everything, embeddings too."""

    def forward(self, tokens):
        return checkpoint(super().forward, tokens, use_reentrant=False)


class Twice(CheckpointedTokens):
    """Calls its embedding twice."""

    def forward(self, tokens):
        return super().forward(tokens) + super().forward(tokens)


def test_recomputed_embeddings_get_the_noise_that_they_had():
    gradients = []
    batch = next(iter(token_loader()))
    for cls in (Tokens, CheckpointedTokens):
        torch.manual_seed(0)
        module = with_mixins(cls(), InputNoiseMixin(0.0, 1.0, on="embedding"))
        module.backward(module.training_step(batch, 0))
        gradients.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*gradients)
    module = with_mixins(Twice(), InputNoiseMixin(0.0, 1.0, on="embedding"))
    loss = module.training_step(batch, 0)
    with pytest.raises(RuntimeError, match="more than once"):
        module.backward(loss)
    assert not module.embedding._forward_hooks


def test_an_embedding_in_compiled_code_is_refused():
    module = Tokens()
    module.embedding = torch.compile(module.embedding, backend="eager")
    with pytest.raises(MisconfigurationException, match="'embedding', which is compiled"):
        fit(with_mixins(module, InputNoiseMixin(0.0, 0.1, on="embedding")), token_loader())


def test_ranks_and_seeds_differ():
    draws = [normal((4,), 0), normal((4,), 1), normal((4,), 0, rank=1), normal((4,), 0, seed=1), normal((4,), 0, name="x")]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"l1": -1, "l2": 0}, "l1"), ({"l1": 0, "l2": float("nan")}, "l2"), ({"l1": 0, "l2": 0, "on": "output"}, "on")],
)
def test_bad_settings(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        InputNoiseMixin(**arguments)


def test_a_step_that_fails_leaves_no_hook():
    class Failing(Tokens):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ValueError("failed on purpose")

    module = with_mixins(Failing(), InputNoiseMixin(0.1, 0.1, on="embedding"))
    with pytest.raises(ValueError, match=r"^failed on purpose"):
        module.training_step(next(iter(token_loader())), 0)
    assert not any(child._forward_hooks for child in module.modules())
