"""Absolute weight entropy of a matrix that comes in pieces."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from grok_callbacks.functional.weight_entropy import weight_entropy

__all__ = ["WeightEntropy"]


class WeightEntropy(Metric):
    """Absolute entropy of all weights that it is given: :func:`~grok_callbacks.functional.weight_entropy`.

    It is a sum over entries, so over k updates it is the entropy of all their weights together.

    Under DDP: replicated. Every rank has the same weights, and nothing is summed over ranks; pass ``sync_on_compute=True``
    where ranks hold different pieces.

    Args:
        kwargs: Of :class:`torchmetrics.Metric`.

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
    distribution: ClassVar[str] = "replicated"

    entropy: Tensor

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("sync_on_compute", False)
        super().__init__(**kwargs)
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
