"""The ranks of a run, as monitors see them: alone or many, the same calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["PeerError", "Ranks"]

T = TypeVar("T")


class PeerError(RuntimeError):
    """A measurement was given up because it failed on another rank."""


class Ranks:
    """The process group of the run, or a single process.

    A failure on one rank must not leave the others waiting in a collective. So every collective here begins with an agreement:
    each rank says whether it is well. A rank on which something failed says so once, from its error handler, and all raise.

    Calling a sharded model is a collective too. A rank that is about to announces it, and those that wait for another
    collective meanwhile take part with a pass of their own, whose result nobody uses. So ranks may split such passes among
    them, and need not make as many.

    Args:
        device: Where the group's backend exchanges tensors.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.device = torch.device(device)
        #: A pass through the sharded model, so that other ranks can make theirs.
        self.take_part: Callable[[], object] | None = None

    def agree(self, well: bool = True, *, calling: bool = False) -> None:
        """Go on only if every rank is well.

        Args:
            well: Whether this rank is.
            calling: Whether what follows is a call of the sharded model.

        Raises:
            PeerError: On the ranks that are well, if another is not.
        """
        while self.world_size > 1:
            said = torch.tensor([not well, calling], dtype=torch.float32, device=self.device)
            dist.all_reduce(said)
            unwell, callers = said.tolist()
            if well and unwell:
                raise PeerError("The measurement failed on another rank.")
            if not callers or calling or self.take_part is None:
                return
            self.take_part()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on all of them."""
        self.agree()
        if self.world_size > 1:
            tensor = tensor.to(self.device, copy=True)
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's (small, picklable) value, in order of rank, on all of them."""
        if self.world_size == 1:
            return [value]
        self.agree()
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Rank 0's value on all ranks."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]  # type: ignore[no-any-return]
