"""Modules and runs for the tests, importable by name so that they pickle."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NAMESPACES = ["lightning.pytorch", "pytorch_lightning"]


def _define(namespace, suffix):
    pl = importlib.import_module(namespace)

    class Mlp(pl.LightningModule):
        """Everything that a careless mixin would disturb: dropout, batch norm, a schedule, hyperparameters."""

        def __init__(self, width=8, dropout=0.2, output="tensor", lr=0.05, optimizer="sgd"):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(
                nn.Linear(4, width),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(width, width),
                nn.Linear(width, 3),
            )

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self(x), y)
            if self._trainer is not None:
                self.log("train_loss", loss)
            if self.hparams.output == "none" and batch_idx == 1:
                return None
            return {"loss": loss, "extra": 1} if self.hparams.output == "dict" else loss

        def configure_optimizers(self):
            if self.hparams.optimizer == "sgd":
                optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
            else:
                optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}]

    class Tokens(pl.LightningModule):
        """Operands as tokens, in dictionaries."""

        def __init__(self, symbols=7):
            super().__init__()
            self.embedding = nn.Embedding(symbols, 6)
            self.hidden = nn.Linear(12, 8)
            self.head = nn.Linear(8, symbols)

        def forward(self, tokens):
            return self.head(torch.tanh(self.hidden(self.embedding(tokens).flatten(1))))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["tokens"]), batch["labels"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Manual(Mlp):
        """Manual optimisation."""

        def __init__(self):
            super().__init__(dropout=0.0)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    for cls in (Mlp, Tokens, Manual):
        cls.__qualname__ = cls.__name__ = f"{cls.__name__}{suffix}"
        globals()[cls.__name__] = cls
    return Mlp, Tokens, Manual


BY_NAMESPACE = {NAMESPACES[0]: _define(NAMESPACES[0], ""), NAMESPACES[1]: _define(NAMESPACES[1], "Other")}
Mlp, Tokens, Manual = BY_NAMESPACE[NAMESPACES[0]]


def _define_losses(namespace):
    pl = importlib.import_module(namespace)

    class Losses(pl.Callback):
        """The loss of every batch."""

        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            loss = outputs["loss"] if isinstance(outputs, dict) and outputs else outputs
            self.seen.append(loss.item() if isinstance(loss, torch.Tensor) else None)

    Losses.__qualname__ = Losses.__name__ = "Losses" + namespace[:3]
    globals()[Losses.__name__] = Losses
    return Losses


LOSSES = {namespace: _define_losses(namespace) for namespace in NAMESPACES}


def vectors(n=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def loader(data=None, batch_size=8, shuffle=True):
    return DataLoader(TensorDataset(*(data or vectors())), batch_size=batch_size, shuffle=shuffle)


class _Pairs(torch.utils.data.Dataset):
    def __init__(self, n):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(7, (n, 2), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"tokens": self.tokens[index], "labels": self.tokens[index].sum() % 7}


def token_loader(n=32, batch_size=8, shuffle=False):
    return DataLoader(_Pairs(n), batch_size=batch_size, shuffle=shuffle)


def fit(module, batches=None, *, namespace=NAMESPACES[0], ckpt_path=None, **settings):
    """Train on the CPU, quietly, and return the trainer, with the loss of every batch in ``trainer.losses``."""
    pl = importlib.import_module(namespace)
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    losses = LOSSES[namespace]()
    callbacks = [losses, *settings.pop("callbacks", [])]
    trainer = pl.Trainer(**{**defaults, **settings}, callbacks=callbacks)
    trainer.fit(module, batches if batches is not None else loader(), ckpt_path=ckpt_path)
    trainer.losses = losses.seen
    return trainer


def weights(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(first, second):
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_close(first, second, **tolerance):
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], **tolerance)


def different(first, second):
    return any(not torch.equal(tensor, second[name]) for name, tensor in first.items())
