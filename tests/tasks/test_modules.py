"""The networks: shapes, initialisation, losses, and that they train in a Trainer."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from grok_callbacks.tasks import (
    DecoderTransformer,
    DigitsDataModule,
    EmbeddingMLP,
    MLPClassifier,
    OneHotMLP,
    PairTaskDataModule,
    digits_recipe,
    embedding_recipe,
    one_hot_recipe,
    transformer_recipe,
)

PAIR_MODULES = [OneHotMLP, EmbeddingMLP, DecoderTransformer]


def make_trainer(**settings):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=-1,
        **settings,
    )


@pytest.mark.parametrize(
    "data",
    [
        lambda: PairTaskDataModule("add", 7),
        lambda: PairTaskDataModule("div", 7, batch_size=8),
        lambda: PairTaskDataModule("permutation", 3, batch_size=8),
        lambda: PairTaskDataModule("xor", 3),
        lambda: PairTaskDataModule("random", 5),
    ],
    ids=["add", "div", "permutation", "xor", "random"],
)
@pytest.mark.parametrize("module_class", PAIR_MODULES)
def test_pairs_train(module_class, data):
    data = data()
    check_training(module_class(data.task.num_tokens, data.task.num_classes), data)


@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_digits_train(loss, one_hot):
    check_training(MLPClassifier(loss=loss), DigitsDataModule(train_size=64, one_hot=one_hot, batch_size=32))


@pytest.mark.parametrize(
    "recipe", [one_hot_recipe, embedding_recipe, transformer_recipe, digits_recipe], ids=lambda r: r.__name__
)
def test_recipes_train(recipe):
    recipe = recipe()
    assert recipe.max_steps > 0
    assert len(recipe.data.train_dataloader()) == 1
    check_training(recipe.module, recipe.data)


def check_training(module, data):
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer = make_trainer(max_steps=2, log_every_n_steps=1)
    trainer.fit(module, data)
    assert trainer.global_step == 2
    unchanged = [name for name, parameter in module.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged
    assert {"train_loss", "train_acc"} <= trainer.callback_metrics.keys()
    trainer.validate(module, data, verbose=False)
    (inputs, targets) = data.val_set.inputs, data.val_set.targets
    with torch.no_grad():
        logits = module(inputs)
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    torch.testing.assert_close(trainer.callback_metrics["val_acc"], (logits.argmax(1) == labels).float().mean())
    if module.loss == "mse":
        expected = ((logits - F.one_hot(labels, logits.shape[1])) ** 2).mean()
    else:
        expected = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module_class", PAIR_MODULES)
def test_init_scale_multiplies_the_initial_parameters(module_class):
    def parameters(scale):
        torch.manual_seed(0)
        return dict(module_class(7, 5, init_scale=scale).named_parameters())

    small, large = parameters(1.0), parameters(3.0)
    for name, parameter in small.items():
        assert torch.equal(large[name], parameter if "norm" in name else 3.0 * parameter), name


def test_init_scale_8_starts_at_the_published_norm():
    module = MLPClassifier(num_features=784, init_scale=8.0)
    norm = torch.cat([parameter.flatten() for parameter in module.parameters()]).norm().item()
    assert norm == pytest.approx(93.7, rel=0.01)


def test_operands_share_their_embedding():
    module = EmbeddingMLP(7, 5, embedding_dim=4)
    pairs = torch.tensor([[2, 6], [6, 2]])
    concatenated = torch.cat([module.embedding.weight[pairs[:, 0]], module.embedding.weight[pairs[:, 1]]], dim=1)
    torch.testing.assert_close(module(pairs), module.mlp(concatenated))


def test_one_hot_input():
    module = OneHotMLP(3, 5)
    vector = torch.tensor([[0.0, 0, 1, 1, 0, 0]])
    torch.testing.assert_close(module(torch.tensor([[2, 0]])), module.mlp(vector))
    assert module.double()(torch.tensor([[2, 0]])).dtype == torch.float64


def test_attention_against_a_loop():
    torch.manual_seed(0)
    module = DecoderTransformer(7, 5, d_model=8, num_heads=2)
    attention = module.blocks[0].attention
    stream = torch.randn(1, 3, 8)
    query, key, value = (layer(stream)[0] for layer in (attention.query, attention.key, attention.value))
    mixed = torch.zeros(3, 8)
    for head in (slice(0, 4), slice(4, 8)):
        for position in range(3):
            seen = slice(0, position + 1)
            scores = key[seen, head] @ query[position, head] / 4**0.5
            mixed[position, head] = scores.softmax(0) @ value[seen, head]
    torch.testing.assert_close(attention(stream)[0], attention.output(mixed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_causal_positions_do_not_see_ahead(causal):
    torch.manual_seed(0)
    block = DecoderTransformer(7, 5, d_model=8, num_heads=2, causal=causal).blocks[0]
    stream = torch.randn(1, 3, 8)
    changed = stream.clone()
    changed[0, 2, 0] += 1.0
    assert torch.allclose(block(stream)[0, :2], block(changed)[0, :2]) == causal


def test_transformer_tells_order_and_operands_apart():
    module = DecoderTransformer(7, 7, num_layers=2, layer_norm=False)
    logits = module(torch.tensor([[1, 2], [2, 1], [1, 3]]))
    assert logits.shape == (3, 7)
    assert not torch.allclose(logits[0], logits[1], atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-4)


@pytest.mark.parametrize("module_class", PAIR_MODULES)
def test_optimizer_settings(module_class):
    module = module_class(7, 7, lr=0.5, weight_decay=0.25, betas=(0.5, 0.75))
    optimizer = module.configure_optimizers()
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.5, 0.75))
    assert len(group["params"]) == len(list(module.parameters()))


@pytest.mark.parametrize("module_class", PAIR_MODULES)
def test_checkpoint_restores_the_network(module_class, tmp_path):
    module = module_class(7, 5, init_scale=2.0)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, PairTaskDataModule("random", 5))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = module_class.load_from_checkpoint(tmp_path / "last.ckpt")
    pairs = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(loaded(pairs), module(pairs))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: OneHotMLP(3, 3, loss="hinge"), "loss"),
        (lambda: OneHotMLP(3, 3, depth=0), "depth"),
        (lambda: EmbeddingMLP(3, 3, activation="step"), "activation"),
        (lambda: DecoderTransformer(3, 3, num_heads=3), "num_heads"),
        (lambda: DecoderTransformer(3, 3, num_heads=0), "num_heads"),
        (lambda: DecoderTransformer(3, 3, num_layers=0), "num_layers"),
    ],
)
def test_bad_arguments_are_named(call, argument):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        call()


def test_recipes_depend_on_their_seed_alone():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = one_hot_recipe(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    again, other = one_hot_recipe(seed=1), one_hot_recipe(seed=2)
    weights = [recipe.module.mlp[0].weight for recipe in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
