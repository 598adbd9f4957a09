"""Absolute entropy of a weight matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from grok_callbacks.functional._common import to_double

__all__ = ["weight_entropy"]


def weight_entropy(weight: Tensor) -> Tensor:
    r"""Absolute weight entropy :math:`H(W) = -\sum_{ij} |w_{ij}| \ln |w_{ij}|` in nats, with :math:`0 \ln 0 = 0`.

    The magnitudes are not normalised, so it is no entropy of a distribution: it is at most :math:`mn / e`, negative where all
    magnitudes exceed 1, and depends on scale, :math:`H(cW) = c H(W) - c \ln c \sum |w_{ij}|`.

    Args:
        weight: A weight of any shape and real dtype.

    Returns:
        Scalar float64; 0 for an empty weight, NaN if there is a NaN or an infinity in it.

    Raises:
        ValueError: If ``weight`` is complex.

    Cost:
        One pass over the entries.

    Source:
        Golechha, "Progress Measures for Grokking on Real-world Tasks" (2024), arXiv 2405.12755.

    Example:
        >>> weight_entropy(torch.tensor([[0.5, -0.5], [1.0, 0.0]]))
        tensor(0.6931, dtype=torch.float64)
    """
    if weight.is_complex():
        raise ValueError("`weight` must be real, got a complex tensor.")
    terms: Tensor = torch.special.entr(to_double(weight.detach()).abs())
    # An infinite weight has the term -inf, which says nothing of the others.
    total = terms.sum()
    return torch.where(total.isinf(), torch.full_like(total, torch.nan), total)
