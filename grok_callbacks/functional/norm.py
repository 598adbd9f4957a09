"""Norm of any number of parameters taken as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real

import torch
from torch import Tensor

from grok_callbacks.functional._common import to_double

__all__ = ["parameter_norm"]

# Squares of these stay far within the range of double precision.
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


def parameter_norm(tensors: Tensor | Iterable[Tensor] | Mapping[str, Tensor], ord: float = 2.0) -> Tensor:  # noqa: A002
    r"""Norm of all entries of all tensors together: :math:`\lVert\theta\rVert_p = (\sum_i |\theta_i|^p)^{1/p}`.

    It is the norm of the tensors' norms, each computed on entries scaled by the largest, so that no order and no scale
    of the entries overflows or vanishes on the way. Not differentiable: the result is detached.

    Args:
        tensors: A tensor, several, or several by name; of any shapes and real dtypes, empty ones included.
        ord: Order :math:`p`, positive; ``inf`` for the largest magnitude. Below 1 it is no norm in the strict sense.

    Returns:
        Scalar float64; 0 for no entries, NaN if a NaN or an infinity is among them.

    Raises:
        ValueError: If ``ord`` is not positive, there is no tensor, or one is complex.

    Cost:
        Two passes over the entries.

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
    norms = [norm_of_entries(part, ord) for part in parts]
    if len(norms) == 1:
        return norms[0]
    return norm_of_entries(torch.stack([norm.to(norms[0].device) for norm in norms]), ord)


def norm_of_entries(tensor: Tensor, ord: float) -> Tensor:  # noqa: A002
    """Norm of one tensor's entries as a float64 scalar, NaN where one of them is not finite."""
    if tensor.is_complex():
        raise ValueError("`tensors` must be real, got a complex one.")
    entries = to_double(tensor.detach()).flatten()
    if not entries.numel():
        return entries.sum()
    if ord == 2 and entries.dtype == torch.float64 and tensor.dtype in _NARROW:
        norm: Tensor = torch.linalg.vector_norm(entries)
        return torch.where(norm.isinf(), torch.nan, norm)
    lowest, highest = entries.aminmax()
    largest = torch.maximum(-lowest, highest)
    if math.isinf(ord):
        return torch.where(largest.isfinite(), largest, torch.nan)
    # Infinite entries scale to NaN by themselves.
    scaled = entries / torch.where(largest > 0, largest, 1.0)
    norm = torch.linalg.vector_norm(scaled, ord)
    return largest * norm


def check_order(ord: object) -> None:  # noqa: A002
    """Refuse orders that give no norm."""
    if isinstance(ord, bool) or not isinstance(ord, Real) or not float(ord) > 0:
        raise ValueError(f"`ord` must be a positive number, got {ord!r}.")


def _as_list(tensors: Tensor | Iterable[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
