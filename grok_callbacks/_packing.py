"""Parts of a state as tensors of bytes, made anew only when they have changed.

A checkpoint takes as long for a tensor as for tens of thousands of bytes, and some runs save one at every step.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Packed", "pack", "unpack"]


def pack(value: Any) -> Tensor:
    """Tensors and plain Python, as one tensor of bytes."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.from_numpy(np.frombuffer(file.getvalue(), dtype=np.uint8).copy())


def unpack(packed: Any) -> Any:
    """What :func:`pack` was given. Nothing of it is executed.

    Raises:
        ValueError: If it holds anything but tensors and plain Python, or is no such tensor.
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise ValueError("It is no tensor of bytes.")
    try:
        return torch.load(io.BytesIO(packed.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"Its bytes can't be read: {type(error).__name__}: {error}") from error


class Packed:
    """The packed form of a value that changes now and then."""

    def __init__(self) -> None:
        self._version: Hashable | None = None
        self._packed: Tensor | None = None

    def of(self, version: Hashable | None, make: Callable[[], Any]) -> Tensor:
        """Packs what ``make`` returns, unless the version is the last one's; without a version it is always packed anew."""
        if self._packed is None or version is None or version != self._version:
            self._version, self._packed = version, pack(make())
        return self._packed
