"""What all measures share: double precision, and a probability vector's entropy."""

from __future__ import annotations

import torch
from torch import Tensor


def to_double(tensor: Tensor) -> Tensor:
    """Detached-from-dtype copy of ``tensor`` in float64, or float32 on devices that have no float64 (MPS)."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def entropy(probabilities: Tensor) -> Tensor:
    r"""Shannon entropy :math:`-\sum_i p_i \ln p_i` in nats over the last dimension, with :math:`0 \ln 0 = 0`."""
    terms: Tensor = torch.special.entr(probabilities)
    return terms.sum(-1)
