"""A penalty that drives weight matrices towards low rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grok_callbacks.functional.spectral_penalty import spectral_entropy_penalty
from grok_callbacks.mixins._base import Mixin, chosen_parameters, finite, no_autocast, whole

__all__ = ["SpectralEntropyMixin"]


class SpectralEntropyMixin(Mixin):
    r"""Adds :math:`\beta \cdot \frac{1}{K} \sum_k H(W_k)` to the loss, the mean spectral entropy of the weight matrices.

    See :func:`~grok_callbacks.functional.spectral_entropy_penalty` for H and its gradient, which is finite everywhere. The
    paper uses it with weight noise and strong weight decay.

    Matrices are the trainable parameters of two dimensions and more, embeddings included; convolutions are flattened to
    (out, in * k). Tied weights count once. The penalty is that of the clean weights, also under weight noise. Under FSDP2 a
    matrix is gathered from all ranks at a time.

    Args:
        beta: Factor; the paper's is 0.1. With 0 training is the plain one.
        parameters: Globs on clean parameter names, ``!`` taking away, such as ``["*", "!embedding.*"]``. All matrices by
            default.

    Logged: ``grok/penalty/spectral_entropy``, the penalty with its factor.

    Cost: a singular value decomposition with vectors of each matrix at every (micro-)batch, in float32 unless the weight is
    in float64.

    Source: eq. 16 of DeMoss et al. 2024, "The Complexity Dynamics of Grokking", arXiv 2412.09810.

    Example:
        >>> import torch
        >>> mixin = SpectralEntropyMixin(beta=1.0)
        >>> layer = torch.nn.Linear(4, 4, bias=False)
        >>> layer.weight.data = torch.eye(4)
        >>> round(mixin.penalty(layer).item(), 4)  # ln 4
        1.3863
    """

    kind = "spectral_entropy"

    def __init__(self, beta: float = 0.1, parameters: str | Sequence[str] | None = None) -> None:
        self.beta = finite("beta", beta)
        self.parameters = parameters

    @property
    def active(self) -> bool:
        """False where ``beta`` is 0."""
        return self.beta != 0

    def check(self, module: nn.Module) -> None:
        """Raise ``ValueError`` if ``parameters`` matches no matrix."""
        chosen_parameters(module, self.parameters, matrices=True)

    def penalty(self, module: nn.Module) -> Tensor:
        """The penalty as a differentiable scalar, for a loss of your own (under manual optimisation, say)."""
        matrices = list(chosen_parameters(module, self.parameters, matrices=True).values())
        if not matrices:
            return torch.zeros(())
        with no_autocast(matrices[0]):
            entropies = [spectral_entropy_penalty(whole(matrix).flatten(1)) for matrix in matrices]
            return self.beta * torch.stack([entropy.to(entropies[0]) for entropy in entropies]).mean()

    def weight_penalty(self, module: nn.Module) -> Tensor:
        """See :meth:`penalty`."""
        return self.penalty(module)
