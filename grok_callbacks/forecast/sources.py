"""Which of a run's series are its training and validation accuracy."""

from __future__ import annotations

from collections.abc import Container
from functools import cache
from typing import Literal

__all__ = ["accuracy_key", "logged_accuracy_names"]

_WORDS = {"train": ("train", "training"), "validation": ("val", "valid", "validation")}


@cache
def logged_accuracy_names(split: Literal["train", "validation"]) -> tuple[str, ...]:
    """Names under which Lightning modules commonly log an accuracy; epoch means before single batches.

    Example:
        >>> logged_accuracy_names("train")[:4]
        ('train_acc_epoch', 'train/acc_epoch', 'acc/train_epoch', 'train-acc_epoch')
    """
    names = [
        name
        for word in _WORDS[split]
        for measure in ("acc", "accuracy")
        for name in (f"{word}_{measure}", f"{word}/{measure}", f"{measure}/{word}", f"{word}-{measure}")
    ]
    return tuple(f"{name}{suffix}" for suffix in ("_epoch", "", "/dataloader_idx_0") for name in names)


def accuracy_key(split: Literal["train", "validation"], available: Container[str], prefix: str = "grok") -> str | None:
    """The accuracy that the module logged, otherwise the one measured on the probe, otherwise ``None``."""
    candidates = [*logged_accuracy_names(split), f"{prefix}/accuracy/{split}"]
    return next((name for name in candidates if name in available), None)
