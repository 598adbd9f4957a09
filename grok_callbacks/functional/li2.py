r"""Feature learning, stage by stage: the quantities of Li2 (Tian 2025, arXiv 2509.21519).

The setting is a network whose last layer is linear: :math:`\hat Y = F V`, with ``features`` :math:`F` (n samples, K units:
the input of that layer), ``weight`` :math:`V` (K, C) and ``targets`` :math:`Y` (n, C; labels one-hot encoded). A tilde
means *centred over samples*. The residual :math:`R` is :math:`\tilde Y - \tilde F V` for the squared error and
:math:`Y - \mathrm{softmax}` for cross-entropy, and :math:`G = \tilde R V^\top` is what the loss sends back to the features.

``torch.nn.Linear`` holds :math:`V^\top`: pass ``layer.weight.T``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from grok_callbacks.functional._common import to_double

_BLOCK = 1024  # units whose cosines with all others are held at a time
_WELL_POSED = 1e-10  # ridge strengths below this share of the Gram matrix's trace go by singular values


def center(matrix: Tensor) -> Tensor:
    r"""Subtract from each column its mean over the rows: :math:`\tilde A = A - \frac1n 1 1^\top A`, in float64.

    A column that is constant but for the rounding of its mean comes out as exact zeros, so that a dead unit has no
    direction instead of a random one.

    Args:
        matrix: (n, d), any real dtype.

    Returns:
        (n, d) in float64.

    Raises:
        ValueError: if ``matrix`` isn't two-dimensional or is empty.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import center
        >>> center(torch.tensor([[1.0, 0.1], [3.0, 0.1], [8.0, 0.1]]))
        tensor([[-3.,  0.],
                [-1.,  0.],
                [ 4.,  0.]], dtype=torch.float64)
    """
    return _center("matrix", matrix)


def feature_gradient(residual: Tensor, weight: Tensor) -> Tensor:
    r"""What the loss sends back to the features: :math:`G = \tilde R V^\top`.

    This is minus the gradient of the loss with respect to the features, with the loss' reduction undone (divide by
    :func:`gradient_scale`), centred over samples. The columns of the result sum to zero. Without the centring the
    identities of the theory don't hold.

    Args:
        residual: :math:`R` (n, C); it need not be centred.
        weight: :math:`V` (K, C).

    Returns:
        :math:`G` (n, K) in float64.

    Raises:
        ValueError: if the shapes don't fit.

    Cost:
        n K C multiplications.

    Source:
        Tian 2025, arXiv 2509.21519, section 3: :math:`G_F = P(Y - FV)V^\top`.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import feature_gradient
        >>> residual = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 0.0]])
        >>> feature_gradient(residual, weight)
        tensor([[-0.5000, -1.0000,  1.0000],
                [ 0.5000,  1.0000, -1.0000]], dtype=torch.float64)
    """
    residual = _center("residual", residual)
    weight = _matrix("weight", weight)
    _same("weight", weight.shape[1], "residual", residual.shape[1], "columns (outputs)")
    return residual @ weight.T


def lazy_alignment(gradient: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    r"""Cosine of the gradient with its direction in the independent stage: :math:`\cos(G, \tilde Y \tilde Y^\top \tilde F)`.

    Near 0 while the last layer still fits random features (stage I), near 1 when each unit climbs the energy of
    :func:`feature_energy` on its own (stage II). NaN where the gradient or the direction is zero.

    Args:
        gradient: :math:`G` (n, K), see :func:`feature_gradient`; it need not be centred.
        features: :math:`F` (n, K).
        targets: :math:`Y` (n, C).

    Returns:
        Scalar in [-1, 1], float64.

    Raises:
        ValueError: if the shapes don't fit.

    Cost:
        2 n K C multiplications; no n x n matrix is formed.

    Source:
        Tian 2025, arXiv 2509.21519, section 4; the cosine as a measure of the stage is ours.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import lazy_alignment
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> targets = torch.eye(3)
        >>> f"{lazy_alignment(features, features, targets):.4f}"
        '1.0000'
    """
    return residual_alignment(gradient, features, targets, targets)


def residual_alignment(gradient: Tensor, features: Tensor, targets: Tensor, residual: Tensor) -> Tensor:
    r"""Cosine of the gradient with its direction in the interactive stage: :math:`\cos(G, \tilde R \tilde Y^\top \tilde F)`.

    It exceeds :func:`lazy_alignment` once the gradient turns to what is still missing (stage III). NaN where the
    gradient or the direction is zero.

    Args:
        gradient: :math:`G` (n, K), see :func:`feature_gradient`; it need not be centred.
        features: :math:`F` (n, K).
        targets: :math:`Y` (n, C).
        residual: :math:`R` (n, C); it need not be centred.

    Returns:
        Scalar in [-1, 1], float64.

    Raises:
        ValueError: if the shapes don't fit.

    Cost:
        2 n K C multiplications; no n x n matrix is formed.

    Source:
        Tian 2025, arXiv 2509.21519, section 6 (top-down modulation); the cosine as a measure of the stage is ours.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import residual_alignment
        >>> features, targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.eye(3)
        >>> residual = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.0, -1.0, 1.0]])
        >>> residual_alignment(features, features, targets, residual)
        tensor(0.6124, dtype=torch.float64)
    """
    gradient, features = _center("gradient", gradient), _center("features", features)
    targets, residual = _center("targets", targets), _center("residual", residual)
    _same_samples(features, gradient=gradient, targets=targets, residual=residual)
    _same("gradient", gradient.shape[1], "features", features.shape[1], "columns (units)")
    _same("residual", residual.shape[1], "targets", targets.shape[1], "columns (outputs)")
    return _cosine(gradient, residual @ (targets.T @ features))


def residual_ratio(residual: Tensor, targets: Tensor) -> Tensor:
    r"""How much of the targets is not fitted: :math:`\|\tilde R\| / \|\tilde Y\|` (Frobenius norms).

    Args:
        residual: :math:`R` (n, C).
        targets: :math:`Y` (n, C).

    Returns:
        Scalar, float64; NaN where the targets are constant.

    Raises:
        ValueError: if the shapes don't fit.

    Source:
        Tian 2025, arXiv 2509.21519.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import residual_ratio
        >>> residual_ratio(0.25 * torch.eye(3), torch.eye(3))
        tensor(0.2500, dtype=torch.float64)
    """
    residual, targets = _center("residual", residual), _center("targets", targets)
    _same_samples(targets, residual=residual)
    _same("residual", residual.shape[1], "targets", targets.shape[1], "columns (outputs)")
    return _ratio(torch.linalg.norm(residual), torch.linalg.norm(targets))


def feature_energy(features: Tensor, targets: Tensor) -> Tensor:
    r"""Energy of each unit: :math:`E_k = \frac12 \|\tilde Y^\top f_k\|^2`, with :math:`f_k` its column of the features.

    In the independent stage every unit climbs its own energy, and the local maxima are the features that emerge. It
    scales with the square of the feature: compare units of one network at one time.

    Args:
        features: :math:`F` (n, K).
        targets: :math:`Y` (n, C).

    Returns:
        (K,) in float64, not negative.

    Raises:
        ValueError: if the shapes don't fit.

    Cost:
        n K C multiplications.

    Source:
        Tian 2025, arXiv 2509.21519, theorem on independent feature learning. (Its constant :math:`E^* = M/16` at a
        generalising feature of modular addition doesn't hold for :math:`\sigma = x^2` and unit weights: M/4 is measured.)

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import feature_energy
        >>> feature_energy(torch.tensor([[2.0, 5.0], [0.0, 5.0]]), torch.eye(2))
        tensor([1., 0.], dtype=torch.float64)
    """
    features, targets = _center("features", features), _center("targets", targets)
    _same_samples(features, targets=targets)
    return 0.5 * (targets.T @ features).square().sum(0)


def participation_ratio(features: Tensor) -> Tensor:
    r"""Number of directions that the features use: :math:`\mathrm{tr}(K)^2 / \|K\|_F^2` of :math:`K = \tilde F \tilde F^\top`.

    Args:
        features: :math:`F` (n, K).

    Returns:
        Scalar between 1 and min(n - 1, K), float64; NaN where all features are constant.

    Raises:
        ValueError: if ``features`` isn't a matrix or is empty.

    Cost:
        n K min(n, K) multiplications; the Gram matrix is taken over samples or units, whichever are fewer.

    Source:
        Tian 2025, arXiv 2509.21519, for the kernel; the ratio is the usual one.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import participation_ratio
        >>> participation_ratio(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        tensor(2., dtype=torch.float64)
    """
    features = _center("features", features)
    gram = _smaller_gram(features / features.abs().amax())  # the ratio has no scale, the fourth power a range
    return gram.trace().square() / gram.square().sum()


def largest_feature_cosine(features: Tensor) -> Tensor:
    r"""Similarity of the two units most alike: :math:`\max_{k \ne l} \cos(\tilde f_k, \tilde f_l)`, signed.

    In the interactive stage similar units repel each other. Units that are constant over the samples have no
    direction and are left out.

    Args:
        features: :math:`F` (n, K).

    Returns:
        Scalar in [-1, 1], float64; NaN where fewer than two units vary.

    Raises:
        ValueError: if ``features`` isn't a matrix or is empty.

    Cost:
        n K^2 multiplications, in blocks of 1,024 units: no K x K matrix is formed for wide layers.

    Source:
        Tian 2025, arXiv 2509.21519, section on repulsion of similar features; the maximum as a measure is ours.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import largest_feature_cosine
        >>> f"{largest_feature_cosine(torch.tensor([[1.0, 3.0, 0.0], [2.0, 5.0, 0.0], [3.0, 7.0, 1.0]])):.4f}"
        '1.0000'
    """
    features = _center("features", features)
    if not torch.isfinite(features).all():
        return features.new_tensor(torch.nan)
    features = features / features.abs().amax(0)
    features = features[:, torch.isfinite(features).all(0)]
    if features.shape[1] < 2:
        return features.new_tensor(torch.nan)
    features = features / torch.linalg.norm(features, dim=0)
    largest = [_largest_off_diagonal(features, start) for start in range(0, features.shape[1], _BLOCK)]
    return torch.stack(largest).max().clamp(-1.0, 1.0)


def gradient_scale(logit_gradient: Tensor, residual: Tensor) -> Tensor:
    r"""The factor that the loss' reduction puts before the residual: :math:`\partial L / \partial \hat Y = -c R`.

    ======================================================  ==============
    loss over n samples with C outputs                       c
    ======================================================  ==============
    half the squared error, mean over samples                1 / n
    squared error, mean over samples                         2 / n
    ``MSELoss()``                                            2 / (n C)
    ``CrossEntropyLoss()``                                   1 / n
    ``reduction="sum"``                                      2 (MSE), 1 (CE)
    ======================================================  ==============

    It is measured, as the least-squares factor between the two, so that any reduction and any constant factor is
    undone: :math:`G` is the centred :math:`-\frac1c \partial L / \partial F`.

    Args:
        logit_gradient: gradient of the loss with respect to the network's outputs (n, C).
        residual: :math:`R` (n, C), not centred: :math:`Y - \hat Y` or :math:`Y - \mathrm{softmax}`.

    Returns:
        Scalar, float64; NaN where the residual is zero.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import gradient_scale
        >>> outputs, targets = torch.zeros(4, 3, requires_grad=True), torch.ones(4, 3)
        >>> (gradient,) = torch.autograd.grad(torch.nn.functional.mse_loss(outputs, targets), outputs)
        >>> gradient_scale(gradient, targets - outputs.detach()) * 12
        tensor(2.0000, dtype=torch.float64)
    """
    logit_gradient, residual = _matrix("logit_gradient", logit_gradient), _matrix("residual", residual)
    if logit_gradient.shape != residual.shape:
        raise ValueError(
            f"logit_gradient and residual must have one shape, got {tuple(logit_gradient.shape)} and {tuple(residual.shape)}"
        )
    return -(logit_gradient * residual).sum() / residual.square().sum()


def ridge_strength(weight_decay: float, scale: float | Tensor) -> float:
    r"""Strength of the ridge regression that a weight decay means: :math:`\lambda = \eta / c`.

    The loss plus an L2 penalty :math:`\frac\eta2 \|V\|^2` is stationary in V where
    :math:`c \tilde F^\top \tilde R = \eta V`, with c of :func:`gradient_scale`: the ridge point of strength
    :math:`\eta / c`. So n eta for half the squared error averaged over n samples, n eta / 2 without the half, and
    n C eta / 2 for ``MSELoss()``. Adam's decay is such a penalty; AdamW's decoupled decay has no exact ridge point.

    Args:
        weight_decay: :math:`\eta`, not negative.
        scale: :math:`c`, positive.

    Returns:
        :math:`\lambda`.

    Raises:
        ValueError: if ``weight_decay`` is negative or ``scale`` isn't positive.

    Source:
        Tian 2025, arXiv 2509.21519, section 3 (half the squared error); the other reductions follow.

    Example:
        >>> from grok_callbacks.functional import ridge_strength
        >>> ridge_strength(2e-4, 1 / 2000)
        0.4
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    if float(scale) <= 0:
        raise ValueError(f"scale must be positive, got {float(scale)}")
    return weight_decay / float(scale)


def ridge_solution(features: Tensor, targets: Tensor, strength: float) -> Tensor:
    r"""The last layer that weight decay leads to on fixed features.

    .. math:: V^* = (\tilde F^\top \tilde F + \lambda I)^{-1} \tilde F^\top \tilde Y

    At this point :math:`G = \lambda (\tilde F \tilde F^\top + \lambda I)^{-1} \tilde Y \tilde Y^\top \tilde F
    (\tilde F^\top \tilde F + \lambda I)^{-1}`: only with weight decay does a gradient leak back to the features.

    Args:
        features: :math:`F` (n, K).
        targets: :math:`Y` (n, C).
        strength: :math:`\lambda`, not negative; 0 is the limit, the least-squares solution of smallest norm.

    Returns:
        (K, C) in float64; NaN throughout if an input isn't finite.

    Raises:
        ValueError: if the shapes don't fit or ``strength`` is negative.

    Cost:
        n K min(n, K) + min(n, K)^3 / 3 multiplications: solved over samples or units, whichever are fewer. A strength of
        zero, or one lost beside the features in float64, takes singular values instead, about ten times that.

    Source:
        Tian 2025, arXiv 2509.21519, section 3.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import ridge_solution
        >>> ridge_solution(torch.tensor([[1.0], [-1.0]]), torch.tensor([[3.0], [-3.0]]), strength=2.0)
        tensor([[1.5000]], dtype=torch.float64)
    """
    features, targets = _center("features", features), _center("targets", targets)
    _same_samples(features, targets=targets)
    if not strength >= 0:
        raise ValueError(f"strength must not be negative, got {strength}")
    if not (torch.isfinite(features).all() and torch.isfinite(targets).all()):
        return features.new_full((features.shape[1], targets.shape[1]), torch.nan)
    if strength > _WELL_POSED * features.square().sum():
        gram = _smaller_gram(features)
        gram.diagonal().add_(strength)
        factor = torch.linalg.cholesky(gram)
        if features.shape[0] < features.shape[1]:
            return features.T @ torch.cholesky_solve(targets, factor)
        return torch.cholesky_solve(features.T @ targets, factor)
    u, s, vh = torch.linalg.svd(features, full_matrices=False)
    kept = s > s.amax() * max(features.shape) * torch.finfo(s.dtype).eps
    gain = torch.where(kept, s / (s.square() + strength), 0.0)
    solution: Tensor = vh.T @ (gain[:, None] * (u.T @ targets))
    return solution


def ridge_distance(weight: Tensor, features: Tensor, targets: Tensor, strength: float) -> Tensor:
    r"""How far the last layer is from the ridge solution :math:`V^*`: :math:`\|V - V^*\| / \|V^*\|`.

    It falls while the last layer fits fixed features (stage I). Meant for the squared error: cross-entropy has no such
    closed solution.

    Args:
        weight: :math:`V` (K, C).
        features: :math:`F` (n, K).
        targets: :math:`Y` (n, C).
        strength: :math:`\lambda`, see :func:`ridge_strength`.

    Returns:
        Scalar, float64; NaN where the ridge solution is zero.

    Raises:
        ValueError: if the shapes don't fit or ``strength`` is negative.

    Cost:
        That of :func:`ridge_solution`.

    Source:
        Tian 2025, arXiv 2509.21519, figure 3.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import ridge_distance
        >>> features, targets = torch.tensor([[1.0], [-1.0]]), torch.tensor([[3.0], [-3.0]])
        >>> ridge_distance(torch.tensor([[1.0]]), features, targets, strength=1.0)
        tensor(0.5000, dtype=torch.float64)
    """
    weight = _matrix("weight", weight)
    solution = ridge_solution(features, targets, strength)
    _same("weight", weight.shape[0], "features", solution.shape[0], "units")
    _same("weight", weight.shape[1], "targets", solution.shape[1], "outputs")
    return _ratio(torch.linalg.norm(weight - solution), torch.linalg.norm(solution))


def relative_change(weights: Tensor | Iterable[Tensor], initial: Tensor | Iterable[Tensor]) -> Tensor:
    r"""How far weights have moved: :math:`\|W - W_0\| / \|W_0\|`, over all tensors together.

    Args:
        weights: one tensor, or several.
        initial: as many, of the same shapes.

    Returns:
        Scalar, float64; NaN where all initial weights are zero.

    Raises:
        ValueError: if the numbers or shapes of the tensors differ, there is none, or one is complex.

    Source:
        Tian 2025, arXiv 2509.21519, figure 3 (update sizes of W and V).

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import relative_change
        >>> relative_change(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
        tensor(1.3333, dtype=torch.float64)
    """
    now = [weights] if isinstance(weights, Tensor) else list(weights)
    then = [initial] if isinstance(initial, Tensor) else list(initial)
    if not now or [tensor.shape for tensor in now] != [tensor.shape for tensor in then]:
        raise ValueError("weights and initial must be tensors of the same shapes, at least one")
    if any(tensor.is_complex() for tensor in [*now, *then]):
        raise ValueError("weights and initial must be real, got complex ones")
    moved = torch.stack([torch.linalg.vector_norm(to_double(a) - to_double(b)) for a, b in zip(now, then, strict=True)])
    length = torch.stack([torch.linalg.vector_norm(to_double(b)) for b in then])
    return _ratio(torch.linalg.norm(moved), torch.linalg.norm(length))


@dataclass(frozen=True)
class Li2Stage:
    r"""The stage of feature learning, decided softly from the two alignments.

    1. *lazy*: the last layer fits random features; runs begin here.
    2. *independent*: once :func:`lazy_alignment` is at least ``lazy_threshold`` although the targets are fitted,
       :func:`residual_ratio` at most ``fit_threshold``.
    3. *interactive*: once stage 2 was seen and :func:`residual_alignment` exceeds :func:`lazy_alignment` by at least
       ``gap_threshold``. The gap may close again late in a run: stages never go back.

    The residual matters because before anything is fitted it *is* the targets, and both alignments are high for that
    reason alone: on the two-layer network of the paper they reach 0.87 within 50 steps with weight decay and without.
    Once the targets are fitted they fall, to 0 without weight decay, and rise again to 0.76 with it, hundreds of steps
    before it generalises. Without a residual ratio that first rise counts as stage 2. A network that never
    fits (few units, strong weight decay) stays in stage 1: raise ``fit_threshold`` for it.

    A change must show in ``patience`` measurements in a row; an undefined value (NaN) breaks the row. The thresholds
    come from small runs: check them on yours. *A stage is not a verdict on generalisation*: a run with too
    little data reaches stage 3 as well, and memorises.

    The object is a value: :meth:`update` returns the next one. ``dataclasses.asdict`` saves it and ``Li2Stage(**saved)``
    restores it.

    Args:
        lazy_threshold: cosine from which the gradient counts as that of the independent stage.
        gap_threshold: lead of the residual alignment from which it counts as that of the interactive stage.
        fit_threshold: residual ratio up to which the targets count as fitted.
        patience: measurements in a row that a change must last.
        stage: 1, 2 or 3.
        streak: measurements in a row so far that spoke for the next stage.

    Source:
        Tian 2025, arXiv 2509.21519, for the stages; thresholds and hysteresis are ours.

    Example:
        >>> from grok_callbacks.functional import Li2Stage
        >>> stage = Li2Stage()
        >>> for cos_lazy, cos_residual in [(0.1, 0.1), (0.6, 0.6), (0.7, 0.7), (0.4, 0.9), (0.3, 0.8)]:
        ...     stage = stage.update(cos_lazy, cos_residual)
        ...     print(stage.stage, stage.name)
        1 lazy
        1 lazy
        2 independent
        2 independent
        3 interactive
    """

    lazy_threshold: float = 0.5
    gap_threshold: float = 0.2
    fit_threshold: float = 0.1
    patience: int = 2
    stage: int = 1
    streak: int = 0

    NAMES: ClassVar[tuple[str, str, str]] = ("lazy", "independent", "interactive")

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if self.stage not in (1, 2, 3):
            raise ValueError(f"stage must be 1, 2 or 3, got {self.stage}")

    @property
    def name(self) -> str:
        """``"lazy"``, ``"independent"`` or ``"interactive"``."""
        return self.NAMES[self.stage - 1]

    def update(self, cos_lazy: float, cos_residual: float, residual_ratio: float = 0.0) -> Li2Stage:
        """The stage after one more measurement; without a residual ratio the targets count as fitted."""
        if self.stage == 3:
            return self
        independent = cos_lazy >= self.lazy_threshold and residual_ratio <= self.fit_threshold
        moves = independent if self.stage == 1 else cos_residual - cos_lazy >= self.gap_threshold
        if not moves:
            return replace(self, streak=0)
        if self.streak + 1 < self.patience:
            return replace(self, streak=self.streak + 1)
        return replace(self, stage=self.stage + 1, streak=0)


def _matrix(name: str, matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"{name} must be a matrix that isn't empty, got the shape {tuple(matrix.shape)}")
    if matrix.is_complex():
        raise ValueError(f"{name} must be real, got {matrix.dtype}")
    return to_double(matrix)


def _center(name: str, matrix: Tensor) -> Tensor:
    matrix = _matrix(name, matrix)
    centred = matrix - matrix.mean(0)
    rounding = 16 * torch.finfo(matrix.dtype).eps * matrix.abs().amax(0)
    return torch.where(centred.abs().amax(0) <= rounding, 0.0, centred)


def _same(name: str, size: int, other: str, other_size: int, what: str) -> None:
    if size != other_size:
        raise ValueError(f"{name} has {size} {what}, {other} has {other_size}")


def _same_samples(reference: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.shape[0] != reference.shape[0]:
            raise ValueError(f"{name} has {tensor.shape[0]} rows (samples) where {reference.shape[0]} are expected")


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    ratio: Tensor = numerator / denominator
    return ratio.masked_fill(denominator == 0, torch.nan)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    cosine: Tensor = (_unit(first) * _unit(second)).sum()
    return cosine.clamp(-1.0, 1.0)


def _unit(matrix: Tensor) -> Tensor:
    """``matrix`` over its norm, which neither overflows nor vanishes on the way; NaN for zero."""
    scaled = matrix / matrix.abs().amax()
    unit: Tensor = scaled / torch.linalg.norm(scaled)
    return unit


def _smaller_gram(features: Tensor) -> Tensor:
    return features @ features.T if features.shape[0] < features.shape[1] else features.T @ features


def _largest_off_diagonal(unit_features: Tensor, start: int) -> Tensor:
    """Largest cosine of the units from ``start`` (a block) with all units but themselves."""
    block = unit_features[:, start : start + _BLOCK]
    cosines = block.T @ unit_features[:, start:]  # pairs with earlier units belong to earlier blocks
    cosines.diagonal().fill_(-torch.inf)
    return cosines.max()
