"""All monitors and mixins with settings that fit the networks of the matrix."""

from __future__ import annotations

import torch

from grok_callbacks import Monitor
from tests.callbacks._all_monitors import ALL_MONITORS
from tests.matrix._modules import NUM_CLASSES, NUM_FEATURES, TOKENS


def mirrored(inputs):
    """A mirror image of the features."""
    return inputs.flip(1)


def encoded(pairs):
    """Pairs of group elements as features."""
    return torch.nn.functional.one_hot(pairs, NUM_CLASSES).flatten(1)[:, :NUM_FEATURES].float()


def table(order):
    elements = torch.arange(order)
    return (elements[:, None] + elements) % order


def settings(on_tokens):
    """By class name, what a monitor cannot do without, or is quick with."""
    cheap = {"ComplexityMonitor": {"epsilon": 1.0}, "LinearMappingNumberMonitor": {"num_samples": 8}}
    if on_tokens:
        return {**cheap, "GroupLawMonitor": {"table": table(TOKENS)}}
    pairs = torch.combinations(torch.arange(NUM_CLASSES), with_replacement=True)
    return {
        **cheap,
        "CommutativityMonitor": {"swap": mirrored},
        "GroupLawMonitor": {"table": table(NUM_CLASSES), "train_pairs": pairs, "inputs": encoded},
    }


def all_monitors(on_tokens, **kwargs):
    """One of each class, by name, what concludes from the others last."""
    own = settings(on_tokens)
    made = [make.func(**own.get(name, {}), **kwargs) for name, make in ALL_MONITORS.items()]
    return sorted(made, key=lambda monitor: type(monitor).analyse is not Monitor.analyse)
