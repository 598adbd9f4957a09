"""Early-warning signals that others have published: of representations, of the loss, of predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grok_callbacks.functional._common import entropy, to_double

_TREND_DEGREE = 3


def representation_entropy(features: Tensor) -> Tensor:
    r"""Normalised spectral entropy of a representation: :math:`-\frac{1}{\ln d} \sum_i p_i \ln p_i`.

    :math:`p_i = e_i / \sum e`, with :math:`e_i` the eigenvalues of the d x d covariance of the features. 1 where all
    directions vary alike, 0 where one does. With n samples, at most n - 1 directions can vary, so fewer samples than
    features bound it by ln(n - 1) / ln d: compare values at a fixed n only.

    Its authors saw it fall below about 0.61 some 1,020 steps before one-layer transformers generalised; multilayer
    perceptrons collapse without grokking.

    Args:
        features: (n, d), any real dtype.

    Returns:
        Scalar in [0, 1], float64; NaN where nothing varies (one sample, constant features) or d is 1.

    Raises:
        ValueError: if ``features`` isn't a matrix or is empty.

    Cost:
        n d min(n, d) + min(n, d)^3 multiplications: the covariance is taken over samples or features, whichever are fewer.

    Source:
        Truong et al. 2026, arXiv 2604.13123.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import representation_entropy
        >>> representation_entropy(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        tensor(1., dtype=torch.float64)
    """
    features = _matrix("features", features)
    dimension = features.shape[1]
    peak = features.abs().amax()
    centred = features - features.mean(0)
    spread = centred.abs().amax()
    # Constant features differ from their mean by its rounding: that is no variance.
    varies = spread > 16 * torch.finfo(features.dtype).eps * peak
    if dimension == 1 or not torch.isfinite(spread) or not varies:
        return features.new_tensor(torch.nan)
    centred = centred / spread
    gram = centred @ centred.T if len(centred) < dimension else centred.T @ centred
    # Small eigenvalues are only as exact as the largest, which the entropy of the eigenvalues themselves doesn't feel.
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0.0)
    return (entropy(eigenvalues / eigenvalues.sum()) / math.log(dimension)).clamp(0.0, 1.0)


def class_distance_ratio(features: Tensor, labels: Tensor) -> Tensor:
    r"""Separation of the classes over their scatter: mean distance of centroids / mean distance to the own centroid.

    .. math:: \frac{\mathrm{mean}_{a < b} \|\mu_a - \mu_b\|}{\mathrm{mean}_i \|h_i - \mu_{y_i}\|}

    Euclidean distances; :math:`\mu_a` is the mean feature of class a. Its authors measure it on held-out data, on
    penultimate features, and take 2.5 times its baseline for an alarm. They speak of "centroid separation" over
    "scatter"; that both are means of plain distances is our choice. A class of one sample has no scatter and is left
    out. Few samples per class raise the ratio (their centroids are noisy and too near to them): compare values
    at fixed samples only.

    Args:
        features: (n, d), any real dtype.
        labels: (n,) integers; which, doesn't matter.

    Returns:
        Scalar, not negative, float64; Inf where classes are apart but have no scatter, NaN where fewer than two classes
        have two samples or nothing varies.

    Raises:
        ValueError: if ``features`` isn't a matrix, is empty, or ``labels`` aren't n integers.

    Cost:
        n d + c^2 d for c classes.

    Source:
        ILDR, arXiv 2604.20923.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import class_distance_ratio
        >>> features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [10.0, 1.0], [10.0, -1.0]])
        >>> class_distance_ratio(features, torch.tensor([0, 0, 1, 1]))
        tensor(10., dtype=torch.float64)
    """
    features = _matrix("features", features)
    if labels.shape != features.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be {len(features)} integers, got the shape {tuple(labels.shape)} of {labels.dtype}")
    _, members, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    kept = sizes[members] >= 2
    features, labels = features[kept], members[kept]
    _, members, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        return features.new_tensor(torch.nan)
    centroids = features.new_zeros(len(sizes), features.shape[1]).index_add_(0, members, features) / sizes[:, None]
    apart = torch.cdist(centroids, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    between = apart.sum() / (len(sizes) * (len(sizes) - 1))
    within = torch.linalg.vector_norm(features - centroids[members], dim=1).mean()
    ratio: Tensor = between / within
    return ratio


def loss_oscillation(losses: Tensor) -> Tensor:
    r"""Activity of a loss curve about its trend: the variance of the detrended curve, over the mean loss squared.

    Hjorth's *activity* is a signal's variance. Runs whose loss oscillates in the first epochs were found to grok later.
    Its authors give no detrending: ours takes away the cubic polynomial in the step that fits best, so that a smooth
    descent counts for little, and divides the curve by its mean, so that losses of any scale compare. Pass the early
    part of training only (its authors: the first few per cent of the epochs).

    Args:
        losses: (n,) the loss at evenly spaced steps, in order.

    Returns:
        Scalar, not negative, float64; NaN for fewer than five losses (a cubic goes through four) or a mean of zero.

    Raises:
        ValueError: if ``losses`` isn't a vector, is empty or is complex.

    Cost:
        A few n multiplications.

    Source:
        Notsawo et al. 2023, arXiv 2306.13253; detrending and scale are ours.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import loss_oscillation
        >>> steps = torch.arange(8.0)
        >>> f"{loss_oscillation(10 - steps):.6f}", f"{loss_oscillation(10 - steps + (-1) ** steps):.6f}"
        ('0.000000', '0.019673')
    """
    if losses.ndim != 1 or losses.numel() == 0:
        raise ValueError(f"losses must be a vector that isn't empty, got the shape {tuple(losses.shape)}")
    if losses.is_complex():
        raise ValueError(f"losses must be real, got {losses.dtype}")
    losses = to_double(losses)
    if len(losses) < _TREND_DEGREE + 2:
        return losses.new_tensor(torch.nan)
    curve = losses / losses.mean()
    if not torch.isfinite(curve).all():
        return losses.new_tensor(torch.nan)
    steps = torch.linspace(-1.0, 1.0, len(losses), dtype=losses.dtype, device=losses.device)
    # An orthonormal basis of the polynomials: their powers themselves are nearly dependent.
    basis, _ = torch.linalg.qr(torch.stack([steps**k for k in range(_TREND_DEGREE + 1)], dim=1))
    detrended: Tensor = curve - basis @ (basis.T @ curve)
    return detrended.square().mean()


def prediction_entropy(logits: Tensor) -> Tensor:
    r"""Mean uncertainty of the predictions, in nats: :math:`\frac1n \sum_i H(\mathrm{softmax}(z_i))`.

    Needs no labels: on held-out inputs it tells whether the network is guessing. Between 0 and ln C.

    Args:
        logits: (n, C).

    Returns:
        Scalar, float64.

    Raises:
        ValueError: if ``logits`` isn't a matrix or is empty.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import prediction_entropy
        >>> prediction_entropy(torch.zeros(5, 4))
        tensor(1.3863, dtype=torch.float64)
    """
    return entropy(_matrix("logits", logits).softmax(-1)).mean()


def prediction_confidence(logits: Tensor) -> Tensor:
    r"""Mean probability of the predicted class: :math:`\frac1n \sum_i \max_c \mathrm{softmax}(z_i)_c`.

    Needs no labels. Between 1 / C and 1.

    Args:
        logits: (n, C).

    Returns:
        Scalar, float64.

    Raises:
        ValueError: if ``logits`` isn't a matrix or is empty.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import prediction_confidence
        >>> prediction_confidence(torch.zeros(5, 4))
        tensor(0.2500, dtype=torch.float64)
    """
    return _matrix("logits", logits).softmax(-1).amax(-1).mean()


def prediction_churn(logits: Tensor, previous_logits: Tensor) -> Tensor:
    r"""Share of samples whose predicted class (argmax) changed since the previous measurement.

    Needs no labels. Where logits tie, the first class counts as predicted.

    Args:
        logits: (n, C).
        previous_logits: (n, C), of the same inputs, earlier.

    Returns:
        Scalar in [0, 1], float64; NaN if any logit is NaN.

    Raises:
        ValueError: if the shapes differ, or the logits are no matrix or empty.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import prediction_churn
        >>> prediction_churn(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    logits, previous_logits = _matrix("logits", logits), _matrix("previous_logits", previous_logits)
    if logits.shape != previous_logits.shape:
        raise ValueError(
            f"logits and previous_logits must have one shape, got {tuple(logits.shape)} and {tuple(previous_logits.shape)}"
        )
    if logits.isnan().any() or previous_logits.isnan().any():
        return logits.new_tensor(torch.nan)
    return (logits.argmax(-1) != previous_logits.argmax(-1)).to(logits.dtype).mean()


def _matrix(name: str, matrix: Tensor) -> Tensor:
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"{name} must be a matrix that isn't empty, got the shape {tuple(matrix.shape)}")
    if matrix.is_complex():
        raise ValueError(f"{name} must be real, got {matrix.dtype}")
    return to_double(matrix)
