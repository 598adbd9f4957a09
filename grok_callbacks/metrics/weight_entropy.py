"""Absolute weight entropy of a matrix that comes in pieces."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from grok_callbacks.functional.weight_entropy import weight_entropy

__all__ = ["WeightEntropy"]


class WeightEntropy(Metric):
    """Absolute entropy of all weights that it is given: :func:`~grok_callbacks.functional.weight_entropy`.

    It is a sum over entries, so over k updates it is the entropy of all their weights together.

    Under DDP every rank has the same weights, and nothing is summed over ranks (``distribution="replicated"``). Where ranks
    hold different pieces, as the shards of FSDP, choose ``distribution="sharded"``: the entropy is then that of all pieces.

    Args:
        distribution: Whether ranks hold the same weights or different ones.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``distribution`` is unknown.

    Example:
        >>> import torch
        >>> metric = WeightEntropy()
        >>> metric.update(torch.tensor([[0.5, -0.5]]))
        >>> metric.update(torch.tensor([[1.0, 0.0]]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: Literal["replicated", "sharded"] = "replicated"

    entropy: Tensor

    def __init__(self, distribution: Literal["replicated", "sharded"] = "replicated", **kwargs: Any) -> None:
        if distribution not in ("replicated", "sharded"):
            raise ValueError(f"`distribution` must be 'replicated' or 'sharded', got {distribution!r}.")
        kwargs.setdefault("sync_on_compute", distribution == "sharded")
        super().__init__(**kwargs)
        self.distribution = distribution
        self.add_state("entropy", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, weight: Tensor) -> None:
        """Add a weight, or rows of one.

        Args:
            weight: Of any shape and real dtype.
        """
        self.entropy = self.entropy + weight_entropy(weight)

    def compute(self) -> Tensor:
        """Entropy in nats, float64."""
        return self.entropy

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several, see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
