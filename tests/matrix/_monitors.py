"""All monitors and mixins with settings that fit the networks of the matrix."""

from __future__ import annotations

from dataclasses import replace

import torch

from grok_callbacks import Monitor
from grok_callbacks.forecast import ForecastModel
from grok_callbacks.mixins import (
    CommutativityMixin,
    InputNoiseMixin,
    MuonMixin,
    NormPenaltyMixin,
    SpectralEntropyMixin,
    WeightNoiseMixin,
)
from tests.callbacks._all_monitors import ALL_MONITORS
from tests.matrix._modules import NUM_CLASSES, NUM_FEATURES, TOKENS

#: Those that add to the loss or change the weights during a step.
MIXINS_OF_THE_LOSS = ("SpectralEntropyMixin", "NormPenaltyMixin", "WeightNoiseMixin", "CommutativityMixin")


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
    common = {
        "ComplexityMonitor": {"epsilon": 1.0},
        "LinearMappingNumberMonitor": {"num_samples": 8},
        # Every run has memorised at once, and none generalises, so that there is something to forecast.
        "GrokkingDetector": {
            "train_metric": "grok/accuracy/train", "validation_metric": "grok/accuracy/validation",
            "memorized_threshold": 0.0, "chance": 1.0, "target": 2.0, "patience": 1,
        },
        "GrokkingForecast": {"model": replace(ForecastModel.load("labels"), wait=0)},
    }  # fmt: skip
    if on_tokens:
        return {**common, "GroupLawMonitor": {"table": table(TOKENS)}}
    pairs = torch.combinations(torch.arange(NUM_CLASSES), with_replacement=True)
    return {
        **common,
        "CommutativityMonitor": {"swap": mirrored},
        "GroupLawMonitor": {"table": table(NUM_CLASSES), "train_pairs": pairs, "inputs": encoded},
    }


def all_monitors(on_tokens, **kwargs):
    """One of each class, by name, what concludes from the others last."""
    own = settings(on_tokens)
    made = [make.func(**own.get(name, {}), **kwargs) for name, make in ALL_MONITORS.items()]
    return sorted(made, key=lambda monitor: type(monitor).analyse is not Monitor.analyse)


def mixins(on_tokens):
    """One of each by class name, and the same with the setting that leaves training as it is, where there is one."""
    swap, on = (None, "embedding") if on_tokens else (mirrored, "input")
    return {
        "SpectralEntropyMixin": (SpectralEntropyMixin(0.1), SpectralEntropyMixin(0.0)),
        "NormPenaltyMixin": (NormPenaltyMixin(0.01), NormPenaltyMixin(0.0)),
        "WeightNoiseMixin": (WeightNoiseMixin(0.02), WeightNoiseMixin(0.0)),
        "InputNoiseMixin": (InputNoiseMixin(0.1, 0.1, on=on), InputNoiseMixin(0.0, 0.0, on=on)),
        "CommutativityMixin": (CommutativityMixin(1.0, swap), CommutativityMixin(0.0, swap)),
        "MuonMixin": (MuonMixin(), None),
    }


#: What a mixin logs.
LOGGED = {
    "SpectralEntropyMixin": "grok/penalty/spectral_entropy",
    "NormPenaltyMixin": "grok/penalty/norm",
    "InputNoiseMixin": "grok/input_noise/sigma",
    "CommutativityMixin": "grok/penalty/commutativity",
}

#: Cells that raise: the row, the column, and what the error says.
_BY_HAND = "can't be used with manual optimisation: set `automatic_optimization = True`"
REFUSED = {
    **{(row, column): _BY_HAND for row in ("manual optimisation", "two optimisers") for column in MIXINS_OF_THE_LOSS},
    ("FSDP2 on two processes", "MuonMixin"): "Muon orthogonalises whole matrices, and these are sharded (FSDP2): use DDP.",
    **{
        (row, "GradientCoherenceMonitor"): "Gradients can't be taken through a model that is sharded by FSDP2."
        for row in ("FSDP2 on two processes", "FSDP2, bf16-mixed, accumulated")
    },
}

#: The one key that is left out under FSDP2: it needs gradients, which FSDP2 keeps to itself.
LEFT_OUT = "grok/robustness/input_gradient"

#: Keys that take all of the training set.
OF_THE_UNSEEN = "grok/commutativity/unseen", "grok/commutativity/both_unseen"

#: Cells that work but for some keys, which are missing.
MISSING = {
    ("iterable data", "CommutativityMonitor"): set(OF_THE_UNSEEN),
    ("FSDP2 on two processes", "RobustnessMonitor"): {LEFT_OUT},
    ("FSDP2, bf16-mixed, accumulated", "RobustnessMonitor"): {LEFT_OUT},
}


def found_by(recorder):
    """All that each monitor has measured, by class name: values by key and step."""
    return {
        type(monitor).__name__: {
            (key, step): value for key in recorder.keys_of(monitor) for step, value in recorder.history[key].after(-1)
        }
        for monitor in recorder.monitors
    }


def keys(found):
    """Which keys there are in what a monitor has measured."""
    return {key for key, _ in found}
