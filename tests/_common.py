"""Tiny modules, data and Trainers that the tests of the core share."""

from __future__ import annotations

import contextlib
import io
import itertools
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from grok_callbacks import Monitor

NUM_FEATURES, NUM_CLASSES = 6, 3


class Classifier(L.LightningModule):
    """A small network with dropout and BatchNorm that logs nothing unless told to."""

    def __init__(self, *, logs: bool = False, lr: float = 0.05) -> None:
        super().__init__()
        self.logs = logs
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(NUM_FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, NUM_CLASSES)
        )
        self.losses: list[float] = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        self.losses.append(loss.item())
        if self.logs:
            self.log("train_acc", (logits.argmax(-1) == y).float().mean(), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        if self.logs:
            self.log("val_acc", (self(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.1)


class Plain(Classifier):
    """No randomness in the forward pass: what Lightning itself resumes exactly."""

    def __init__(self, *, logs: bool = False, lr: float = 0.05) -> None:
        super().__init__(logs=logs, lr=lr)
        self.net = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))


class Stream(IterableDataset):
    """A map-style dataset's samples, in their order, that can only be iterated."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self):
        return (self.data[index] for index in range(len(self.data)))


class Counting(Monitor):
    """Logs how often it has measured; needs no data."""

    def __init__(self, name: str = "count", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = name
        self.steps: list[int] = []

    def measure(self, snapshot):
        self.steps.append(snapshot.step)
        return {self.name: float(len(self.steps))}

    def own_state(self):
        return {"steps": list(self.steps)}

    def load_own_state(self, state):
        self.steps = list(state["steps"])


class Logits(Monitor):
    """Looks at the probe."""

    def bind(self, view):
        view.require_samples("train")

    def measure(self, snapshot):
        return {"logits/mean": snapshot.logits().double().mean(), "logits/size": float(len(snapshot.logits()))}


def samples(count: int = 32, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, NUM_FEATURES, generator=generator)
    return TensorDataset(x, x[:, :NUM_CLASSES].argmax(-1))


def loader(count: int = 32, *, seed: int = 0, batch_size: int = 8, shuffle: bool = False, **kwargs: Any) -> DataLoader:
    return DataLoader(samples(count, seed), batch_size, shuffle=shuffle, **kwargs)


def trainer(callbacks: Any = (), namespace: Any = L, **kwargs: Any) -> Any:
    """A quiet Trainer on one CPU that keeps no checkpoints unless told to."""
    settings = {
        "accelerator": "cpu", "devices": 1, "max_steps": 8, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 10_000,
    }  # fmt: skip
    settings |= kwargs
    return namespace.Trainer(callbacks=list(callbacks), **{key: value for key, value in settings.items() if value is not ...})


def fit(
    callbacks: Any = (), module: Any = None, train: Any = None, validation: Any = None, ckpt_path: Any = None, **kwargs: Any
):
    """Fit a module; returns it with its Trainer."""
    module = Plain() if module is None else module
    made = trainer(callbacks, **kwargs)
    with contextlib.redirect_stdout(io.StringIO()):
        made.fit(module, loader() if train is None else train, validation, ckpt_path=ckpt_path)
    return module, made


def events(folder: Any) -> dict[str, list[tuple[int, float]]]:
    """All scalars of the event files in a folder."""
    accumulator = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    accumulator.Reload()
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()[SCALARS]}


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = itertools.zip_longest(first.state_dict().items(), second.state_dict().items())
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
