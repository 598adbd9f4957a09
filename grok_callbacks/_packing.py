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

# What is larger is packed anew each time, not kept in memory beside what it was made of.
_MOST_BYTES_KEPT = 4 * 2**20


def pack(value: Any) -> Tensor:
    """Tensors and plain Python, as one tensor of bytes."""
    file = io.BytesIO()
    with torch.inference_mode(False):
        torch.save(value, file)
        return torch.from_numpy(np.frombuffer(file.getbuffer(), dtype=np.uint8))


def unpack(packed: Any) -> Any:
    """What :func:`pack` was given. Nothing of it is executed.

    Raises:
        ValueError: If it holds anything but tensors and plain Python, or is no such tensor.
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise ValueError("It is no tensor of bytes.")
    try:
        # Whatever torch is set to elsewhere, there is no file to map into memory.
        return torch.load(io.BytesIO(packed.cpu().numpy().tobytes()), map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        raise ValueError(f"Its bytes can't be read: {type(error).__name__}: {error}") from error


class Packed:
    """The packed form of a value that changes now and then."""

    def __init__(self) -> None:
        self._version: Hashable = None
        self._packed: Tensor | None = None

    def of(self, version: Hashable, make: Callable[[], Any]) -> Tensor:
        """Packs what ``make`` returns, unless the version is the last one's. The caller may do with it as he likes."""
        if self._packed is not None and version == self._version:
            return self._packed.clone()
        packed = pack(make())
        is_small = packed.nbytes <= _MOST_BYTES_KEPT
        self._version, self._packed = version, packed.clone() if is_small else None
        return packed
