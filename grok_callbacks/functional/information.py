"""Information in representations: entropies of Gram matrices, and how steeply outputs depend on inputs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grok_callbacks.functional._common import entropy, to_double

_CHUNK_ELEMENTS = 2**22
"""Elements of a Khatri-Rao product held at a time (32 MiB in float64)."""

_NEGATIVE_TOLERANCE = 1e-3
"""Share of the trace by which an eigenvalue may be negative before the matrix counts as not positive semi-definite."""


def gram_matrix(features: Tensor) -> Tensor:
    r"""Matrix of cosine similarities :math:`G = Z Z^\top`, where :math:`Z` has the rows of ``features`` at unit length.

    A row of zeros has no direction; our choice: zero rows are alike (similarity 1 with each other) and unlike any other
    row (similarity 0). So the diagonal is 1 always, G stays positive semi-definite, and features that are zero
    everywhere carry no information, like any other constant features.

    Args:
        features: ``(n, ...)``, one sample per row; further dimensions are flattened.

    Returns:
        ``(n, n)`` in float64, symmetric, with unit diagonal. NaN in rows and columns of samples with a NaN or infinite
        feature.

    Raises:
        ValueError: If ``features`` has no samples or no features.

    Cost: :math:`O(n^2 d)`.

    Source: Tan & Huang 2023, "Understanding Grokking Through A Robustness Viewpoint", arXiv 2311.06597.

    Example:
        >>> import torch
        >>> gram_matrix(torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
        tensor([[1.0000, 0.7071, 0.0000],
                [0.7071, 1.0000, 0.0000],
                [0.0000, 0.0000, 1.0000]], dtype=torch.float64)
    """
    rows = directions(features)
    gram = rows @ rows.T
    # Rounding leaves the squared length of a unit vector off by an ulp; a spoilt row keeps its NaN.
    diagonal = gram.diagonal()
    diagonal.copy_(torch.where(diagonal.isnan(), diagonal, torch.ones_like(diagonal)))
    return gram


def matrix_entropy(gram: Tensor, alpha: float = 1.0) -> Tensor:
    r"""Rényi entropy of a positive semi-definite matrix, scaled to unit trace.

    .. math:: H_1(R) = -\mathrm{tr}\Big(\frac{R}{n} \ln \frac{R}{n}\Big), \qquad
        H_\alpha(R) = \frac{1}{1 - \alpha} \ln \mathrm{tr}\Big(\big(\frac{R}{n}\big)^\alpha\Big)

    The trace of an ``(n, n)`` Gram matrix with unit diagonal is n; other matrices are divided by their trace, so that
    this is also the entropy of a second-moment matrix :math:`Z^\top Z`, which equals that of :math:`Z Z^\top`.
    Continuous in :math:`\alpha`, at 1 too; 0 gives the logarithm of the rank and infinity minus that of the largest
    share.

    Args:
        gram: ``(n, n)``, symmetric and positive semi-definite.
        alpha: Order, at least 0.

    Returns:
        Nats, in :math:`[0, \ln n]`: 0 for a matrix of ones, :math:`\ln n` for the identity. NaN for a matrix with a NaN
        or infinite entry, and for a zero matrix.

    Raises:
        ValueError: If ``gram`` is not square, symmetric or positive semi-definite (beyond rounding), or ``alpha`` is
            negative or NaN.

    Cost: the eigenvalues of an (n, n) matrix, :math:`O(n^3)`; see :func:`feature_entropy` where there are fewer
    features than samples.

    Source: Tan & Huang 2023, arXiv 2311.06597; Sanchez Giraldo, Rao & Principe 2015, arXiv 1211.2459.

    Example:
        >>> import torch
        >>> matrix_entropy(torch.eye(4)), matrix_entropy(torch.ones(4, 4), alpha=2.0)
        (tensor(1.3863, dtype=torch.float64), tensor(0., dtype=torch.float64))
    """
    check_alpha(alpha)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.numel() == 0:
        raise ValueError(f"gram must be a non-empty square matrix, got the shape {tuple(gram.shape)}.")
    if gram.is_complex():
        raise ValueError(f"gram must be real, got {gram.dtype}.")
    matrix = to_double(gram)
    trace = matrix.trace()
    # An eigensolver raises on NaN, and a matrix without a trace has no scale.
    if not bool(torch.isfinite(matrix).all()) or not bool(matrix.any()):
        return torch.full_like(trace, torch.nan)
    _check_symmetric(matrix)
    return _renyi_entropy(_eigenvalue_shares(matrix), alpha)


def matrix_mutual_information(gram1: Tensor, gram2: Tensor, alpha: float = 1.0) -> Tensor:
    r"""Mutual information of two representations of the same samples, from their Gram matrices.

    .. math:: I_\alpha(R_1; R_2) = H_\alpha(R_1) + H_\alpha(R_2) - H_\alpha(R_1 \circ R_2)

    with the elementwise product :math:`\circ` and :func:`matrix_entropy` :math:`H_\alpha`. At :math:`\alpha = 1` it is
    not negative; at other orders it can be.

    Args:
        gram1: ``(n, n)`` Gram matrix with unit diagonal.
        gram2: ``(n, n)`` Gram matrix with unit diagonal of the same samples in the same order.
        alpha: Order, at least 0.

    Returns:
        Nats. NaN if a matrix has a NaN or infinite entry.

    Raises:
        ValueError: If a matrix is not square, symmetric or positive semi-definite, their shapes differ, or ``alpha`` is
            negative or NaN.

    Cost: the eigenvalues of three (n, n) matrices, :math:`O(n^3)`.

    Source: Tan & Huang 2023, arXiv 2311.06597.

    Example:
        >>> import torch
        >>> gram = gram_matrix(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        >>> matrix_mutual_information(torch.eye(3), gram) - matrix_entropy(gram)
        tensor(0., dtype=torch.float64)
    """
    if gram1.shape != gram2.shape:
        raise ValueError(f"gram1 and gram2 must have one shape, got {tuple(gram1.shape)} and {tuple(gram2.shape)}.")
    marginals = matrix_entropy(gram1, alpha) + matrix_entropy(gram2, alpha)
    return marginals - matrix_entropy(to_double(gram1) * to_double(gram2), alpha)


def feature_entropy(features: Tensor, alpha: float = 1.0) -> Tensor:
    r""":func:`matrix_entropy` of :func:`gram_matrix` of the features, in whichever dimension is smaller.

    With rows at unit length in :math:`Z`, the matrices :math:`Z Z^\top / n` and :math:`Z^\top Z / n` have the same
    eigenvalues but for zeros, hence the same entropy.

    Args:
        features: ``(n, ...)``, one sample per row; further dimensions are flattened.
        alpha: Order, at least 0.

    Returns:
        Nats, in :math:`[0, \ln \min(n, d + 1)]`, 0 for one sample. NaN if a feature is NaN or infinite.

    Raises:
        ValueError: If ``features`` has no samples or no features, or ``alpha`` is negative or NaN.

    Cost: :math:`O(n d \min(n, d) + \min(n, d)^3)`.

    Source: Tan & Huang 2023, arXiv 2311.06597.

    Example:
        >>> import torch
        >>> features = torch.eye(3).repeat(1000, 1)
        >>> feature_entropy(features)
        tensor(1.0986, dtype=torch.float64)
    """
    return matrix_entropy(_smaller_moment(directions(features)), alpha)


def feature_mutual_information(features1: Tensor, features2: Tensor, alpha: float = 1.0) -> Tensor:
    r""":func:`matrix_mutual_information` of two sets of features, each term in whichever dimension is smaller.

    The elementwise product of two Gram matrices is the Gram matrix of the row-wise Khatri-Rao product, whose rows are
    the outer products of the two features' rows: its other side has :math:`d_1 d_2` dimensions, and is used where that
    is fewer than n.

    Args:
        features1: ``(n, ...)``, one sample per row; further dimensions are flattened.
        features2: ``(n, ...)`` of the same samples in the same order.
        alpha: Order, at least 0.

    Returns:
        Nats. NaN if a feature is NaN or infinite.

    Raises:
        ValueError: If the numbers of samples differ, there are no samples or no features, or ``alpha`` is negative or
            NaN.

    Cost: with :math:`m = \min(n, d_1 d_2)`, :math:`O(n m (d_1 + d_2) + n m^2 + m^3)` at most.

    Source: Tan & Huang 2023, arXiv 2311.06597.

    Example:
        >>> import torch
        >>> features = torch.eye(3).repeat(1000, 1)
        >>> feature_mutual_information(features, features.flip(1))
        tensor(1.0986, dtype=torch.float64)
    """
    rows1, rows2 = directions(features1), directions(features2)
    if len(rows1) != len(rows2):
        raise ValueError(f"features1 and features2 must have as many rows, got {len(rows1)} and {len(rows2)}.")
    moment1, moment2 = _smaller_moment(rows1), _smaller_moment(rows2)
    joint = _joint_moment(rows1, moment1, rows2, moment2)
    return matrix_entropy(moment1, alpha) + matrix_entropy(moment2, alpha) - matrix_entropy(joint, alpha)


class InputGradient(NamedTuple):
    """What :func:`mean_squared_input_gradient` returns."""

    mean: Tensor
    """Mean squared gradient."""
    standard_error: Tensor
    """Standard error of ``mean`` over the random probes: 0 without probes, NaN for a single one."""


def mean_squared_input_gradient(outputs: Tensor, inputs: Tensor, num_probes: int | None = None, seed: int = 0) -> InputGradient:
    r"""Mean squared gradient of a network's outputs with respect to its inputs, or to an embedding.

    .. math:: \frac{1}{n K} \sum_{i=1}^{n} \sum_{k=1}^{K} \Big\| \frac{\partial y_{ik}}{\partial x_i} \Big\|_2^2

    over samples i and outputs k. Exactly, by one backward pass per output; or estimated without bias by Hutchinson's
    method: for random signs :math:`v`, :math:`\mathbb{E} \|v^\top J\|^2 = \|J\|_F^2`, one backward pass per probe.

    Args:
        outputs: ``(n, ...)``, computed from ``inputs`` with a graph; K is the number of outputs of one sample.
        inputs: ``(n, ...)`` that require a gradient. The exact form takes for granted that a sample's outputs depend on
            that sample's inputs alone (a network in evaluation mode); the estimate holds without, and then counts
            dependence across samples too.
        num_probes: Number of random probes; None for the exact value.
        seed: Seed of the probes; the global random state is left alone.

    Returns:
        The mean in float64, and its standard error over probes.

    Raises:
        ValueError: If there are no samples, their numbers differ, ``num_probes`` is less than 1, ``inputs`` do not
            require a gradient or ``outputs`` have no graph. Outputs that have a graph but do not depend on the inputs
            give 0.

    Cost: K backward passes, or ``num_probes``.

    Source: the quantity that Lemma 3.1 of Tan & Huang 2023, arXiv 2311.06597, bounds by squared weight norm times
    sharpness. Estimator: Hutchinson 1989.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
        >>> inputs = torch.randn(5, 2, requires_grad=True)
        >>> mean_squared_input_gradient(inputs @ weight.T, inputs).mean  # 15 / 3
        tensor(5., dtype=torch.float64)
    """
    if outputs.numel() == 0 or inputs.ndim == 0 or outputs.ndim == 0 or len(outputs) != len(inputs):
        shapes = f"{tuple(outputs.shape)} and {tuple(inputs.shape)}"
        raise ValueError(f"outputs and inputs must have as many samples, at least one, got the shapes {shapes}.")
    if not inputs.requires_grad:
        raise ValueError("inputs must require a gradient.")
    if not outputs.requires_grad:
        raise ValueError("outputs must be computed from inputs with gradients enabled.")
    if num_probes is None:
        each_output = outputs.reshape(len(outputs), -1).sum(0).unbind()
        total = torch.stack([_squared_gradient(output, inputs) for output in each_output]).sum()
        return InputGradient(total / outputs.numel(), torch.zeros_like(total))
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}.")
    generator = torch.Generator().manual_seed(seed)
    estimates = (
        torch.stack([_squared_gradient(outputs, inputs, _signs(outputs, generator)) for _ in range(num_probes)])
        / outputs.numel()
    )
    # One probe has no spread to estimate an error from (and `std` would warn).
    spread = estimates.std() if num_probes > 1 else torch.full_like(estimates[0], torch.nan)
    return InputGradient(estimates.mean(), spread / math.sqrt(num_probes))


def directions(features: Tensor) -> Tensor:
    """Rows at unit length in float64, ``(n, d + 1)``: the last column is 1 for rows of zeros, and 0 otherwise."""
    if features.ndim == 0 or features.numel() == 0:
        raise ValueError(f"features must have at least one sample and one feature, got {tuple(features.shape)}.")
    if features.is_complex():
        raise ValueError(f"features must be real, got {features.dtype}.")
    rows = to_double(features).reshape(len(features), -1)
    # Relative to its largest entry no row's squares leave the range of a float.
    largest = rows.abs().amax(1, keepdim=True)
    silent = largest == 0
    rows = rows / torch.where(silent, torch.ones_like(largest), largest)
    rows = torch.cat([rows, silent.to(rows.dtype)], 1)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths


def check_alpha(alpha: float) -> None:
    """Raise ``ValueError`` unless ``alpha`` is an order of a Rényi entropy."""
    if not alpha >= 0:
        raise ValueError(f"alpha must be at least 0, got {alpha}.")


def _check_symmetric(matrix: Tensor) -> None:
    if (matrix - matrix.T).abs().max() > _NEGATIVE_TOLERANCE * matrix.abs().max():
        raise ValueError("gram must be symmetric.")


def _eigenvalue_shares(matrix: Tensor) -> Tensor:
    """Eigenvalues of a PSD matrix over their sum, with those that can't be told from rounding set to zero."""
    eigenvalues = torch.linalg.eigvalsh(matrix)
    largest = eigenvalues[-1]
    if eigenvalues[0] < -_NEGATIVE_TOLERANCE * eigenvalues.abs().sum():
        raise ValueError("gram must be positive semi-definite.")
    # Orders below 1 weigh small eigenvalues heavily: left in, the rounding noise of a low-rank matrix would drown them.
    noise = len(matrix) * torch.finfo(matrix.dtype).eps * largest
    kept = torch.where(eigenvalues > noise, eigenvalues, torch.zeros_like(eigenvalues))
    return kept / kept.sum()


def _renyi_entropy(shares: Tensor, alpha: float) -> Tensor:
    """Rényi entropy of a probability vector, in nats."""
    if alpha == 1:
        return entropy(shares)
    positive = shares[shares > 0]
    if math.isinf(alpha):
        result = -positive.max().log()
    elif abs(alpha - 1) < 0.5:
        # sum p^a = 1 + sum p (p^(a-1) - 1): in this form the division by 1 - a amplifies no rounding as a nears 1.
        excess = (positive * torch.expm1((alpha - 1) * positive.log())).sum()
        result = torch.log1p(excess) / (1 - alpha)
    else:
        result = torch.logsumexp(alpha * positive.log(), 0) / (1 - alpha)
    # Rounding, and not minus zero.
    return result.clamp(min=0) + 0.0


def _smaller_moment(rows: Tensor) -> Tensor:
    """``rows @ rows.T`` or ``rows.T @ rows``, whichever is smaller: their entropies are equal."""
    return rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows


def _gram(rows: Tensor, smaller: Tensor) -> Tensor:
    return smaller if rows.shape[0] <= rows.shape[1] else rows @ rows.T


def _joint_moment(rows1: Tensor, moment1: Tensor, rows2: Tensor, moment2: Tensor) -> Tensor:
    """Elementwise product of both Gram matrices, or the smaller second moment of the Khatri-Rao product.

    ``moment1`` and ``moment2`` are the rows' smaller ones, which may be their Gram matrices.
    """
    samples = len(rows1)
    # The column that marks zero rows is mostly empty, and would cost (d1 + 1)(d2 + 1) dimensions instead of d1 d2.
    kept1, kept2 = (rows if rows[:, -1].any() else rows[:, :-1] for rows in (rows1, rows2))
    dimension = kept1.shape[1] * kept2.shape[1]
    if samples <= dimension:
        return _gram(rows1, moment1) * _gram(rows2, moment2)
    rows1, rows2 = kept1, kept2
    moment = rows1.new_zeros(dimension, dimension)
    at_once = max(1, _CHUNK_ELEMENTS // dimension)
    for start in range(0, samples, at_once):
        part = slice(start, start + at_once)
        products = (rows1[part, :, None] * rows2[part, None, :]).flatten(1)
        moment.addmm_(products.T, products)
    return moment


def _signs(outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs like ``outputs``, drawn on the CPU so that a device does not change them."""
    return (2 * torch.randint(2, outputs.shape, generator=generator) - 1).to(outputs)


def _squared_gradient(output: Tensor, inputs: Tensor, cotangent: Tensor | None = None) -> Tensor:
    """Squared norm of the gradient of ``output`` (times ``cotangent``) with respect to all inputs, in float64."""
    (gradient,) = torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True)
    return to_double(gradient).square().sum()
