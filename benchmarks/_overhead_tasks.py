"""The runs that overhead is measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from grok_callbacks.tasks.datamodules import DigitsDataModule
from grok_callbacks.tasks.modules import Classifier, MLPClassifier
from grok_callbacks.tasks.recipes import transformer_recipe


class ConvNet(Classifier):
    """Two convolutions with batch normalisation, on 8x8 digits."""

    def __init__(self, width: int = 16, **settings: Any) -> None:
        super().__init__(**settings)
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(8 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, 10)`` of images ``(n, 1, 8, 8)``."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits


class Task(NamedTuple):
    """A run: what it is, how it is made, its length."""

    words: str
    make: Callable[[], tuple[Classifier, LightningDataModule]]
    steps: int
    validate_every: int


def _digits() -> tuple[Classifier, LightningDataModule]:
    data = DigitsDataModule(300)
    data.steps_per_epoch = 100
    return MLPClassifier(), data


def _transformer() -> tuple[Classifier, LightningDataModule]:
    module, data, _ = transformer_recipe()
    data.steps_per_epoch = 100
    return module, data


def _convolutions() -> tuple[Classifier, LightningDataModule]:
    return ConvNet(weight_decay=0.1), DigitsDataModule(1000, one_hot=False, batch_size=200)


TASKS = {
    "MLP": Task("64-200-200-10 on 300 digits in full batches, as in examples/digits.py", _digits, 100_000, 50),
    "transformer": Task(
        "one layer of width 64, 4 heads, 128 hidden units, on addition modulo 31, 40% of the pairs in full batches, the "
        "package's recipe, which generalises at 825 to 975",
        _transformer, 40_000, 50,
    ),
    "CNN": Task(
        "16 and 32 channels with batch normalisation on 1,000 digits in batches of 200, 10,000 epochs",
        _convolutions, 50_000, 50,
    ),
}  # fmt: skip
