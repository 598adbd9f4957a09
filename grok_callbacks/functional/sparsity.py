"""How much of a layer is silent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grok_callbacks.functional._common import to_double


def activation_sparsity(activations: Tensor, threshold: float = 0.1, *, relative: bool = False) -> Tensor:
    r"""Share of a layer's activations that lie below a threshold.

    .. math:: S = \frac{1}{D} \sum_{i=1}^{D} \frac{1}{n} \sum_{j=1}^{n} \mathbb{1}[a_{ij} < \tau]

    over samples :math:`i` and units :math:`j` of one layer's output after its non-linearity. The comparison is strict
    and signed, as in the paper: on a ReLU a threshold of 0 gives 0 whatever the network does, and the negative outputs
    of a GELU, SiLU or tanh count as silent. The paper names no threshold; 0.1 is our choice. An absolute threshold sees
    a layer that only shrinks as one that falls silent; ``relative=True`` measures against the layer's own scale and
    does not.

    Args:
        activations: Any shape, not empty; every element is one unit of one sample.
        threshold: :math:`\tau`, in the units of the activations, or in multiples of their root mean square.
        relative: Whether ``threshold`` is multiplied by the root mean square over all of ``activations``. A layer that
            is zero everywhere has no scale: each of its units is compared as 0, so it is wholly silent for any positive
            threshold.

    Returns:
        Scalar in [0, 1], without unit. NaN if an activation is NaN or infinite.

    Raises:
        ValueError: If ``activations`` is empty or complex, or ``threshold`` is not a finite number.

    Cost: one pass over the activations.

    Source: Golechha 2024, "Progress Measures for Grokking on Real-world Tasks", arXiv 2405.12755, activation sparsity;
    the relative threshold is ours.

    Example:
        >>> import torch
        >>> activation_sparsity(torch.tensor([[0.0, 0.05, 2.0], [0.0, 1.0, 3.0]]))
        tensor(0.5000, dtype=torch.float64)
        >>> activation_sparsity(torch.tensor([[0.0, 1.0, 2.0]]), threshold=1.0, relative=True)
        tensor(0.6667, dtype=torch.float64)
    """
    check_threshold(threshold)
    if activations.numel() == 0:
        raise ValueError("activations must not be empty.")
    if activations.is_complex():
        raise ValueError(f"activations must be real, got {activations.dtype}.")
    values = to_double(activations) / root_mean_square(activations) if relative else activations
    if values.dtype != torch.float32:
        values = to_double(values)
    silent = to_double(torch.count_nonzero(values < _in_format(threshold, values.dtype))) / values.numel()
    # The sum of finite values can overflow, but that of others never is finite.
    finite = values.sum().isfinite() or torch.isfinite(values).all()
    return silent if finite else torch.full_like(silent, torch.nan)


def _in_format(threshold: float, dtype: torch.dtype) -> Tensor:
    """The smallest number of a format that is no less: what lies below the one lies below the other."""
    rounded = torch.tensor(threshold, dtype=dtype)
    return torch.nextafter(rounded, rounded.new_tensor(torch.inf)) if float(rounded) < threshold else rounded


def check_threshold(threshold: float) -> None:
    """Raise ``ValueError`` unless ``threshold`` is a finite number."""
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold}.")


def root_mean_square(values: Tensor) -> Tensor:
    """The scale that a relative threshold refers to: the root mean square in float64, or 1 for all-zero values."""
    values = to_double(values)
    # Squares of very small or large numbers leave the range of a float; relative to the largest they do not.
    largest = values.abs().max()
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    scale = largest * (values / largest).square().mean().sqrt()
    return torch.where(scale == 0, torch.ones_like(largest), scale)
