"""Norm of parameters that come in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from grok_callbacks.functional.norm import check_order, norm_of_entries, parameter_norm

__all__ = ["ParameterNorm"]


class ParameterNorm(Metric):
    """Norm of all parameters that it is given: :func:`~grok_callbacks.functional.parameter_norm`.

    Over k updates it is the norm of all their tensors together.

    Under DDP every rank has the same parameters, and nothing is summed over ranks (``distribution="replicated"``). Where ranks
    hold different pieces, as the shards of FSDP, choose ``distribution="sharded"``: the norm is then that of all pieces.

    Args:
        ord: Order of the norm, positive; ``inf`` for the largest magnitude.
        distribution: Whether ranks hold the same tensors or different ones.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``ord`` is not positive or ``distribution`` is unknown.

    Example:
        >>> import torch
        >>> metric = ParameterNorm()
        >>> metric.update(torch.tensor([3.0]))
        >>> metric.update([torch.tensor([[4.0]]), torch.tensor(0.0)])
        >>> metric.compute()
        tensor(5., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: Literal["replicated", "sharded"] = "replicated"

    norm: Tensor

    def __init__(
        self,
        ord: float = 2.0,  # noqa: A002
        distribution: Literal["replicated", "sharded"] = "replicated",
        **kwargs: Any,
    ) -> None:
        if distribution not in ("replicated", "sharded"):
            raise ValueError(f"`distribution` must be 'replicated' or 'sharded', got {distribution!r}.")
        check_order(ord)
        kwargs.setdefault("sync_on_compute", distribution == "sharded")
        super().__init__(**kwargs)
        self.ord = ord
        self.distribution = distribution
        # The norm of all pieces is the norm of their norms.
        combine = partial(norm_of_entries, ord=ord)
        self.add_state("norm", torch.zeros((), dtype=torch.float64), dist_reduce_fx=combine)

    def update(self, tensors: Tensor | Iterable[Tensor] | Mapping[str, Tensor]) -> None:
        """Add tensors.

        Args:
            tensors: A tensor, several, or several by name.
        """
        added = parameter_norm(tensors, self.ord)
        self.norm = norm_of_entries(torch.stack([self.norm.to(added.device), added]), self.ord)

    def compute(self) -> Tensor:
        """Norm of all that was given, float64."""
        return self.norm

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several, see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
