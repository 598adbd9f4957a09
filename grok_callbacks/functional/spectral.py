"""Spectral entropy and effective rank of a weight matrix, from its singular values in double precision.

Singular values are the expensive part. A Gram matrix has them at a fraction of the price of an SVD, but squares the
condition number: what lies below ``sqrt(eps)`` of the largest singular value drowns in rounding, and grokking ends in
low-rank matrices, where everything but a few values lies there. :func:`singular_values` takes the Gram matrix only
where its smallest eigenvalue is resolved; otherwise only of what is left when the dominant subspace is split off.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grok_callbacks.functional._common import entropy, to_double

# Rows per column from which the fast routes are tried: below it they gain little where they work and cost most where
# they don't.
_TALL = 3
# Multiplications of a Gram matrix below which a route's fixed costs are no longer small beside what it saves: for one
# pass over the matrix, and for two.
_WORTH_WHILE = 10_000_000
_WORTH_TWO_PASSES = 30_000_000
# Rows per column from which an unresolved Gram matrix's eigenvectors, and a second Gram matrix, cost less than an SVD.
_VERY_TALL = 32
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
# Whether torch multiplies by MKL on the CPU.
_HAS_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


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
        and the matrix not small, the Gram matrix of the smaller side (``m n^2`` for ``m > n``) and its eigenvalues
        (``4/3 n^3``) instead, about half as much; likewise for a rank of ``n / 8`` or less. A rank or a decay in
        between takes ``svdvals`` and some percent for finding that out, or with ``m`` at least ``32 n`` the Gram
        matrix's eigenvectors and a second Gram matrix. Where torch multiplies by MKL, NumPy's BLAS forms the products
        on the CPU; its threads are set by ``OPENBLAS_NUM_THREADS`` or ``OMP_NUM_THREADS``, not by
        ``torch.set_num_threads``.

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
    return _exact_singular_values(tall) if values is None else values


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
    size = min(2 * columns, rows // 7)
    stride = rows // size
    sample = to_double(tall[stride // 2 :: stride][:size])
    gram = _product(sample, sample.T) if size < columns else _product(sample.T, sample)
    gram.diagonal().mul_(1 - _RANK * len(gram))
    # The order of the first minor that is not positive, one more than the rank; 0 if there is none.
    singular_minor = int(torch.linalg.cholesky_ex(gram).info)
    rank = singular_minor - 1 if singular_minor else columns
    values = None
    if rank <= columns // _LOW_RANK:
        directions = _dominant_directions(sample, rank)
        values = None if directions is None else _by_splitting(tall, directions, _largest(sample))
    if values is None and (rank == columns or _worth_two_passes(tall)):
        values = _by_gram(tall)
    return values


def _exact_singular_values(tall: Tensor) -> Tensor:
    """By an SVD in double precision; of ``R`` alone for ``A = Q R`` with many rows, as LAPACK does it, with less copying."""
    exact = to_double(tall)
    if tall.shape[0] >= _TALL * tall.shape[1]:
        exact = torch.linalg.qr(exact, mode="r").R
    values: Tensor
    if _uses_numpy(exact):
        values = torch.from_numpy(np.linalg.svd(exact.numpy(), compute_uv=False))
    else:
        values = torch.linalg.svdvals(exact)
    return values


def _worth_two_passes(tall: Tensor) -> bool:
    rows, columns = tall.shape
    return rows >= _VERY_TALL * columns and rows * columns**2 >= _WORTH_TWO_PASSES


def _dominant_directions(sample: Tensor, rank: int) -> Tensor | None:
    """Orthonormal basis ``(n, r)`` of the space that all rows of the sample lie in, or None if the first don't span it."""
    some = sample[: 2 * rank + 8]
    eigenvalues, vectors = torch.linalg.eigh(_product(some, some.T))
    directions = torch.linalg.qr(_product(some.T, vectors[:, eigenvalues > _RANK * eigenvalues[-1]])).Q
    rest = sample - _product(_product(sample, directions), directions.T)
    spanned = torch.linalg.vector_norm(rest) < _REST * torch.linalg.vector_norm(sample)
    return directions if spanned else None


def _by_gram(tall: Tensor) -> Tensor | None:
    """Roots of the eigenvalues of ``A^T A``, those not resolved measured anew; None where that is not worth while.

    With ``V`` the eigenvectors of the unresolved ones, ``A V`` has the singular values that are left, and is at most
    1e-5 of ``A``: the error of its Gram matrix is as much smaller, and what it doesn't resolve either is below 1e-12.
    """
    gram = _gram(tall)
    eigenvalues = _eigenvalues(gram)
    unresolved = int((eigenvalues <= _RESOLVED * eigenvalues[-1]).sum())
    if unresolved == 0:
        return torch.sqrt(eigenvalues.flip(0))
    if not _worth_two_passes(tall):
        return None
    vectors = torch.linalg.eigh(gram).eigenvectors[:, :unresolved]
    remaining = _eigenvalues(_gram(tall, vectors)).clamp(min=0)
    values: Tensor = torch.cat([remaining, eigenvalues[unresolved:]]).sqrt().sort(descending=True).values
    return values


def _gram(tall: Tensor, basis: Tensor | None = None) -> Tensor:
    """``A^T A`` or, in the coordinates of a basis ``V``, ``(A V)^T (A V)``, in double precision."""
    columns = tall.shape[1] if basis is None else basis.shape[1]
    gram = to_double(tall.new_zeros(())).new_zeros(columns, columns)
    for chunk in torch.split(tall, _chunk_rows(tall.shape[1])):
        image = to_double(chunk)
        image = image if basis is None else _product(image, basis)
        gram += _product(image.T, image)
    return gram


def _by_splitting(tall: Tensor, directions: Tensor, scale: float) -> Tensor | None:
    """Singular values of a numerically low-rank matrix and of the rounding noise it leaves, or None if more is left.

    With ``V`` the directions, ``C = A V`` and ``E = A - C V^T``, and with ``Q R = C``, the matrix is
    ``Q (R V^T + Q^T E) + (I - Q Q^T) E``: two terms with orthogonal columns. Where the second one's rows are orthogonal
    to the first one's too, their singular values together are the matrix's. ``E`` is computed before it is squared, so
    that its Gram matrix is as good as ``E``. One pass over the matrix gives all the products. ``scale`` is about the
    matrix's largest entry, the unit of ``C``.
    """
    columns, rank = directions.shape
    # E in units in which it is at most of order one, lest its squares vanish in single precision.
    unit = _REST * scale
    precision = torch.float32 if _uses_numpy(tall) else torch.float64
    core = directions.new_zeros(rank, rank)
    pairs = torch.zeros(columns + rank, columns + rank, dtype=precision, device=tall.device)
    project, back = directions / scale, directions.T / -_REST
    for chunk in torch.split(tall, _chunk_rows(columns)):
        exact = to_double(chunk)
        image = _product(exact, project)
        core += _product(image.T, image)
        # E and C side by side, so that one product gives E^T E and C^T E.
        both = torch.empty(len(chunk), columns + rank, dtype=precision, device=tall.device)
        both[:, :columns] = _product(image, back).add_(exact, alpha=1 / unit)
        both[:, columns:] = image
        pairs += _product(both.T, both)
    factor, info = torch.linalg.cholesky_ex(core)
    if info != 0:
        return None
    pairs = to_double(pairs)
    coupled = torch.linalg.solve_triangular(factor, pairs[columns:, :columns], upper=False)
    # Before the subtraction: what is far larger than its difference leaves nothing but rounding.
    rest = pairs[:columns, :columns]
    left = _REST * math.sqrt(rest.trace())
    rest = rest - _product(coupled.T, coupled)
    _, dominant, rows = torch.linalg.svd(factor.T @ directions.T + _REST * coupled, full_matrices=False)
    whole = float(torch.linalg.vector_norm(dominant))
    coupling = _REST * math.sqrt(max(0.0, float(((rows @ rest) * rows).sum())))
    if not (left < _REST * whole and coupling < _COUPLING * whole):
        return None
    remaining = _eigenvalues(rest)[rank:].clamp(min=0).sqrt()
    return torch.cat([remaining * unit, dominant * scale]).sort(descending=True).values


def _eigenvalues(gram: Tensor) -> Tensor:
    """Eigenvalues of a symmetric matrix, smallest first; NumPy's LAPACK is faster for the reason its BLAS is."""
    return torch.from_numpy(np.linalg.eigvalsh(gram.numpy())) if _uses_numpy(gram) else torch.linalg.eigvalsh(gram)


def _largest(matrix: Tensor) -> float:
    """Largest magnitude."""
    lowest, highest = matrix.aminmax()
    return max(-float(lowest), float(highest))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, on the CPU by NumPy's BLAS rather than by MKL.

    MKL is slow on other makers' processors, and torch computes both triangles of ``A^T A``, NumPy one. Nor does NumPy
    take the fewer bits that a user may allow torch's products (autocast, TF32).
    """
    if not _uses_numpy(left):
        return left @ right
    return torch.from_numpy(_blas_array(left) @ _blas_array(right))


def _uses_numpy(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and _HAS_MKL


def _blas_array(matrix: Tensor) -> Any:
    """As an array, copied where BLAS would not take its strides and NumPy multiply entry by entry."""
    dense = matrix.stride(1) == 1 or matrix.stride(0) == 1
    return (matrix if dense and 0 not in matrix.stride() else matrix.contiguous()).numpy(force=True)


def _chunk_rows(columns: int) -> int:
    return max(4 * columns, _CHUNK // columns)
