"""Early-warning signals that others have published, over many batches or ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from grok_callbacks.functional._common import to_double
from grok_callbacks.functional.representation import (
    class_distance_ratio,
    loss_oscillation,
    prediction_churn,
    prediction_entropy,
    representation_entropy,
)


class RepresentationEntropy(Metric):
    """Normalised spectral entropy of a representation: :func:`~grok_callbacks.functional.representation_entropy`.

    The state holds every sample: sums would be smaller for many samples, but lose the variance of features whose mean
    is large.

    Under DDP: sharded. Each rank gives it other samples.

    Args:
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = RepresentationEntropy()
        >>> metric.update(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    features: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("features", [], dist_reduce_fx="cat")

    def update(self, features: Tensor) -> None:
        """Add samples.

        Args:
            features: (n, d).
        """
        assert isinstance(self.features, list)
        self.features.append(to_double(features.detach().clone()))

    def compute(self) -> Tensor:
        """Entropy of the covariance over all samples seen."""
        return representation_entropy(dim_zero_cat(self.features))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class ClassDistanceRatio(Metric):
    """Separation of the classes over their scatter: :func:`~grok_callbacks.functional.class_distance_ratio`.

    The state holds every sample: distances to a centroid need the centroid first.

    Under DDP: sharded. Each rank gives it other samples.

    Args:
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = ClassDistanceRatio()
        >>> metric.update(torch.tensor([[0.0, 1.0], [10.0, -1.0]]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([[0.0, -1.0], [10.0, 1.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(10., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    features: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add samples.

        Args:
            features: (n, d).
            labels: (n,) integers.
        """
        class_distance_ratio(features[:1], labels[:1])  # the kinds of input, said before the state holds them
        if len(features) != len(labels):
            raise ValueError(f"features has {len(features)} rows, labels has {len(labels)}")
        assert isinstance(self.features, list)
        assert isinstance(self.labels, list)
        self.features.append(to_double(features.detach().clone()))
        self.labels.append(labels.detach().clone())

    def compute(self) -> Tensor:
        """Ratio over all samples seen."""
        return class_distance_ratio(dim_zero_cat(self.features), dim_zero_cat(self.labels))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class LossOscillation(Metric):
    """Activity of the early training loss about its trend: :func:`~grok_callbacks.functional.loss_oscillation`.

    ``update`` takes losses as they come, one or several at a time, evenly spaced; those after the first ``num_losses``
    are left out, so that the value stands still once the early part is over.

    Under DDP: replicated. Every rank must give it the same losses: their order would be lost in a reduction.

    Args:
        num_losses: how many losses make the early part.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_losses`` is below five: a cubic trend goes through four.

    Example:
        >>> import torch
        >>> metric = LossOscillation()
        >>> for step in range(8):
        ...     metric.update(torch.tensor(10.0 - step + (-1) ** step))
        >>> metric.compute()
        tensor(0.0197, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "replicated"

    losses: list[Tensor] | Tensor

    def __init__(self, num_losses: int = 200, **kwargs: Any) -> None:
        kwargs.setdefault("sync_on_compute", False)
        super().__init__(**kwargs)
        if num_losses < 5:
            raise ValueError(f"num_losses must be at least 5, got {num_losses}")
        self.num_losses = num_losses
        self.add_state("losses", [], dist_reduce_fx="cat")

    def update(self, losses: Tensor) -> None:
        """Add losses.

        Args:
            losses: () or (n,), in order.
        """
        assert isinstance(self.losses, list)
        if losses.ndim > 1:
            raise ValueError(f"losses must be a number or a vector, got the shape {tuple(losses.shape)}")
        room = self.num_losses - sum(len(held) for held in self.losses)
        if room > 0:
            self.losses.append(to_double(losses.detach()).reshape(-1)[:room].clone())

    def compute(self) -> Tensor:
        """Activity of the first ``num_losses`` losses, or of those there are."""
        return loss_oscillation(dim_zero_cat(self.losses)[: self.num_losses])

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class PredictionEntropy(Metric):
    """Mean uncertainty of predictions, in nats: :func:`~grok_callbacks.functional.prediction_entropy`.

    The state is a sum and a count.

    Under DDP: sharded. Each rank gives it other samples.

    Args:
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = PredictionEntropy()
        >>> metric.update(torch.zeros(5, 4))
        >>> metric.compute()
        tensor(1.3863, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add samples.

        Args:
            logits: (n, C).
        """
        self.total = self.total + prediction_entropy(logits.detach()) * len(logits)
        self.count = self.count + len(logits)

    def compute(self) -> Tensor:
        """Mean over all samples seen."""
        return self.total / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class PredictionChurn(Metric):
    """Share of samples whose predicted class changed: :func:`~grok_callbacks.functional.prediction_churn`.

    The state is two counts.

    Under DDP: sharded. Each rank gives it other samples.

    Args:
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = PredictionChurn()
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    changed: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("changed", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, previous_logits: Tensor) -> None:
        """Add samples.

        Args:
            logits: (n, C).
            previous_logits: (n, C), of the same inputs, earlier.
        """
        self.changed = self.changed + prediction_churn(logits.detach(), previous_logits.detach()) * len(logits)
        self.count = self.count + len(logits)

    def compute(self) -> Tensor:
        """Share over all samples seen."""
        return self.changed / self.count

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
