"""The Li2 quantities of a last linear layer, over many batches or ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from grok_callbacks.functional._common import to_double
from grok_callbacks.functional.li2 import (
    center,
    feature_energy,
    feature_gradient,
    largest_feature_cosine,
    lazy_alignment,
    participation_ratio,
    residual_alignment,
    residual_ratio,
    ridge_distance,
)


class FeatureLearning(Metric):
    r"""What a network's features, targets and residuals say about the stage of its feature learning.

    ``update`` takes a batch's features :math:`F` (the input of the last linear layer), targets :math:`Y`, residual
    :math:`R` and the layer's weight :math:`V`; ``compute`` gives a dict of scalars over all samples:

    ======================= ============================================================================
    ``cos_lazy``            :func:`~grok_callbacks.functional.lazy_alignment`
    ``cos_residual``        :func:`~grok_callbacks.functional.residual_alignment`
    ``gradient_norm``       Frobenius norm of :func:`~grok_callbacks.functional.feature_gradient`
    ``residual_ratio``      :func:`~grok_callbacks.functional.residual_ratio`
    ``ridge_distance``      :func:`~grok_callbacks.functional.ridge_distance`
    ``participation_ratio`` :func:`~grok_callbacks.functional.participation_ratio`
    ``feature_cosine``      :func:`~grok_callbacks.functional.largest_feature_cosine`
    ``energy_top``          largest :func:`~grok_callbacks.functional.feature_energy` of a unit
    ``energy_median``       median of the same
    ======================= ============================================================================

    All of them are centred over all samples, so the state holds every sample: n (2 K + 2 C) numbers in float64. Feed it a
    probe, not an epoch. No n x n matrix is formed where K < n, and no K x K one where n < K.

    Under DDP: sharded. Each rank gives it other samples; the weight must be the same in all updates and on all ranks.

    Args:
        ridge: strength of the ridge regression *per sample*: :math:`\lambda = n \cdot` ``ridge``, which a loss averaged
            over samples makes the same for any number of samples. With weight decay :math:`\eta` as an L2 penalty it is
            :math:`\eta` for half the squared error, :math:`\eta / 2` for the squared error, :math:`C \eta / 2` for
            ``MSELoss()``. 0 is the least-squares solution.
        kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``ridge`` is negative.

    Example:
        >>> import torch
        >>> metric = FeatureLearning(ridge=2e-4)
        >>> features, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), 0.1 * torch.eye(2, 3)
        >>> targets = torch.eye(3)
        >>> metric.update(features, targets, targets - features @ weight, weight)
        >>> metric.compute()["cos_lazy"]
        tensor(0.4193, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    features: list[Tensor] | Tensor
    targets: list[Tensor] | Tensor
    residual: list[Tensor] | Tensor
    weight: list[Tensor] | Tensor
    gradient: list[Tensor] | Tensor

    def __init__(self, ridge: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not ridge >= 0:
            raise ValueError(f"ridge must not be negative, got {ridge}")
        self.ridge = ridge
        for state in ("features", "targets", "residual", "weight", "gradient"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(
        self, features: Tensor, targets: Tensor, residual: Tensor, weight: Tensor, gradient: Tensor | None = None
    ) -> None:
        """Add samples.

        Args:
            features: (n, K).
            targets: (n, C), labels one-hot encoded.
            residual: (n, C).
            weight: (K, C), of all samples so far.
            gradient: (n, K), what autograd sends back to the features, negated and with the loss' reduction undone; by
                default that of a layer whose outputs are compared with the targets directly, residual times weight.
        """
        if gradient is None:
            feature_gradient(residual, weight)  # says what doesn't fit before the state holds it
            gradient = to_double(residual) @ to_double(weight).T
        values = {"features": features, "targets": targets, "residual": residual, "gradient": gradient}
        if len({len(value) for value in values.values()}) > 1:
            sizes = ", ".join(str(len(value)) for value in values.values())
            raise ValueError(f"{', '.join(values)} must have as many rows, got {sizes}")
        if gradient.shape != features.shape:
            raise ValueError(f"gradient must have the features' shape {tuple(features.shape)}, got {tuple(gradient.shape)}")
        for name, value in {**values, "weight": weight[None]}.items():
            getattr(self, name).append(to_double(value.detach().clone()))

    def compute(self) -> dict[str, Tensor]:
        """All quantities, over all samples seen."""
        features, targets = dim_zero_cat(self.features), dim_zero_cat(self.targets)
        residual, weight = dim_zero_cat(self.residual), self._one_weight()
        gradient = center(dim_zero_cat(self.gradient))
        energy = feature_energy(features, targets)
        return {
            "cos_lazy": lazy_alignment(gradient, features, targets),
            "cos_residual": residual_alignment(gradient, features, targets, residual),
            "gradient_norm": torch.linalg.norm(gradient),
            "residual_ratio": residual_ratio(residual, targets),
            "ridge_distance": ridge_distance(weight, features, targets, self.ridge * len(features)),
            "participation_ratio": participation_ratio(features),
            "feature_cosine": largest_feature_cosine(features),
            "energy_top": energy.amax(),
            "energy_median": energy.quantile(0.5),
        }

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)

    def _one_weight(self) -> Tensor:
        weights = dim_zero_cat(self.weight)
        first: Tensor = weights[0]
        if not all(torch.equal(first.nan_to_num(), other.nan_to_num()) for other in weights[1:]):
            raise ValueError("weight must be the same in all updates and on all ranks")
        return first
