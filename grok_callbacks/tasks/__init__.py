"""Small data sets and networks that grok, for the demo, the examples, the benchmarks and the tests."""

from grok_callbacks.tasks.data import (
    TASKS,
    Group,
    Task,
    bitwise_xor,
    group_table,
    load_digits,
    make_task,
    modular_arithmetic,
    permutation_group,
    random_labels,
)
from grok_callbacks.tasks.datamodules import ArrayDataset, DigitsDataModule, MNISTDataModule, PairTaskDataModule
from grok_callbacks.tasks.idx import load_mnist, read_idx
from grok_callbacks.tasks.modules import Classifier, DecoderTransformer, EmbeddingMLP, MLPClassifier, OneHotMLP
from grok_callbacks.tasks.recipes import Recipe, digits_recipe, embedding_recipe, one_hot_recipe, transformer_recipe

__all__ = [
    "TASKS",
    "ArrayDataset",
    "Classifier",
    "DecoderTransformer",
    "DigitsDataModule",
    "EmbeddingMLP",
    "Group",
    "MLPClassifier",
    "MNISTDataModule",
    "OneHotMLP",
    "PairTaskDataModule",
    "Recipe",
    "Task",
    "bitwise_xor",
    "digits_recipe",
    "embedding_recipe",
    "group_table",
    "load_digits",
    "load_mnist",
    "make_task",
    "modular_arithmetic",
    "one_hot_recipe",
    "permutation_group",
    "random_labels",
    "read_idx",
    "transformer_recipe",
]
