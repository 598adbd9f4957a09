"""Mean spectral entropy of matrices."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from grok_callbacks.functional.spectral import flatten_matrix, singular_values, spectrum_entropy

__all__ = ["SpectralEntropy"]


class SpectralEntropy(Metric):
    r"""Spectral entropy of a matrix, averaged over matrices: :func:`~grok_callbacks.functional.spectral_entropy`.

    Each update is one whole matrix, and k updates give the mean of their entropies, as DeMoss et al. (eq. 16)
    take it over the matrices of a network. The spectrum of two stacked matrices does not follow from their two spectra, so
    updates cannot add up to one matrix. The effective rank of a single matrix is the exponential of its value.

    Under DDP every rank has the same matrices, and nothing is summed over ranks (``distribution="replicated"``). To share
    the work, give each rank other matrices and choose ``distribution="split"``: the mean is then over all ranks' matrices.

    Args:
        distribution: Whether ranks are given the same matrices or different ones.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``distribution`` is unknown.

    Example:
        >>> import torch
        >>> metric = SpectralEntropy()
        >>> metric.update(torch.eye(4))
        >>> metric.compute()
        tensor(1.3863, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: Literal["replicated", "split"] = "replicated"

    entropies: Tensor
    count: Tensor

    def __init__(self, distribution: Literal["replicated", "split"] = "replicated", **kwargs: Any) -> None:
        if distribution not in ("replicated", "split"):
            raise ValueError(f"`distribution` must be 'replicated' or 'split', got {distribution!r}.")
        kwargs.setdefault("sync_on_compute", distribution == "split")
        super().__init__(**kwargs)
        self.distribution = distribution
        self.add_state("entropies", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, matrix: Tensor, spectrum: Tensor | None = None) -> None:
        """Add a matrix.

        Args:
            matrix: ``(m, n)``; more dimensions are flattened after the first.
            spectrum: Its singular values, if they are known already.
        """
        values = singular_values(flatten_matrix(matrix)) if spectrum is None else spectrum
        self.entropies = self.entropies + spectrum_entropy(values)
        self.count = self.count + 1

    def compute(self) -> Tensor:
        """Mean entropy in nats, float64; NaN before the first matrix."""
        return self.entropies / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several, see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
