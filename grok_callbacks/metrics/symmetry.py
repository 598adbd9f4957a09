"""Whether predictions obey a symmetry of the task, over many batches or ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from grok_callbacks.functional.symmetry import agreements


class Commutativity(Metric):
    """Share of predictions that a mirroring leaves alone: :func:`~grok_callbacks.functional.commutativity`.

    Over k updates or ranks it is the share of all their samples together.

    Under DDP: sharded. Each rank gives it other samples.

    Args:
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = Commutativity()
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> metric.update(logits, logits)
        >>> metric.update(logits, logits.flip(1))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    agreeing: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("agreeing", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, mirrored_logits: Tensor) -> None:
        """Add samples.

        Args:
            logits: ``(n, C)``.
            mirrored_logits: ``(n, C)`` for the mirrored inputs, in the same order.
        """
        self.agreeing = self.agreeing + agreements(logits, mirrored_logits).sum()
        self.count = self.count + len(logits)

    def compute(self) -> Tensor:
        """Share of all samples seen."""
        return self.agreeing / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
