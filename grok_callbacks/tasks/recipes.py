"""Settings that are known to grok: data, network and number of steps, with what was seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from grok_callbacks.tasks.datamodules import DigitsDataModule, PairTaskDataModule
from grok_callbacks.tasks.modules import Classifier, DecoderTransformer, EmbeddingMLP, MLPClassifier, OneHotMLP


class Recipe(NamedTuple):
    """A run to be: ``Trainer(max_epochs=-1, max_steps=recipe.max_steps).fit(recipe.module, recipe.data)``.

    Data come in full batches, so that an epoch is a step. Initial weights are drawn from the recipe's seed, whatever
    the state of the global generator, which stays as it was.
    """

    module: Classifier
    data: PairTaskDataModule | DigitsDataModule
    max_steps: int


def one_hot_recipe(task: str = "add", size: int = 31, weight_decay: float = 1.0, seed: int = 0) -> Recipe:
    """The quickest to grok: ReLU network on one-hot pairs, 70% of them for training.

    Addition modulo 31, seeds 0 to 2, looked at every 25 steps: memorised at step 25 (validation accuracy 0), onset at
    100 to 125, generalised at 300; about 1.2 CPU-seconds of a bare loop. Without weight decay, or with random labels,
    validation accuracy never rises above chance (at most 3% and 5%). Of the other tasks, seed 0: ``"sub"``, ``"mul"``
    and ``"div"`` modulo 31 generalise at 225 to 300; ``"x2y2"`` modulo 31 and 5-bit ``"xor"`` at 75, hardly later than
    they memorise; ``"x2xyy2"`` modulo 31 never; ``"permutation"`` of degree 4 is at 80% after 1,000 steps and at 87%
    after 2,000.

    Args:
        task: Name of the task, see :func:`~grok_callbacks.tasks.data.make_task`.
        size: Modulus, degree of the permutations, number of bits, or number of tokens.
        weight_decay: Weight decay.
        seed: Seed of the split, the labels if random, and the initial weights.
    """
    data = PairTaskDataModule(task, size, train_fraction=0.7, seed=seed)
    with _seeded(seed):
        module = OneHotMLP(data.task.num_tokens, data.task.num_classes, lr=0.03, weight_decay=weight_decay)
    return Recipe(module, data, max_steps=1000)


def embedding_recipe(task: str = "add", size: int = 59, weight_decay: float = 1.0, seed: int = 0) -> Recipe:
    """ReLU network on the embeddings of a pair, 50% of all pairs for training.

    Addition modulo 59, seeds 0 to 2, looked at every 25 steps: memorised at step 50 (validation accuracy 0), onset at
    275 to 350, generalised at 425 to 575; 4 to 8 CPU-seconds of a bare loop.

    Args:
        task: Name of the task, see :func:`~grok_callbacks.tasks.data.make_task`.
        size: Modulus, degree of the permutations, number of bits, or number of tokens.
        weight_decay: Weight decay.
        seed: Seed of the split, the labels if random, and the initial weights.
    """
    data = PairTaskDataModule(task, size, train_fraction=0.5, seed=seed)
    with _seeded(seed):
        module = EmbeddingMLP(data.task.num_tokens, data.task.num_classes, lr=0.01, weight_decay=weight_decay)
    return Recipe(module, data, max_steps=1500)


def transformer_recipe(task: str = "add", size: int = 31, weight_decay: float = 1.0, seed: int = 0) -> Recipe:
    """One-layer decoder transformer with LayerNorm, 40% of all pairs for training.

    Addition modulo 31, seeds 0 to 2, looked at every 25 steps: memorised at step 50 (validation accuracy 8 to 14%),
    onset at 200 to 275, generalised at 825 to 975; about 17 CPU-seconds of a bare loop. Generalisation comes gradually,
    and both accuracies collapse and recover now and then, after it too: a run can end in such a moment. Without weight
    decay validation accuracy crept to 20% by step 3,000.

    Args:
        task: Name of the task, see :func:`~grok_callbacks.tasks.data.make_task`.
        size: Modulus, degree of the permutations, number of bits, or number of tokens.
        weight_decay: Weight decay.
        seed: Seed of the split, the labels if random, and the initial weights.
    """
    data = PairTaskDataModule(task, size, train_fraction=0.4, seed=seed)
    with _seeded(seed):
        module = DecoderTransformer(data.task.num_tokens, data.task.num_classes, lr=5e-3, weight_decay=weight_decay)
    return Recipe(module, data, max_steps=2000)


def digits_recipe(weight_decay: float = 0.3, seed: int = 0) -> Recipe:
    """Real images: 300 digits, mean squared error, all initial weights eight times too large.

    Seeds 0 to 2, looked at every 25 steps: memorised at step 500 to 575 (validation accuracy 20 to 26%), 50% at 1,550 to
    1,650, 90% at 2,950 to 3,125, 95 to 96% at the end; about 12 CPU-seconds of a bare loop. Without weight decay
    validation accuracy stays at 12%. Validation accuracy climbs steadily after memorisation instead of resting on a
    plateau. With 1,000 training images it is 57% when they are memorised (step 800) and 90% at 1,700; with cross-entropy
    and 300 images it is 85% at memorisation, which leaves next to nothing to grok.

    Args:
        weight_decay: Weight decay.
        seed: Seed of the split and the initial weights.

    Raises:
        ModuleNotFoundError: If scikit-learn isn't installed.
    """
    data = DigitsDataModule(train_size=300, seed=seed)
    with _seeded(seed):
        module = MLPClassifier(init_scale=8.0, lr=1e-3, weight_decay=weight_decay, loss="mse")
    return Recipe(module, data, max_steps=5000)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
