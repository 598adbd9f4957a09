"""Entropy and mutual information of representations, over many batches or ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from grok_callbacks.functional._common import to_double
from grok_callbacks.functional.information import (
    check_alpha,
    directions,
    feature_mutual_information,
    matrix_entropy,
)


class MatrixEntropy(Metric):
    """Entropy of the Gram matrix of features: :func:`~grok_callbacks.functional.feature_entropy`.

    Over k updates or ranks it is the entropy over all their samples together, exactly: the state is the second-moment
    matrix of the rows at unit length, which adds up, and whose entropy is that of the Gram matrix. Its ``(d + 1, d +
    1)`` float64 entries do not grow with the number of samples.

    Under DDP: sharded. Each rank gives it other samples.

    Args:
        num_features: Number of features of a sample, d.
        alpha: Order of the entropy, at least 0.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_features`` is less than 1, or ``alpha`` is negative or NaN.

    Example:
        >>> import torch
        >>> metric = MatrixEntropy(num_features=2)
        >>> metric.update(torch.tensor([[1.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.0, 3.0]]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    moment: Tensor

    def __init__(self, num_features: int, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_alpha(alpha)
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}.")
        self.num_features = num_features
        self.alpha = alpha
        moment = torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64)
        self.add_state("moment", moment, dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add samples.

        Args:
            features: ``(n, ...)``, one sample per row with ``num_features`` elements.

        Raises:
            ValueError: If a row has another number of elements.
        """
        rows = directions(features)
        if rows.shape[1] != self.num_features + 1:
            raise ValueError(f"features must have {self.num_features} per sample, got the shape {tuple(features.shape)}.")
        self.moment = self.moment + rows.T @ rows

    def compute(self) -> Tensor:
        """Entropy over all samples seen, in nats."""
        return matrix_entropy(self.moment, self.alpha)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class MatrixMutualInformation(Metric):
    """Mutual information of two representations: :func:`~grok_callbacks.functional.feature_mutual_information`.

    Over k updates or ranks it is the mutual information over all their samples together. The state holds all features
    in float64, for the moments that would add up have :math:`(d_1 d_2)^2` entries.

    Under DDP: sharded. Each rank gives it other samples, and at least one.

    Args:
        alpha: Order of the entropies, at least 0.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``alpha`` is negative or NaN.

    Example:
        >>> import torch
        >>> metric = MatrixMutualInformation()
        >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 1.0]]))
        >>> metric.compute()
        tensor(0.6931, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    features1: list[Tensor] | Tensor
    features2: list[Tensor] | Tensor

    def __init__(self, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_alpha(alpha)
        self.alpha = alpha
        self.add_state("features1", [], dist_reduce_fx="cat")
        self.add_state("features2", [], dist_reduce_fx="cat")

    def update(self, features1: Tensor, features2: Tensor) -> None:
        """Add samples.

        Args:
            features1: ``(n, ...)``, one sample per row.
            features2: ``(n, ...)`` of the same samples in the same order.

        Raises:
            ValueError: If the numbers of samples differ.
        """
        if len(features1) != len(features2):
            raise ValueError(f"features1 and features2 must have as many rows, got {len(features1)} and {len(features2)}.")
        assert isinstance(self.features1, list)
        assert isinstance(self.features2, list)
        self.features1.append(to_double(features1).flatten(1))
        self.features2.append(to_double(features2).flatten(1))

    def compute(self) -> Tensor:
        """Mutual information over all samples seen, in nats."""
        return feature_mutual_information(dim_zero_cat(self.features1), dim_zero_cat(self.features2), self.alpha)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
