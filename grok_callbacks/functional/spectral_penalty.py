"""Spectral entropy as a training loss: differentiable, with finite gradients at every spectrum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def spectral_entropy_penalty(matrix: Tensor) -> Tensor:
    r"""Spectral entropy :math:`H = -\sum_i p_i \ln p_i`, :math:`p_i = s_i / \sum_j s_j`, to be added to a loss.

    The gradient needs no gradients of singular vectors, which blow up at repeated singular values:

    .. math:: \frac{\partial H}{\partial W} = U \operatorname{diag}(h) V^\top, \qquad
              h_i = \frac{\partial H}{\partial s_i} = -\frac{\ln p_i + H}{\sum_j s_j}.

    Equal singular values have equal :math:`h_i`, so the product does not depend on the choice of vectors in their subspace.
    At a zero singular value the slope is infinite (:math:`-\ln s`), and H has a cusp with its minimum there. Singular
    values that are zero to rounding, :math:`s_i \le \max(m, n)\, \epsilon\, s_{\max}`, get :math:`h_i = 0`, which lies
    in the subdifferential of the cusp: what has become zero is left at zero. Above that the slope is that of the formula,
    at most :math:`\ln(\sum_j s_j / s_i) / \sum_j s_j`.

    Args:
        matrix: ``(m, n)``.

    Returns:
        Scalar in nats, in [0, ln min(m, n)], of the matrix's own precision, or float32 if that is lower. An all-zero matrix
        gives 0 and a zero gradient, so that adapters and heads that start at zero can be trained. NaN with a NaN gradient
        if an entry is not finite.

    Raises:
        ValueError: If ``matrix`` is not a non-empty real floating-point matrix.

    Cost: one singular value decomposition with vectors forward, two matrix products; one scaling backward.

    Source: the regulariser is eq. 16 of DeMoss et al. 2024, "The Complexity Dynamics of Grokking", arXiv 2412.09810; what to
    do at zero is ours, the paper being silent.

    Example:
        >>> import torch
        >>> weight = torch.eye(3, requires_grad=True)
        >>> spectral_entropy_penalty(weight).backward()
        >>> bool(weight.grad.abs().max() < 1e-6)
        True
    """
    if matrix.ndim != 2 or matrix.numel() == 0 or not matrix.is_floating_point():
        raise ValueError(f"matrix must be a non-empty floating-point matrix (m, n), got {matrix.dtype} {tuple(matrix.shape)}.")
    entropy: Tensor = _SpectralEntropy.apply(matrix)  # type: ignore[no-untyped-call]
    return entropy


class _SpectralEntropy(torch.autograd.Function):
    """The gradient is formed from the forward pass's decomposition, so that backward is one scaling."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        weight = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        entropy, gradient = _entropy_and_gradient(weight)
        ctx.save_for_backward(gradient.to(matrix.dtype))
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        scaled: Tensor = gradient * grad_outputs[0].to(gradient.dtype)
        return scaled


def _entropy_and_gradient(weight: Tensor) -> tuple[Tensor, Tensor]:
    # The decomposition raises on values that are not finite, and a run that goes wrong should go wrong as it would without.
    if not bool(weight.isfinite().all()):
        return weight.new_full((), torch.nan), torch.full_like(weight, torch.nan)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    total = values.sum()
    if not bool(total > 0):
        return weight.new_zeros(()), torch.zeros_like(weight)
    probabilities = values / total
    entropy = torch.special.entr(probabilities).sum()
    positive = values > max(weight.shape) * torch.finfo(weight.dtype).eps * values[0]
    logs = torch.where(positive, probabilities, 1.0).log()
    slopes = torch.where(positive, -(logs + entropy) / total, 0.0)
    return entropy, (left * slopes) @ right
