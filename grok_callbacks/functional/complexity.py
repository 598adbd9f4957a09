r"""Rate-distortion complexity of a network: the shortest description of its weights that keeps its loss.

Weights are coarse-grained as far as the loss allows, and the compressed size of what is left is the network's complexity:
it rises while a network memorises and falls when it generalises (DeMoss et al., *The Complexity Dynamics of Grokking*,
arXiv 2412.09810, Algorithm 1).
"""

from __future__ import annotations

import bz2
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor

from grok_callbacks.functional import _coarse
from grok_callbacks.functional._coarse import ENCODINGS, Coded, Entry, Network, Plan, round_to_float32
from grok_callbacks.functional._common import to_double
from grok_callbacks.functional._integers import raw_bytes
from grok_callbacks.functional._search import Oracle, Search, allocate

# Candidates whose predicted size is within this of the best are compressed for real, where predictions are rough.
_CLOSE = 1.03
_FINALISTS = 3


@dataclass(frozen=True)
class StoredTensor:
    """How one tensor is described.

    Attributes:
        kind: ``"direct"``: the rounded tensor; ``"factors"``: two rounded factors of its matrix; ``"exact"``: as it is;
            ``"alias"``: the memory of an earlier tensor.
        shape: Its shape.
        rank: Columns of the factors, ``None`` for other kinds.
        bin_size: What its numbers are multiples of, 0 where nothing is rounded.
        count: How many numbers are stored.
    """

    kind: str
    shape: tuple[int, ...]
    rank: int | None
    bin_size: float
    count: int


@dataclass(frozen=True)
class RateDistortion:
    """The shortest description that was found, and what it keeps of the loss.

    Attributes:
        bits: Its length: all that a decoder needs but the tensors' names. NaN if the weights or their loss are not finite.
        bin_size: Delta, to multiples of which numbers were rounded; 0 where only the weights as they are would do.
        threshold: tau, the share of the sum of singular values that was kept.
        loss: Loss of the coarse weights.
        reference_loss: Loss of the weights as they are.
        epsilon: What the loss was allowed.
        encoding: ``"paper"`` or ``"tight"``.
        stored: What was stored for each tensor.
        evaluations: Losses computed by this process, for all epsilons of the call together.
        payload: The description itself.
    """

    bits: float
    bin_size: float
    threshold: float
    loss: float
    reference_loss: float
    epsilon: float
    encoding: str
    stored: Mapping[str, StoredTensor] = field(repr=False)
    evaluations: int
    payload: bytes = field(repr=False)

    def coarse_weights(self) -> dict[str, Tensor]:
        """The weights that the description stands for, on the CPU: :func:`decode` of the payload."""
        return decode(self.payload, list(self.stored))


@overload
def rate_distortion(
    weights: Mapping[str, Tensor],
    loss: Callable[[dict[str, Tensor]], Tensor | float],
    epsilon: float = ...,
    encoding: str = ...,
    *,
    two_sided: bool = ...,
    per_layer: bool | None = ...,
    rank: int = ...,
    world_size: int = ...,
    reduce: Callable[[Tensor], Tensor] | None = ...,
) -> RateDistortion: ...


@overload
def rate_distortion(
    weights: Mapping[str, Tensor],
    loss: Callable[[dict[str, Tensor]], Tensor | float],
    epsilon: Sequence[float],
    encoding: str = ...,
    *,
    two_sided: bool = ...,
    per_layer: bool | None = ...,
    rank: int = ...,
    world_size: int = ...,
    reduce: Callable[[Tensor], Tensor] | None = ...,
) -> tuple[RateDistortion, ...]: ...


def rate_distortion(
    weights: Mapping[str, Tensor],
    loss: Callable[[dict[str, Tensor]], Tensor | float],
    epsilon: float | Sequence[float] = 1.0,
    encoding: str = "paper",
    *,
    two_sided: bool = False,
    per_layer: bool | None = None,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> RateDistortion | tuple[RateDistortion, ...]:
    r"""Shortest description of a network's weights whose loss stays within epsilon of the original's.

    Every number is rounded to a multiple of the bin size :math:`\Delta`. A matrix :math:`W = U S V^\top` of shape (m, n)
    keeps the least number k of singular values with :math:`\sum_{i \le k} s_i / \sum_i s_i \ge \tau`, and where
    :math:`k (m + n) < m n` its rounded factors are stored instead of the rounded matrix. Among all
    :math:`(\tau, \Delta)` with ``loss(coarse) < loss(weights) + epsilon`` the shortest description is sought. It holds
    everything that a decoder needs beside the tensors' names: :math:`\tau`, :math:`\Delta`, shapes, ranks, arrays.

    What is stored:

    - Matrices as they are, tensors of more dimensions flattened to (first, rest), vectors and scalars as one row.
    - Tensors that share memory (tied weights, transposed or not) once.
    - Whole numbers and booleans exactly. Buffers are the caller's to leave out.
    - Nothing is assumed of the scale of weights: bin sizes range over 22 octaves below the largest number. If even the
      finest violates epsilon, the description is the tensors as they are, compressed with bzip2, with a ``bin_size`` of 0.

    Encodings:

    - ``"paper"``: the float32 arrays :math:`U_k S_k` and :math:`V_k`, or the matrix, compressed together with bzip2.
    - ``"tight"``: whole numbers, each array with the shortest of bz2, lzma, deflate and a range coder with frequencies by
      row or column. Factors are :math:`U_k S_k` and :math:`V_k S_k`, for which one bin size is right, at a bin size
      that adds as much noise as rounding the matrix would, and the decoder divides by :math:`S_k` rounded to powers of
      two. A Hartley (real Fourier) transform of rows or columns is used where it concentrates them, as in networks that
      do modular arithmetic.

    The paper searches :math:`\Delta` in [1e-3, 1] and :math:`\tau` in [0, 1] by Bayesian optimisation of some 60
    evaluations. Here one SVD per matrix serves all candidates, the entropy of the codes predicts sizes without
    compressing, and losses are computed only where they decide. The search is deterministic. The loss need not be monotone
    in the bin size, so that the result is a short description that keeps the promise, not provably the shortest.

    Args:
        weights: Tensors by name, of any real or complex floating dtype, integers or booleans, on any device.
        loss: Takes a dict like ``weights``, coarse in the same dtypes and on the same devices, and returns one number.
            Runs without gradients. What it raises is passed on. A NaN is a violation.
        epsilon: What the loss may rise, in its own unit (the paper: 1 nat), or several, which share one search.
        encoding: ``"paper"`` or ``"tight"``.
        two_sided: Require ``|loss(coarse) - loss(weights)| < epsilon`` (the paper's text) and not only that the loss does
            not rise by epsilon (the paper's code).
        per_layer: Choose a bin size for each tensor, by a power of :math:`2^{1/4}` on the common one: each is
            coarse-grained alone, and the allowance is shared so that a bit buys the same everywhere. The paper leaves it
            open. By default for the tight encoding only.
        rank: Of this process, when losses are split over several that hold the same weights.
        world_size: Number of these processes.
        reduce: Sums a float64 CPU tensor over them. All must call this function with the same arguments.

    Returns:
        A :class:`RateDistortion`, or a tuple of them in the order of ``epsilon`` if that is a sequence, whose bits do not
        grow with epsilon. If the weights or
        their loss are not finite (or weights beyond 1e30): NaN ``bits`` and an empty payload.

    Raises:
        ValueError: If ``weights`` is empty or holds a dtype that cannot be encoded, if ``epsilon`` is not positive
            and finite, if ``encoding`` is unknown, if ``rank``, ``world_size`` and ``reduce`` do not fit, or if ``loss``
            returns more than one number.
        RuntimeError: If the loss failed on another rank.

    Cost:
        One float64 SVD per matrix, 10 to 20 losses for each epsilon (and one or two per tensor with ``per_layer``), one to
        four runs of bzip2 over the weights or one of the range coder (0.3 s per million numbers). Memory: some copies of
        the weights in float64 on the CPU.

    Source:
        DeMoss et al. 2024, arXiv 2412.09810, Algorithm 1. Storing factors of equal scale, per-layer bin sizes and the
        tight encoding are ours.

    Example:
        >>> import torch
        >>> weights = {"weight": torch.outer(torch.arange(16.0), torch.ones(8))}
        >>> inputs = torch.ones(1, 8)
        >>> result = rate_distortion(weights, lambda w: (inputs @ (w["weight"] - weights["weight"]).T).square().mean())
        >>> bool(result.loss < result.reference_loss + result.epsilon)
        True
        >>> result.stored["weight"].kind, result.stored["weight"].rank
        ('factors', 1)
        >>> result.coarse_weights()["weight"].shape
        torch.Size([16, 8])
    """
    epsilons = list(epsilon) if isinstance(epsilon, Sequence) else [epsilon]
    _check(weights, encoding)
    _check_settings(epsilons, rank, world_size, reduce)
    network = Network(weights, encoding)
    oracle = Oracle(network, loss, rank, world_size, reduce)
    reference = oracle([None])[0] if network.finite else math.nan
    if not math.isfinite(reference):
        results = [_undefined(network, reference, allowed) for allowed in epsilons]
    else:
        if per_layer is None:
            per_layer = encoding == "tight"
        descending = sorted(set(epsilons), reverse=True)
        found = _search(network, oracle, reference, descending, two_sided=two_sided, per_layer=per_layer)
        results = [replace(found[allowed], evaluations=oracle.evaluations) for allowed in epsilons]
    return tuple(results) if isinstance(epsilon, Sequence) else results[0]


def _search(
    network: Network, oracle: Oracle, reference: float, epsilons: Sequence[float], *, two_sided: bool, per_layer: bool
) -> dict[float, RateDistortion]:
    """A result for each epsilon, the largest of which comes first."""

    def excess(value: float) -> float:
        return abs(value - reference) if two_sided else value - reference

    exponents = allocate(network, oracle, excess, epsilons[0]) if per_layer else ()
    search = Search(network, oracle, excess, exponents)
    results = {}
    for epsilon in epsilons:
        plans = [Plan(0.0, 1.0)]
        if places := search.run(epsilon):
            best = places[0]
            if network.encoding == "paper":
                places = [place for place in places[:_FINALISTS] if place.bits <= _CLOSE * best.bits]
                aligned = None if exponents else search.aligned(best, epsilon)
                places += [] if aligned is None else [aligned]
            else:
                places = [best]
            plans = [search.plan(place.ray, place.index) for place in places]
        options = [_result(network, plan, oracle, reference, epsilon) for plan in plans]
        results[epsilon] = min(options, key=lambda option: option.bits)
    # What keeps a smaller promise keeps a larger one.
    for larger, smaller in reversed(list(pairwise(epsilons))):
        if results[smaller].bits < results[larger].bits:
            results[larger] = replace(results[smaller], epsilon=larger)
    return results


def _result(network: Network, plan: Plan, oracle: Oracle, reference: float, epsilon: float) -> RateDistortion:
    coded = network.code(plan) if plan.bin_size else {}
    payload = _coarse.write(network.entries, coded, plan, network.encoding, list(network.weights.values()))
    return RateDistortion(
        bits=8.0 * len(payload),
        bin_size=plan.bin_size,
        threshold=plan.threshold,
        loss=oracle([plan])[0] if plan.bin_size else reference,
        reference_loss=reference,
        epsilon=epsilon,
        encoding=network.encoding,
        stored=_stored(network, coded),
        evaluations=oracle.evaluations,
        payload=payload,
    )


def _undefined(network: Network, reference: float, epsilon: float) -> RateDistortion:
    nan = math.nan
    return RateDistortion(nan, nan, nan, nan, reference, epsilon, network.encoding, _stored(network, {}), 0, b"")


def _stored(network: Network, coded: Mapping[int, Coded]) -> dict[str, StoredTensor]:
    def describe(entry: Entry, codes: Coded | None) -> StoredTensor:
        if entry.alias is not None:
            return StoredTensor("alias", entry.shape, None, 0.0, 0)
        if codes is None:
            return StoredTensor("exact", entry.shape, None, 0.0, math.prod(entry.shape))
        kind, rank = ("factors", codes.arrays[0].shape[0]) if codes.factored else ("direct", None)
        return StoredTensor(kind, entry.shape, rank, codes.step, sum(array.numel() for array in codes.arrays))

    return {
        name: describe(entry, coded.get(index))
        for index, (name, entry) in enumerate(zip(network.weights, network.entries, strict=True))
    }


def _check(weights: Mapping[str, Tensor], encoding: str) -> None:
    if not weights:
        raise ValueError("weights must hold at least one tensor")
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {ENCODINGS}, got {encoding!r}")
    for name, tensor in weights.items():
        if tensor.dtype not in _coarse.DTYPES:
            raise ValueError(f"weights[{name!r}] has dtype {tensor.dtype}, which cannot be encoded")
        if tensor.ndim > _coarse.MAX_DIMENSIONS:
            raise ValueError(f"weights[{name!r}] has more than {_coarse.MAX_DIMENSIONS} dimensions")


def _check_settings(epsilons: Sequence[float], rank: int, world_size: int, reduce: Callable[[Tensor], Tensor] | None) -> None:
    if not epsilons or not all(0 < allowed < math.inf for allowed in epsilons):
        raise ValueError(f"epsilon must be positive and finite, got {epsilons}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be between 0 and world_size - 1 = {world_size - 1}, got {rank}")
    if world_size > 1 and reduce is None:
        raise ValueError("reduce must be given for a world_size above 1")


def encode(weights: Mapping[str, Tensor], bin_size: float, threshold: float = 1.0, encoding: str = "paper") -> bytes:
    """Coarse-grain weights at a given bin size and threshold, and compress them.

    Args:
        weights: Tensors by name, see :func:`rate_distortion`.
        bin_size: Delta, taken as the nearest float32; 0 compresses the tensors as they are.
        threshold: tau, share of the sum of singular values to keep.
        encoding: ``"paper"`` or ``"tight"``, see :func:`rate_distortion`.

    Returns:
        The byte string that :func:`decode` reads: eight times its length is the size in bits.

    Raises:
        ValueError: If ``weights`` is empty, not finite or of a dtype that cannot be encoded, if ``threshold`` is not in
            [0, 1], if ``bin_size`` is negative, or so small that float32 could not tell its multiples apart.

    Example:
        >>> import torch
        >>> payload = encode({"weight": torch.tensor([[0.12, -0.29], [0.5, 0.0]])}, bin_size=0.25)
        >>> decode(payload, ["weight"])
        {'weight': tensor([[ 0.0000, -0.2500], [ 0.5000, 0.0000]])}
    """
    _check(weights, encoding)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if not 0 <= bin_size < math.inf:
        raise ValueError(f"bin_size must be finite and not negative, got {bin_size}")
    network = Network(weights, encoding)
    if not network.finite:
        raise ValueError("weights must be finite")
    plan = Plan(round_to_float32(bin_size), round_to_float32(threshold))
    if any(matrix.peak > 2 * _coarse.MAX_CODE * plan.bin_size for matrix in network.matrices.values() if bin_size):
        raise ValueError(f"bin_size {bin_size} is too small for the largest of the weights")
    coded = network.code(plan) if plan.bin_size else {}
    return _coarse.write(network.entries, coded, plan, encoding, list(weights.values()))


def decode(payload: bytes, names: Sequence[str]) -> dict[str, Tensor]:
    """The coarse weights that a description stands for: bit for bit those whose loss :func:`rate_distortion` reports.

    Products of factors are whole numbers until the last multiplication, so the order of a sum cannot matter; the Hartley
    transforms of the tight encoding are bit-identical on one machine and agree to float64 rounding between machines.

    Args:
        payload: From :func:`encode` or :attr:`RateDistortion.payload`.
        names: Of the tensors, in their order.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ValueError: If ``payload`` is empty, cut short or otherwise no description, or does not hold as many tensors as
            ``names``. It has no checksum, which would count as bits: damage that leaves a description gives other weights.
    """
    try:
        tensors = _coarse.read(payload)
    except Exception as error:
        # What is damaged can mislead any step of the way: the decompressors, the tables, the shapes.
        raise ValueError(f"payload cannot be read, it is cut short or damaged: {error}") from error
    if len(names) != len(tensors):
        raise ValueError(f"names must hold {len(tensors)} names, got {len(names)}")
    return dict(zip(names, tensors, strict=True))


def naive_size(weights: Mapping[str, Tensor]) -> float:
    """Bits of the raw weights as float32, compressed with bzip2: what a description is compared with.

    Args:
        weights: Tensors by name; those that share memory count once.

    Returns:
        Eight times the compressed length.

    Raises:
        ValueError: If ``weights`` is empty or holds a dtype that cannot be encoded.

    Example:
        >>> import torch
        >>> naive_size({"weight": torch.zeros(1000)}) < 1000
        True
    """
    _check(weights, ENCODINGS[0])
    entries = _coarse.entries(list(weights.values()))
    parts = []
    for entry, tensor in zip(entries, weights.values(), strict=True):
        if entry.alias is None:
            real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
            parts.append(raw_bytes(real.float() if entry.rounded else real))
    return 8.0 * len(bz2.compress(b"".join(parts)))


def code_length(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Bits to tell the targets to someone who has the network: :math:`-\sum_i \log_2 p(y_i | x_i)`.

    Added to the bits of the (coarse) network itself, it is the total description length of the targets of a training set,
    given its inputs.

    Args:
        logits: ``(n, C)`` of the coarse network.
        targets: ``(n,)`` class indices.

    Returns:
        Scalar, float64. 0 for no samples, NaN where logits are not finite enough to give probabilities.

    Raises:
        ValueError: If the shapes do not fit, the logits are complex, or a target is no class.

    Source:
        DeMoss et al. 2024, arXiv 2412.09810, section 3.

    Example:
        >>> import torch
        >>> code_length(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        tensor(6., dtype=torch.float64)
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits and targets must be (n, C) and (n,), got {tuple(logits.shape)} and {tuple(targets.shape)}")
    if logits.is_complex():
        raise ValueError(f"logits must be real, got {logits.dtype}")
    if targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"targets must be class indices, got {targets.dtype}")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(f"targets must be in [0, {logits.shape[1]})")
    likelihoods = to_double(logits).log_softmax(1).gather(1, targets.long().unsqueeze(1))
    return -likelihoods.sum() / math.log(2)


def generalization_bound(risk: Tensor | float, bits: Tensor | float, num_samples: Tensor | int, delta: float = 0.05) -> Tensor:
    r"""Upper bound on the risk over unseen samples, from the length of a description.

    .. math:: R \le R_{emp} + \sqrt{\frac{K \ln 2 + 2 \ln K + \ln(1 / \delta)}{2 n}}

    with probability of at least :math:`1 - \delta` over the draw of the samples. The paper writes the first two terms
    without bases; with K in bits the first needs ln 2. It holds for a risk in [0, 1], such as the error rate, of the
    *coarse* network on the samples that K was searched with, and for K counting everything that a decoder needs. Above 1
    it is vacuous: it says nothing.

    Args:
        risk: Empirical risk :math:`R_{emp}` in [0, 1].
        bits: K. Below 1 bit the second term is taken at 1.
        num_samples: n, samples the risk was measured on.
        delta: Probability of failure.

    Returns:
        The bound in float64, of the arguments' common shape; NaN where an argument is.

    Raises:
        ValueError: If ``risk`` is outside [0, 1], ``bits`` negative, ``num_samples`` not positive, or ``delta`` outside (0, 1).

    Source:
        DeMoss et al. 2024, arXiv 2412.09810, eq. 4; Lotfi et al. 2022.

    Example:
        >>> generalization_bound(0.1, 8000, 5000)
        tensor(0.8461, dtype=torch.float64)
    """
    risk, bits, num_samples = (torch.as_tensor(value, dtype=torch.float64) for value in (risk, bits, num_samples))
    if ((risk < 0) | (risk > 1)).any():
        raise ValueError(f"risk must be in [0, 1], got {risk}")
    if (bits < 0).any():
        raise ValueError(f"bits must not be negative, got {bits}")
    if (num_samples <= 0).any():
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}")
    numerator = bits * math.log(2) + 2 * bits.clamp(min=1).log() - math.log(delta)
    return risk + (numerator / (2 * num_samples)).sqrt()
