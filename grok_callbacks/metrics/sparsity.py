"""How much of a layer is silent, over many batches or ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from grok_callbacks.functional._common import to_double
from grok_callbacks.functional.sparsity import activation_sparsity, check_threshold


class ActivationSparsity(Metric):
    """Silent share of a layer's activations: :func:`~grok_callbacks.functional.activation_sparsity`.

    Over k updates or ranks it is the sparsity of all their activations together. With an absolute threshold the state
    is two numbers; with a relative one, the scale is known only at the end, and the state holds every activation.

    Under DDP: sharded. Each rank gives it other samples.

    Args:
        threshold: In the units of the activations, or in multiples of their root mean square.
        relative: Whether ``threshold`` is multiplied by the root mean square of all activations.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``threshold`` is not a finite number.

    Example:
        >>> import torch
        >>> metric = ActivationSparsity()
        >>> metric.update(torch.tensor([[0.0, 1.0]]))
        >>> metric.update(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    silent: Tensor
    count: Tensor
    activations: list[Tensor] | Tensor

    def __init__(self, threshold: float = 0.1, *, relative: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_threshold(threshold)
        self.threshold = threshold
        self.relative = relative
        if relative:
            self.add_state("activations", [], dist_reduce_fx="cat")
        else:
            self.add_state("silent", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, activations: Tensor) -> None:
        """Add activations of any shape.

        Args:
            activations: A layer's output after its non-linearity.
        """
        sparsity = activation_sparsity(activations, self.threshold, relative=self.relative)
        if self.relative:
            assert isinstance(self.activations, list)
            self.activations.append(to_double(activations).flatten())
        else:
            self.silent = self.silent + sparsity * activations.numel()
            self.count = self.count + activations.numel()

    def compute(self) -> Tensor:
        """Sparsity of all activations seen."""
        if self.relative:
            return activation_sparsity(dim_zero_cat(self.activations), self.threshold, relative=True)
        return self.silent / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
