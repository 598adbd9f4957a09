"""How much the outputs lean on the details of one layer, over many batches or ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from grok_callbacks.functional.circuit import circuit_complexity


class CircuitComplexity(Metric):
    """How far random pruning moves the predictions: :func:`~grok_callbacks.functional.circuit_complexity`.

    Over k updates or ranks it is the complexity over all their samples together, for each mask on its own: batches must
    come from the same masks in the same order. The mean and the standard deviation over masks are those of the result.

    Under DDP: sharded. Each rank gives it other samples, pruned by the same masks; or the same samples, pruned by others.

    Args:
        repeats: Number of masks, the leading dimension of ``pruned_logits``; None for one mask without that dimension.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``repeats`` is less than 1.

    Example:
        >>> import torch
        >>> metric = CircuitComplexity(repeats=2)
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> metric.update(logits, torch.stack([logits, logits.flip(1)]))
        >>> metric.update(logits, torch.stack([logits, logits]))
        >>> metric.compute()
        tensor([0.0000, 0.7616], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    total: Tensor
    count: Tensor

    def __init__(self, repeats: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if repeats is not None and repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}.")
        self.repeats = repeats
        shape = () if repeats is None else (repeats,)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, pruned_logits: Tensor, masks: slice | None = None) -> None:
        """Add samples.

        Args:
            logits: ``(n, C)`` of the intact model.
            pruned_logits: ``(R, n, C)`` of the pruned model, or ``(n, C)`` without ``repeats``.
            masks: Which of the masks these are, where they are not all, as when ranks share them out.

        Raises:
            ValueError: If the shapes do not match each other, ``repeats`` or ``masks``.
        """
        complexity = circuit_complexity(logits, pruned_logits)
        chosen = ... if masks is None else masks
        if complexity.shape != self.total[chosen].shape:
            shape = tuple(self.total[chosen].shape)
            expected = f"a leading dimension of {shape[0]}" if shape else "no leading dimension"
            raise ValueError(f"pruned_logits must have {expected}, got the shape {tuple(pruned_logits.shape)}.")
        # Out of place: the states may be the metric's own defaults.
        total, count = self.total.clone(), self.count.clone()
        total[chosen] += complexity * len(logits)
        count[chosen] += len(logits)
        self.total, self.count = total, count

    def compute(self) -> Tensor:
        """Complexity over all samples seen, in nats: one value per mask (NaN for one never seen), or a scalar."""
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
