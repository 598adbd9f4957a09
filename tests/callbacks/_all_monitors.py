"""Every monitor there is, found by itself: what is added to the package is tested with the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import grok_callbacks.callbacks
from grok_callbacks import Monitor
from tests._common import NUM_CLASSES, NUM_FEATURES


def swap(inputs):
    """A mirror image of the features."""
    return inputs.flip(1)


def encode(pairs):
    """Pairs of group elements as features."""
    return torch.nn.functional.one_hot(pairs, NUM_CLASSES).flatten(1)[:, :NUM_FEATURES].float()


_ELEMENTS = torch.arange(NUM_CLASSES)

#: Settings of monitors that cannot do without, or not with the tests' small classifier, by class name.
SETTINGS = {
    "CommutativityMonitor": {"swap": swap},
    # Some of the classifiers add noise to what their last layer puts out.
    "FeatureLearningMonitor": {"layer": "net.[24]"},
    "RepresentationMonitor": {"layer": "net.[24]"},
    "GroupLawMonitor": {
        "table": (_ELEMENTS[:, None] + _ELEMENTS) % NUM_CLASSES,
        "train_pairs": torch.combinations(_ELEMENTS, with_replacement=True),
        "inputs": encode,
    },
}

ALL_MONITORS: dict[str, Callable[..., Monitor]] = {
    name: partial(value, **SETTINGS.get(name, {}))
    for name, value in vars(grok_callbacks.callbacks).items()
    if isinstance(value, type) and issubclass(value, Monitor) and value is not Monitor
}

#: Those that have something to say by themselves, in a short run; a forecast needs others, and a run that has memorised.
ALONE = {name: make for name, make in ALL_MONITORS.items() if name != "GrokkingForecast"}


def all_monitors(**kwargs) -> list[Monitor]:
    """One of each, in the order in which a preset would have them: the detector and its like last."""
    monitors = [make(**kwargs) for make in ALL_MONITORS.values()]
    return sorted(monitors, key=lambda monitor: type(monitor).analyse is not Monitor.analyse)
