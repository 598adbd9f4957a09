"""Norm of any number of parameters taken as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from grok_callbacks.functional._common import to_double

__all__ = ["parameter_norm", "power_sum"]


def parameter_norm(tensors: Tensor | Iterable[Tensor] | Mapping[str, Tensor], ord: float = 2.0) -> Tensor:  # noqa: A002
    r"""Norm of all entries of all tensors together: :math:`\lVert\theta\rVert_p = (\sum_i |\theta_i|^p)^{1/p}`.

    Args:
        tensors: A tensor, several, or several by name; of any shapes and real dtypes, empty ones included.
        ord: Order :math:`p`, positive; ``inf`` for the largest magnitude.

    Returns:
        Scalar float64; 0 for no entries, NaN if there is a NaN among them.

    Raises:
        ValueError: If ``ord`` is not positive or there is no tensor.

    Cost:
        One pass over the entries.

    Source:
        The norm of Liu et al. (2023, arXiv 2310.05918, as L2) and Golechha (2024, arXiv 2405.12755), over all parameters.

    Example:
        >>> parameter_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5., dtype=torch.float64)
    """
    check_order(ord)
    parts = _as_list(tensors)
    if not parts:
        raise ValueError("`tensors` must hold at least one tensor.")
    return root(sum_powers([power_sum(part, ord) for part in parts], ord), ord)


def power_sum(tensor: Tensor, ord: float) -> Tensor:  # noqa: A002
    r""":math:`\sum_i |x_i|^p` of one tensor in float64; the largest magnitude for infinite order."""
    magnitudes = to_double(tensor.detach()).abs()
    if math.isinf(ord):
        return magnitudes.amax() if magnitudes.numel() else magnitudes.sum()
    if ord == 2.0:
        return (magnitudes * magnitudes).sum()
    return magnitudes.sum() if ord == 1.0 else magnitudes.pow(ord).sum()


def sum_powers(sums: Iterable[Tensor], ord: float) -> Tensor:  # noqa: A002
    """Several tensors' power sums as one's."""
    stacked = torch.stack(list(sums))
    return stacked.amax() if math.isinf(ord) else stacked.sum()


def root(total: Tensor, ord: float) -> Tensor:  # noqa: A002
    """The norm from its power sum."""
    if math.isinf(ord):
        return total
    return total.sqrt() if ord == 2.0 else total.pow(1.0 / ord)


def check_order(ord: float) -> None:  # noqa: A002
    """Refuse orders that give no norm."""
    if not ord > 0:
        raise ValueError(f"`ord` must be positive, got {ord!r}.")


def _as_list(tensors: Tensor | Iterable[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
