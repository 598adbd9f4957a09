"""Spectral entropy and effective rank of a weight matrix, from its singular values in double precision.

Singular values are the expensive part. A Gram matrix has them at a fraction of the price of an SVD, but squares the
condition number: what lies below ``sqrt(eps)`` of the largest singular value drowns in rounding, and grokking ends in
low-rank matrices, where everything but a few values lies there. :func:`singular_values` takes the Gram matrix only
where its smallest eigenvalue is resolved, and of a low rank only what is left when the dominant subspace is split off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grok_callbacks.functional._common import entropy, to_double

# Rows per column from which the fast routes are tried: below it they gain little where they work and cost most where
# they don't.
_TALL = 3
# Multiplications of a Gram matrix below which the routes' fixed costs are no longer small beside what they save.
_WORTH_WHILE = 100_000_000
# Smallest eigenvalue of a Gram matrix, relative to the largest, that is trusted. Rounding moves an eigenvalue by a few
# eps of the largest, so that a singular value at this limit is off by some 1e-11 of the largest, larger ones by less.
_RESOLVED = 1e-10
# Eigenvalues of a sample's Gram matrix, relative to its diagonal, that count towards its rank.
_RANK = 1e-12
# Share of the matrix (its Frobenius norm) that may be left when the dominant directions are split off, for the rest to
# be measured in single precision: the rest's values are then wrong by less than 1e-3 of its norm, 1e-10 of the whole.
_REST = 1e-7
# Norm of the coupling between the dominant directions and the rest that is neglected, relative to the whole.
_COUPLING = 1e-11
# Columns per dimension of a rank worth splitting off: a higher one costs as much as it saves.
_LOW_RANK = 8
# Largest entry of matrices whose squares neither overflow nor vanish in double precision; any in a lower one is.
_SAFE_RANGE = (1e-100, 1e100)
# Entries converted to double precision at a time.
_CHUNK = 2**19


def flatten_matrix(weight: Tensor) -> Tensor:
    r"""A weight as the matrix whose spectrum is meant: ``(out, in)`` as it is, convolutions as ``(out, in * k)``.

    Args:
        weight: At least two dimensions, the first of which counts the outputs.

    Returns:
        A two-dimensional view of ``weight`` where its layout allows one.

    Raises:
        ValueError: If ``weight`` has fewer than two dimensions (a bias has no spectrum) or is complex.

    Example:
        >>> flatten_matrix(torch.zeros(16, 3, 5, 5)).shape
        torch.Size([16, 75])
    """
    if weight.ndim < 2:
        raise ValueError(f"weight must have at least two dimensions, got shape {tuple(weight.shape)}")
    if weight.is_complex():
        raise ValueError("weight must be real, got a complex tensor")
    return weight.flatten(start_dim=1)


def singular_values(matrix: Tensor) -> Tensor:
    r"""Singular values of a matrix in float64, largest first, as ``torch.linalg.svdvals`` of the float64 matrix.

    They agree with it to well below 1e-6 of the largest singular value, and so do their entropies. Not differentiable: the
    result is detached.

    Args:
        matrix: ``(m, n)``, any real dtype.

    Returns:
        ``(min(m, n),)`` float64 singular values in descending order; all NaN if ``matrix`` holds a NaN or an infinity.

    Raises:
        ValueError: If ``matrix`` is not a real matrix of at least one row and one column.

    Cost:
        One float64 ``svdvals``, of the transpose for a wide matrix. Where one side is at least three times the other,
        and the matrix not small, the Gram matrix of the smaller side (``m n^2`` for ``m > n``, by blocks of its lower
        triangle) and its eigenvalues (``4/3 n^3``) instead, about half as much; likewise for a rank of ``n / 8`` or
        less. A rank or a decay in between takes ``svdvals`` and some percent for finding that out.

    Example:
        >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]])).round(decimals=6)
        tensor([4., 3.], dtype=torch.float64)
    """
    if matrix.ndim != 2 or matrix.numel() == 0 or matrix.is_complex():
        raise ValueError(f"matrix must be real, (m, n) and not empty, got {matrix.dtype} of shape {tuple(matrix.shape)}")
    tall = matrix.detach() if matrix.is_floating_point() else to_double(matrix)
    # LAPACK is slower on wide matrices, and below rows are never fewer than columns.
    tall = tall if tall.shape[0] >= tall.shape[1] else tall.T
    # LAPACK complains of what is not finite on standard output. The sum tells in one pass, unless it overflows.
    if not math.isfinite(float(tall.sum())) and not tall.isfinite().all():
        return to_double(tall).new_full((tall.shape[1],), torch.nan)
    values = _fast_singular_values(tall)
    return torch.linalg.svdvals(to_double(tall)) if values is None else values


def spectrum_entropy(singular_values: Tensor) -> Tensor:
    r"""Entropy in nats of a spectrum: :math:`-\sum_i p_i \ln p_i` with :math:`p_i = s_i / \sum_j s_j`.

    The second half of :func:`spectral_entropy`, for whoever has the singular values already.

    Args:
        singular_values: ``(..., r)`` non-negative values, in any order and at any scale.

    Returns:
        ``(...)`` entropies between 0 and ``ln r``; NaN for a spectrum of zeros, which is no distribution.

    Example:
        >>> spectrum_entropy(torch.tensor([2.0, 2.0, 0.0]))
        tensor(0.6931, dtype=torch.float64)
    """
    values = to_double(singular_values)
    return entropy(values / values.sum(-1, keepdim=True))


def spectral_entropy(matrix: Tensor) -> Tensor:
    r"""Entropy in nats of a matrix's normalised singular values.

    .. math:: H(W) = -\sum_i p_i \ln p_i, \qquad p_i = \frac{s_i}{\sum_j s_j}

    with the singular values themselves, not their squares. It is 0 for rank one, :math:`\ln r` for ``r`` equal
    singular values, and blind to scale, rotation and transposition.

    Args:
        matrix: ``(m, n)``, any real dtype; see :func:`flatten_matrix` for convolutions.

    Returns:
        Scalar float64 between 0 and ``ln min(m, n)``. NaN for a matrix of zeros, whose singular values are no
        distribution, and for one that holds a NaN or an infinity.

    Raises:
        ValueError: If ``matrix`` is not a real matrix of at least one row and one column.

    Cost:
        One :func:`singular_values`.

    Source:
        DeMoss et al., "The Complexity Dynamics of Grokking" (2024), arXiv 2412.09810.

    Example:
        >>> spectral_entropy(torch.eye(2))
        tensor(0.6931, dtype=torch.float64)
    """
    return spectrum_entropy(singular_values(matrix))


def effective_rank(matrix: Tensor) -> Tensor:
    r"""Number of equal singular values with the same entropy: :math:`e^{H(W)}` of :func:`spectral_entropy`.

    Args:
        matrix: ``(m, n)``, any real dtype; see :func:`flatten_matrix` for convolutions.

    Returns:
        Scalar float64 between 1 and ``min(m, n)``; NaN where the spectral entropy is.

    Raises:
        ValueError: If ``matrix`` is not a real matrix of at least one row and one column.

    Cost:
        One :func:`singular_values`.

    Source:
        Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007).

    Example:
        >>> effective_rank(torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 7.0))).round(decimals=6)
        tensor(1., dtype=torch.float64)
    """
    return spectral_entropy(matrix).exp()


def _fast_singular_values(tall: Tensor) -> Tensor | None:
    """Singular values by a Gram matrix, of the whole or of what a low rank leaves; None where neither is worth while.

    A sample of the rows tells which route to try, for a few percent of the whole: to try in vain costs more. An unusual
    sample costs time, not accuracy.
    """
    rows, columns = tall.shape
    if rows < _TALL * columns or rows * columns**2 < _WORTH_WHILE:
        return None
    if tall.dtype == torch.float64 and not _SAFE_RANGE[0] < _largest(tall) < _SAFE_RANGE[1]:
        return None
    size = min(2 * columns, rows // 6)
    stride = rows // size
    sample = to_double(tall[stride // 2 :: stride][:size])
    gram = sample.new_zeros(min(size, columns), min(size, columns))
    _add_lower_gram(gram, sample.T if size < columns else sample)
    gram.diagonal().mul_(1 - _RANK * len(gram))
    # The order of the first minor that is not positive, one more than the rank; 0 if there is none.
    singular_minor = int(torch.linalg.cholesky_ex(gram).info)
    if singular_minor == 0:
        return _by_gram(tall)
    rank = singular_minor - 1
    if rank > columns // _LOW_RANK:
        return None
    directions = _dominant_directions(sample, rank)
    return None if directions is None else _by_splitting(tall, directions)


def _dominant_directions(sample: Tensor, rank: int) -> Tensor | None:
    """Orthonormal basis ``(n, r)`` of the space that all rows of the sample lie in, or None if the first don't span it."""
    some = sample[: 2 * rank + 8]
    eigenvalues, vectors = torch.linalg.eigh(some @ some.T)
    directions = torch.linalg.qr(some.T @ vectors[:, eigenvalues > _RANK * eigenvalues[-1]]).Q
    rest = torch.addmm(sample, sample @ directions, directions.T, alpha=-1)
    spanned = torch.linalg.vector_norm(rest) < _REST * torch.linalg.vector_norm(sample)
    return directions if spanned else None


def _by_gram(tall: Tensor) -> Tensor | None:
    """Roots of the eigenvalues of ``A^T A``, or None where the smallest of them is not resolved."""
    columns = tall.shape[1]
    gram = to_double(tall.new_zeros(())).new_zeros(columns, columns)
    for chunk in torch.split(tall, _chunk_rows(columns)):
        _add_lower_gram(gram, to_double(chunk))
    eigenvalues = torch.linalg.eigvalsh(gram)
    return eigenvalues.flip(0).sqrt() if eigenvalues[0] > _RESOLVED * eigenvalues[-1] else None


def _by_splitting(tall: Tensor, directions: Tensor) -> Tensor | None:
    """Singular values of a numerically low-rank matrix and of the rounding noise it leaves, or None if more is left.

    With ``V`` the directions, ``C = A V`` and ``E = A - C V^T``, and with ``Q R = C``, the matrix is
    ``Q (R V^T + Q^T E) + (I - Q Q^T) E``: two terms with orthogonal columns. Where the second one's rows are orthogonal
    to the first one's too, their singular values together are the matrix's. ``E`` is computed before it is squared, so
    that its Gram matrix is as good as ``E``. One pass over the matrix gives all the products.
    """
    columns, rank = directions.shape
    largest = _largest(tall)
    # E in units in which it is at most of order one, lest its squares vanish in single precision.
    unit = _REST * largest
    core = directions.new_zeros(rank, rank)
    precision = _precision_of_rest(tall.device)
    cross = torch.zeros(rank, columns, dtype=precision, device=tall.device)
    rest = torch.zeros(columns, columns, dtype=precision, device=tall.device)
    for chunk in torch.split(tall, _chunk_rows(columns)):
        exact = to_double(chunk)
        image = exact @ directions
        remainder = torch.addmm(exact, image, directions.T, beta=1 / unit, alpha=-1 / unit).to(precision)
        core.addmm_(image.T, image)
        cross.addmm_((image / largest).to(precision).T, remainder)
        _add_lower_gram(rest, remainder)
    factor, info = torch.linalg.cholesky_ex(core)
    if info != 0:
        return None
    coupled = torch.linalg.solve_triangular(factor / largest, to_double(cross), upper=False)
    # Before the subtraction: what is far larger than its difference leaves nothing but rounding.
    left = unit * to_double(rest).trace().sqrt()
    rest = to_double(rest.tril() + rest.tril(-1).T) - coupled.T @ coupled
    _, dominant, rows = torch.linalg.svd(factor.T @ directions.T + unit * coupled, full_matrices=False)
    whole = torch.linalg.vector_norm(dominant)
    coupling = unit * ((rows @ rest) * rows).sum().clamp(min=0).sqrt()
    if left > _REST * whole or coupling > _COUPLING * whole:
        return None
    remaining = torch.linalg.eigvalsh(rest)[rank:].clamp(min=0).sqrt() * unit
    return torch.cat([remaining, dominant]).sort(descending=True).values


def _largest(matrix: Tensor) -> float:
    """Largest magnitude."""
    lowest, highest = matrix.aminmax()
    return max(-float(lowest), float(highest))


def _precision_of_rest(device: torch.device) -> torch.dtype:
    """Single where its products are of single precision, not of the fewer bits that a user may allow (TF32, bfloat16)."""
    try:
        exact = device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set per backend, for which there is no one answer
        exact = False
    return torch.float32 if exact else torch.float64


def _add_lower_gram(gram: Tensor, matrix: Tensor) -> None:
    """Add ``matrix.T @ matrix`` to the lower triangle of ``gram``, by stripes that skip most of the upper one."""
    columns = matrix.shape[1]
    width = max(32, columns // 8)
    for start in range(0, columns, width):
        stop = start + width
        gram[start:stop, :stop].addmm_(matrix[:, start:stop].T, matrix[:, :stop])


def _chunk_rows(columns: int) -> int:
    return max(4 * columns, _CHUNK // columns)
