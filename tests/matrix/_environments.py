"""The rows of the matrix: every kind of Trainer, training and network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader, TensorDataset

from grok_callbacks import Monitor, Probe, Recorder
from grok_callbacks.mixins import with_mixins
from grok_callbacks.selection import clean_name
from tests._common import Stream
from tests._common import trainer as quiet_trainer
from tests.matrix._modules import (
    Adapted,
    Checkpointed,
    Cnn,
    Frozen,
    Lstm,
    Mlp,
    TiedTokens,
    Transformer,
    features,
    tokens,
)

STEPS, BATCH = 4, 8


class Task(L.LightningModule):
    """Classification by a network, whose parts may be wrapped."""

    def __init__(self, make: Callable[[], nn.Module], wrap: Callable[[nn.Module], nn.Module] | None = None) -> None:
        super().__init__()
        self.model = make()
        if wrap is not None:
            self.model = wrap(self.model)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 0.02, weight_decay=0.1)


class Manual(Task):
    """Steps by hand, with one optimizer or two."""

    def __init__(self, make, optimizers=1):
        super().__init__(make)
        self.automatic_optimization = False
        self.count = optimizers

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers() if self.count > 1 else [self.optimizers()]
        loss = super().training_step(batch, batch_idx)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss

    def configure_optimizers(self):
        parameters = list(self.parameters())
        half = len(parameters) // 2
        groups = [parameters] if self.count == 1 else [parameters[:half], parameters[half:]]
        return [torch.optim.AdamW(group, 0.02) for group in groups]


def compiled(module):
    # Without a C compiler there is no other backend.
    return torch.compile(module, backend="aot_eager")


def checkpointed(module):
    module.net[0] = checkpoint_wrapper(module.net[0])
    return module


def half_precision():
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))]


def loader(data: Callable[..., Any] = features, count: int = 24, seed: int = 1, **settings: Any) -> DataLoader:
    return DataLoader(TensorDataset(*data(count, seed)), BATCH, **settings)


@dataclass(frozen=True)
class Environment:
    """One row.

    Args:
        net: The network as it is without any wrapping.
        make: The module; by default a plain one around the network.
        given: What becomes of it before the Trainer gets it.
        on_tokens: Whether inputs are pairs of tokens.
        trainer: Settings of the Trainer, made anew for each.
        train: The training data; by default they can be indexed.
        validation: The validation data.
        dtype: Precision of the weights.
    """

    net: Callable[[], nn.Module] = Mlp
    make: Callable[[Callable[[], nn.Module]], L.LightningModule] = Task
    given: Callable[[L.LightningModule], Any] = lambda module: module
    on_tokens: bool = False
    trainer: Callable[[], Mapping[str, Any]] = dict
    train: Callable[[], Any] | None = None
    validation: Callable[[], Any] | None = lambda: loader(count=8, seed=2)
    dtype: torch.dtype = torch.float32

    @property
    def data(self):
        return tokens if self.on_tokens else features

    def fit(self, callbacks=(), mixins=(), module=None, **settings):
        """Train; returns the module and its Trainer."""
        torch.compiler.reset()
        L.seed_everything(7, verbose=False)
        module = self.make(self.net) if module is None else module
        if mixins:
            module = with_mixins(module, *mixins)
        train = loader(self.data, shuffle=True) if self.train is None else self.train()
        validation = None if self.validation is None else loader(self.data, 8, 2) if self.on_tokens else self.validation()
        trainer = quiet_trainer(callbacks, **{"max_steps": STEPS, "num_sanity_val_steps": 1, **self.trainer(), **settings})
        trainer.fit(self.given(module), train, validation)
        return module, trainer

    def apart(self, weights: Sequence[Mapping[str, torch.Tensor]], monitors: Sequence[Monitor], probe: Probe) -> Recorder:
        """Look at the network in one piece, with nothing around it, in a loop of one's own.

        Args:
            weights: Those at step 0 and those at the last one.
            monitors: What to measure.
            probe: Its samples come at the last step only if the data can only be iterated.
        """
        twin = Task(self.net).to(self.dtype)
        recorder = Recorder(twin, monitors, probe)
        for step, state in zip((0, STEPS), weights, strict=True):
            twin.load_state_dict({clean_name(name): value for name, value in state.items()})
            if step == 0:
                recorder.bind(growing=[probe] if self.train is streamed else [])
            else:
                recorder.set_samples(probe, "train", recorder.samples(probe)["train"])
            recorder.record(step)
        return recorder


class Start(L.Callback):
    """Keeps the weights that training begins with."""

    def on_train_start(self, trainer, pl_module):
        self.weights = whole(pl_module)


def whole(module):
    """A copy of all weights, in one piece."""
    state = module.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value.clone() for name, value in state.items()}


def streamed():
    return DataLoader(Stream(TensorDataset(*features(24, 1))), BATCH)


ENVIRONMENTS: dict[str, Environment] = {
    "MLP, float32": Environment(),
    "bf16-mixed": Environment(trainer=lambda: {"precision": "bf16-mixed"}),
    "16-mixed, gradients scaled": Environment(trainer=lambda: {"plugins": half_precision()}),
    "bf16-true": Environment(trainer=lambda: {"precision": "bf16-true"}, dtype=torch.bfloat16),
    "64-true": Environment(trainer=lambda: {"precision": "64-true"}, dtype=torch.float64),
    "gradient accumulation": Environment(trainer=lambda: {"accumulate_grad_batches": 2}),
    "gradient clipping": Environment(trainer=lambda: {"gradient_clip_val": 0.1}),
    "torch.compile of a part": Environment(make=partial(Task, wrap=compiled)),
    "torch.compile of the module": Environment(given=compiled),
    "activation checkpointing, non-reentrant": Environment(
        net=Mlp, make=lambda _: Task(Checkpointed, checkpointed), trainer=lambda: {"accumulate_grad_batches": 2}
    ),
    "manual optimisation": Environment(make=Manual),
    "two optimisers": Environment(make=partial(Manual, optimizers=2)),
    "several validation loaders": Environment(validation=lambda: [loader(count=8, seed=2), loader(count=8, seed=3)]),
    "iterable data": Environment(train=streamed),
    "no validation": Environment(validation=None),
    "CNN with BatchNorm": Environment(Cnn),
    "transformer": Environment(Transformer, on_tokens=True),
    "LSTM": Environment(Lstm),
    "tied weights": Environment(TiedTokens, on_tokens=True),
    "frozen layers": Environment(Frozen),
    "low-rank adapters": Environment(Adapted),
}
