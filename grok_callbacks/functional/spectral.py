"""Spectral entropy and effective rank of a weight matrix, from its singular values in double precision.

Singular values are the expensive part. A Gram matrix has them at a fraction of the price of an SVD, but squares the
condition number: what lies below ``sqrt(eps)`` of the largest singular value drowns in rounding, and grokking ends in
low-rank matrices, where everything but a few values lies there. :func:`singular_values` takes the Gram matrix only
where its smallest eigenvalue is resolved; otherwise only of what is left when the dominant subspace is split off.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grok_callbacks.functional._common import entropy, to_double

_Array: TypeAlias = npt.NDArray[np.float64]

# Rows per column from which the fast routes are tried: below it they gain little where they work and cost most where
# they don't.
_TALL = 3
# Multiplications of a Gram matrix below which a route's fixed costs are no longer small beside what it saves.
_WORTH_WHILE = 10_000_000
# Rows per column from which an unresolved Gram matrix's eigenvectors, and a second Gram matrix, cost less than an SVD.
_VERY_TALL = 32
# Smallest eigenvalue of a Gram matrix, relative to the largest, that is trusted. Rounding moves an eigenvalue by a few
# eps of the largest, so that a singular value at this limit is off by some 1e-11 of the largest, larger ones by less.
_RESOLVED = 1e-10
# Eigenvalues of a sample's Gram matrix, relative to its diagonal, that count towards its rank.
_RANK = 1e-12
# Share of the matrix (its Frobenius norm) that may be left when the dominant directions are split off, for the rest to
# be measured in single precision: the rest's values are then wrong by less than 1e-3 of its norm, 3e-10 of the whole.
_REST = 3e-7
# What the coupling between the dominant directions and the rest may move a singular value by, relative to the whole.
_COUPLING = 1e-11
# Norms of matrices the squares of whose rest neither overflow nor vanish in single precision.
_SAFE_SINGLE = (1e-8, 1e15)
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
        between takes an SVD and some percent for finding that out, or with ``m`` at least ``32 n`` the Gram
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
    # So few rows that a rank worth splitting off does not reach their number.
    directions = _few_directions(_sample(tall, 2 * (columns // _LOW_RANK) + 8), columns // _LOW_RANK)
    values = None if directions is None else _by_splitting(tall, directions)
    if values is None and (rows >= _VERY_TALL * columns or (directions is None and _full_rank(_sample(tall, 2 * columns)))):
        values = _by_gram(tall)
    return values


def _sample(tall: Tensor, size: int) -> Tensor:
    """Rows at equal distances, in double precision."""
    size = min(size, len(tall) // 7)
    stride = len(tall) // size
    return to_double(tall[stride // 2 :: stride][:size])


def _full_rank(sample: Tensor) -> bool:
    """Whether a sample's Gram matrix of the smaller side is safely positive definite."""
    gram = _product(sample, sample.T) if len(sample) < sample.shape[1] else _product(sample.T, sample)
    gram.diagonal().mul_(1 - _RANK * len(gram))
    return int(torch.linalg.cholesky_ex(gram).info) == 0


def _few_directions(sample: Tensor, most: int) -> Tensor | None:
    """Orthonormal basis ``(n, r)`` of the space that the sample's rows lie in, or None if ``r`` is above ``most``."""
    gram = _product(sample, sample.T)
    safe = gram.clone()
    safe.diagonal().mul_(1 - _RANK * len(gram))
    # The order of the first minor that is not positive is one more than the rank; 0 says that there is none.
    if not 0 < int(torch.linalg.cholesky_ex(safe).info) <= most + 1:
        return None
    eigenvalues, vectors = torch.linalg.eigh(gram)
    directions: Tensor = torch.linalg.qr(_product(sample.T, vectors[:, eigenvalues > _RANK * eigenvalues[-1]])).Q
    return directions


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
    if tall.shape[0] < _VERY_TALL * tall.shape[1]:
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


def _by_splitting(tall: Tensor, directions: Tensor) -> Tensor | None:
    """Singular values of a numerically low-rank matrix and of the rounding noise it leaves, or None if more is left.

    With ``V`` the directions, ``C`` about ``A V``, ``E = A - C V^T`` and ``Q R = C``, the matrix is
    ``Q (R V^T + Q^T E) + (I - Q Q^T) E``: two terms with orthogonal columns. ``E`` is computed before it is squared, so
    that its Gram matrix is as good as ``E``. One pass over the matrix gives all the products.
    """
    columns, rank = directions.shape
    core = directions.new_zeros(rank, rank)
    shared = directions.new_zeros(rank, columns)
    rest = directions.new_zeros(columns, columns)
    for chunk in torch.split(tall, _chunk_rows(columns)):
        image, remainder = _split(chunk, directions)
        exact = to_double(image)
        core += _product(exact.T, exact)
        shared += _product(image.T, remainder)
        rest += _product(remainder.T, remainder)
    values = _of_two_terms(*(part.numpy(force=True) for part in (core, shared, rest, directions)))
    return None if values is None else torch.from_numpy(values).to(tall.device)


def _split(chunk: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """``C``, about ``A V``, and ``A - C V^T`` rounded to single precision on the CPU."""
    # NumPy alone multiplies in the full single precision, whatever is allowed torch.
    single = _uses_numpy(chunk)
    exact = chunk if single and chunk.dtype == torch.float32 else to_double(chunk)
    # In the order in which the matrix lies in memory, since the sum goes through both.
    transposed = exact.stride(0) == 1
    image = _product(exact, directions.to(exact.dtype))
    doubled = to_double(image)
    remainder = _product(-directions, doubled.T).T if transposed else _product(doubled, -directions.T)
    remainder += exact
    return image, remainder.float() if single else remainder


def _of_two_terms(core: _Array, shared: _Array, rest: _Array, directions: _Array) -> _Array | None:
    """Singular values of ``Q (R V^T + Q^T E) + (I - Q Q^T) E`` from ``C^T C``, ``C^T E``, ``E^T E`` and ``V``.

    With ``U D W^T`` the first term's SVD, and ``F`` and ``H`` the second one's share along ``W`` and across it, they are
    those of ``[[D, 0], [F, H]]``, and these those of ``D`` and ``H`` but for terms of the second order in ``F``. None if
    one of them matters, if ``E`` is too large for single precision, or if ``C`` has less than its full rank.
    """
    whole, left = math.sqrt(core.trace()), math.sqrt(rest.trace())
    if not (_SAFE_SINGLE[0] < whole < _SAFE_SINGLE[1] and left < _REST * whole):
        return None
    try:
        factor = np.linalg.cholesky(core)
    except np.linalg.LinAlgError:
        return None
    coupled = np.linalg.solve(factor, shared)
    rest = rest - coupled.T @ coupled
    _, dominant, rows = np.linalg.svd(factor.T @ directions.T + coupled, full_matrices=False)
    along = rest @ rows.T
    coupling = max(0.0, np.vdot(along, rows.T)) / dominant[-1]
    if not (left < dominant[-1] / 10 and coupling < _COUPLING * whole):
        return None
    # H^T H is the Gram matrix without what it has along W, in rows and in columns: the half is subtracted from both.
    across = (along - rows.T @ (rows @ along) / 2) @ rows
    remaining = np.linalg.eigvalsh(rest - across - across.T)[len(core) :]
    values: _Array = np.sort(np.concatenate([dominant, np.sqrt(remaining.clip(min=0))]))[::-1].copy()
    return values


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


def _blas_array(matrix: Tensor) -> npt.NDArray[Any]:
    """As an array, copied where BLAS would not take its strides and NumPy multiply entry by entry."""
    dense = matrix.stride(1) == 1 or matrix.stride(0) == 1
    return (matrix if dense and 0 not in matrix.stride() else matrix.contiguous()).numpy(force=True)


def _chunk_rows(columns: int) -> int:
    return max(4 * columns, _CHUNK // columns)
