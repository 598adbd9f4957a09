"""Coarse-grained weights: how a tensor is rounded or factored, and the byte string a decoder rebuilds it from."""

from __future__ import annotations

import bz2
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from grok_callbacks.functional import _integers
from grok_callbacks.functional._integers import Reader, from_bytes, raw_bytes, signed, unsigned

ENCODINGS = ("paper", "tight")

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
MAX_DIMENSIONS = 15
# Codes up to here are recovered exactly from float32 multiples of the bin size.
MAX_CODE = 2**22
# Larger numbers count as not finite.
_LARGEST = 1e30
# Slack in the comparison that defines the rank kept at a threshold, against rounding of the sums.
_SLACK = 1e-12
# A transform is worth its irregularity only if it makes the entries this much smaller, in mean magnitude.
_TRANSFORM_GAIN = 0.97
# Bin sizes of factors are tried from a quarter to sixteen times that of the matrix, by quarters of an octave.
_FACTOR_EXPONENTS = (-8, 16)
_QUARTERS = 4
# Bits that the scale of a pair of singular vectors takes, about.
_SCALE_BITS = 2.0
# Leading bits of the codes that are counted for a prediction.
_COUNTED_BITS = 11
# Vectors below this share of all numbers are predicted at this many bin sizes an octave.
_SMALL, _ROUGH = 0.01, 2
# Bits of an array of zeros.
_ZERO_BITS = 8.0
_LEFT, _RIGHT = 1, 2


def round_to_float32(value: float) -> float:
    """The nearest float32, as a Python float: bin sizes and thresholds are stored in four bytes."""
    return float(torch.tensor(value, dtype=torch.float32))


def _step(bin_size: float, exponent: int) -> float:
    """A tensor's bin size: what encoder and decoder must compute alike."""
    return float(bin_size * 2 ** (exponent / _QUARTERS))


def _hartley(matrix: Tensor, dim: int) -> Tensor:
    """Orthonormal discrete Hartley transform along one dimension: real, and its own inverse."""
    spectrum: Tensor = torch.fft.fft(matrix, dim=dim)
    return (spectrum.real - spectrum.imag).div(math.sqrt(matrix.shape[dim]))


def _transform(matrix: Tensor, sides: int) -> Tensor:
    """Hartley transform along the rows' index, the columns' index, both or neither."""
    if sides & _LEFT:
        matrix = _hartley(matrix, 0)
    if sides & _RIGHT:
        matrix = _hartley(matrix, 1)
    return matrix


# --- plans and what they give -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is done to a network: one bin size and one threshold, and per tensor a power of ``2^(1/4)`` on the bin size.

    Attributes:
        bin_size: Everything is rounded to multiples of it; 0 stores the tensors as they are.
        threshold: Share of the sum of singular values that is kept.
        exponents: By tensor, in order; empty for one bin size throughout.
        only: Indices of the tensors it applies to, the others being left alone; ``None`` for all.
    """

    bin_size: float
    threshold: float
    exponents: tuple[int, ...] = ()
    only: frozenset[int] | None = None

    def exponent(self, index: int) -> int:
        """Of one tensor's bin size."""
        return self.exponents[index] if self.exponents else 0


@dataclass(frozen=True)
class Coded:
    """One tensor as integers and what it takes to read them.

    Attributes:
        arrays: ``(rows, columns)`` int64: the codes of a matrix, or of its two factors with a row for each singular value.
        bin_size: The common bin size.
        exponent: Of its own one, in quarters of an octave above that.
        scales: For the factors of the tight encoding the binary logarithm of each singular value.
        sides: Which indices were transformed.
        error: Squared error against the tensor, that of factors to first order; of the tight encoding only.
    """

    arrays: tuple[Tensor, ...]
    bin_size: float
    exponent: int
    scales: tuple[int, ...] = ()
    sides: int = 0
    error: float = 0.0

    @property
    def step(self) -> float:
        """Its bin size."""
        return _step(self.bin_size, self.exponent)

    @property
    def factored(self) -> bool:
        """Whether it is stored as two factors."""
        return len(self.arrays) == 2

    def restore(self, rows: int, columns: int) -> Tensor:
        """The coarse matrix in float64.

        Products of codes are sums of whole numbers, exact in float64 whatever their order.
        """
        if self.factored and self.arrays[0].numel() == 0:
            return torch.zeros(rows, columns, dtype=torch.float64)
        if self.factored:
            left, right = (array.double() for array in self.arrays)
            if self.sides:
                left = _transform(left, self.sides & _LEFT and _RIGHT)
                right = _transform(right, self.sides & _RIGHT)
            if self.scales:
                left = left * torch.tensor(self.scales, dtype=torch.float64).neg().exp2().unsqueeze(1)
            return (left.T @ right * self.step**2).view(rows, columns)
        return _transform(self.arrays[0].double(), self.sides).view(rows, columns) * self.step


@dataclass(frozen=True)
class _Rounded:
    """Codes of two factors, the pairs that do not round to nothing, and the squared error that is added."""

    left: Tensor
    right: Tensor
    kept: Tensor
    lost: float


class Matrix:
    """A tensor as a float64 matrix on the CPU, with what its coarse versions share: the SVD, the choice of transforms."""

    def __init__(self, values: Tensor, *, factorable: bool) -> None:
        self.values = values
        self.factorable = factorable and min(values.shape) > 0
        self._ranks: dict[float, int | None] = {}

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """``U^T`` scaled by the singular values, these, ``V^T``: a row for each singular value."""
        u, s, vh = torch.linalg.svd(self.values, full_matrices=False)
        return (u * s).T.contiguous(), s, vh.contiguous()

    @cached_property
    def peak(self) -> float:
        """Largest magnitude that is rounded, singular values included."""
        if self.values.numel() == 0:
            return 0.0
        return float(self.svd[1][0] if self.factorable else self.values.abs().max())

    def rank(self, threshold: float) -> int | None:
        """Singular values kept at ``threshold``, where storing two factors takes fewer numbers than the matrix; else None."""
        if not self.factorable:
            return None
        if threshold not in self._ranks:
            self._ranks[threshold] = self._rank(threshold)
        return self._ranks[threshold]

    def _rank(self, threshold: float) -> int | None:
        sums = self.svd[1].cumsum(0)
        target = threshold * float(sums[-1]) * (1 - _SLACK)
        rank = min(int((sums < target).sum()) + 1, len(sums)) if target > 0 else 0
        rows, columns = self.values.shape
        return rank if rank * (rows + columns) < rows * columns else None

    @cached_property
    def transformed(self) -> tuple[int, Tensor]:
        """The transforms under which the matrix is most concentrated (least sum of magnitudes), and the result."""
        if not self.factorable:
            return 0, self.values
        options = [_transform(self.values, sides) for sides in range(4)]
        sums = [float(option.abs().sum()) for option in options]
        best = min(range(4), key=sums.__getitem__)
        best = best if sums[best] < _TRANSFORM_GAIN * sums[0] else 0
        return best, options[best]

    @cached_property
    def transformed_factors(self) -> tuple[int, Tensor, Tensor]:
        """The same of its two factors, each on its own, the second scaled by the singular values' powers of two."""
        left, s, right = self.svd
        right = right * _power_of_two(s).unsqueeze(1)
        sides, factors = 0, []
        for side, factor in ((_LEFT, left), (_RIGHT, right)):
            other = _hartley(factor, 1)
            better = bool(other.abs().sum() < _TRANSFORM_GAIN * factor.abs().sum())
            sides |= side if better else 0
            factors.append(other if better else factor)
        return sides, factors[0], factors[1]

    def paper(self, rank: int | None, bin_size: float, exponent: int) -> Coded:
        """``U_k S_k`` and ``V_k``, or the matrix, rounded to multiples of the bin size.

        A bin size so fine that float32 could not tell the multiples of ``V_k`` apart leaves the matrix as it is.
        """
        step = _step(bin_size, exponent)
        return Coded(tuple((array / step).round_().long() for array in self._paper_arrays(rank, step)), bin_size, exponent)

    def _paper_arrays(self, rank: int | None, step: float) -> tuple[Tensor, ...]:
        """What :meth:`paper` rounds."""
        if rank is None or step * MAX_CODE < 1:
            return (self.values,)
        return self.svd[0][:rank], self.svd[2][:rank]

    def paper_error(self, rank: int | None, bin_size: float, exponent: int) -> float:
        """Squared error of :meth:`paper`, that of factors to first order."""
        step = _step(bin_size, exponent)
        arrays = self._paper_arrays(rank, step)
        lost = [((array / step).round_() * step - array).square().sum(1) for array in arrays]
        if len(arrays) == 1:
            return float(lost[0].sum())
        squares = self.svd[1].square()
        return float((lost[0] + squares[:rank] * lost[1]).sum() + squares[rank:].sum())

    def direct(self, bin_size: float, exponent: int) -> Coded:
        """The matrix, transformed where that helps, rounded to multiples of the bin size."""
        sides, values = self.transformed
        step = _step(bin_size, exponent)
        codes = (values / step).round()
        error = float((codes * step - values).square().sum())
        return Coded((codes.long(),), bin_size, exponent, sides=sides, error=error)

    def _noise_floor(self, step: float) -> float:
        """Largest singular value that rounding errors of ``step`` alone would have."""
        rows, columns = self.values.shape
        return step / math.sqrt(12) * (math.sqrt(rows) + math.sqrt(columns))

    def low_rank(self, step: float) -> bool:
        """Whether so few singular values stand out of the rounding errors that factors are worth a try."""
        rows, columns = self.values.shape
        rank = int((self.svd[1] > self._noise_floor(step)).sum())
        return rank * (rows + columns) < rows * columns

    def factors(self, rank: int | None, bin_size: float, exponent: int, noise: float) -> Coded:
        """Factors at the coarsest bin size whose rounding adds no more than ``noise`` to the squared error.

        The columns of both factors carry the singular value, so that one bin size is right for all of them: rounding
        ``u s`` and ``v s`` to multiples of Delta adds ``Delta^2 / 12`` per entry to the product's squared error. The
        decoder divides by the singular value, rounded to a power of two. Pairs that round to nothing are dropped.
        """
        step = _step(bin_size, exponent)
        # Where no entry rounds to zero, the noise is that of as many uniform errors as there are entries.
        rows, columns = self.values.shape
        entries = max(1, int((self.svd[1][:rank] > self._noise_floor(step)).sum())) * (rows + columns)
        low, high = _FACTOR_EXPONENTS
        extra = min(max(round(_QUARTERS * math.log2(rows * columns / entries) / 2), low), high)
        found = self._rounded_factors(rank, _step(bin_size, exponent + extra))
        while found.lost > noise and extra > low:
            extra -= 1
            found = self._rounded_factors(rank, _step(bin_size, exponent + extra))
        while extra < high and (coarser := self._rounded_factors(rank, _step(bin_size, exponent + extra + 1))).lost <= noise:
            extra, found = extra + 1, coarser
        return self._coded_factors(rank, found, bin_size, exponent + extra)

    def factors_at(self, rank: int | None, bin_size: float, exponent: int) -> Coded:
        """Factors at a bin size of their own, which :meth:`factors` has found."""
        return self._coded_factors(rank, self._rounded_factors(rank, _step(bin_size, exponent)), bin_size, exponent)

    def _rounded_factors(self, rank: int | None, width: float) -> _Rounded:
        _, left, right = self.transformed_factors
        left, s, right = left[:rank], self.svd[1][:rank], right[:rank]
        codes_left, codes_right = (left / width).round_(), (right / width).round_()
        kept = codes_left.any(1) & codes_right.any(1)
        lost = (codes_left * width - left).square().sum(1)
        lost = lost + (s / _power_of_two(s)).square() * (codes_right * width - right).square().sum(1)
        return _Rounded(codes_left, codes_right, kept, float(torch.where(kept, lost, s.square()).sum()))

    def _coded_factors(self, rank: int | None, found: _Rounded, bin_size: float, exponent: int) -> Coded:
        s = self.svd[1]
        rest = float(s[rank:].square().sum()) if rank is not None else 0.0
        scales = tuple(int(scale) for scale in _power_of_two(s[:rank][found.kept]).log2().tolist())
        arrays = found.left[found.kept].long(), found.right[found.kept].long()
        return Coded(arrays, bin_size, exponent, scales, self.transformed_factors[0], found.lost + rest)


def _power_of_two(values: Tensor) -> Tensor:
    """The nearest power of two of each positive number; 1 for zeros."""
    return torch.where(values > 0, values, torch.ones_like(values)).log2().round().exp2()


# --- a dict of tensors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What a decoder knows of one tensor before its codes.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        alias: Index of the earlier tensor that shares its memory, or ``None``.
        permutation: For an alias, the order in which the other's dimensions are its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    alias: int | None = None
    permutation: tuple[int, ...] = ()

    @property
    def rounded(self) -> bool:
        """Whether it is coarse-grained: floating-point numbers are, whole numbers are kept."""
        return self.alias is None and (self.dtype.is_floating_point or self.dtype.is_complex)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the real matrix it is coded as: the first dimension by the others, vectors as one row."""
        shape = (*self.shape, 2) if self.dtype.is_complex else self.shape
        if len(shape) < 2:
            return 1, math.prod(shape)
        return shape[0], math.prod(shape[1:])

    def restore(self, matrix: Tensor) -> Tensor:
        """A tensor of its shape and dtype from the real matrix."""
        if self.dtype.is_complex:
            return torch.view_as_complex(matrix.view(*self.shape, 2).contiguous()).to(self.dtype)
        return matrix.reshape(self.shape).to(self.dtype)


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same numbers in memory, up to the order of dimensions."""
    layout = tuple(sorted(zip(tensor.stride(), tensor.shape, strict=True)))
    read_as = tensor.dtype, tensor.is_conj(), tensor.is_neg()
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), read_as, layout


def _order(tensor: Tensor) -> list[int]:
    return sorted(range(tensor.ndim), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]))


def entries(tensors: Sequence[Tensor]) -> list[Entry]:
    """What there is to tell of each tensor, those of shared memory pointing to the first of them."""
    seen: dict[tuple[object, ...], int] = {}
    found: list[Entry] = []
    for index, tensor in enumerate(tensors):
        other = seen.setdefault(_memory(tensor), index) if tensor.numel() else index
        if other == index:
            found.append(Entry(tuple(tensor.shape), tensor.dtype))
        else:
            theirs, ours = _order(tensors[other]), _order(tensor)
            permutation = tuple(theirs[ours.index(dim)] for dim in range(tensor.ndim))
            found.append(Entry(tuple(tensor.shape), tensor.dtype, other, permutation))
    return found


@dataclass(frozen=True)
class _Measured:
    """What is remembered of one tensor under a plan.

    Attributes:
        bits: In the paper's encoding those beside the counted codes.
        counts: Of the codes, in the paper's encoding.
        error: Squared error, in the tight encoding.
        factors: The exponent of its factors' bin size, where the tight encoding has chosen factors.
    """

    bits: float
    counts: tuple[int, Tensor] | None = None
    error: float = 0.0
    factors: int | None = None


@dataclass
class Network:
    """A dict of weights, ready to be coarse-grained many times: one SVD per matrix."""

    weights: Mapping[str, Tensor]
    encoding: str
    entries: list[Entry] = field(init=False)
    matrices: dict[int, Matrix] = field(init=False)
    _measured: dict[tuple[int, int | None, float, int], _Measured] = field(init=False, default_factory=dict)
    _contexts: dict[tuple[int, bool, int], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        tensors = list(self.weights.values())
        self.entries = entries(tensors)
        self.matrices = {}
        for index, (entry, tensor) in enumerate(zip(self.entries, tensors, strict=True)):
            if entry.rounded:
                real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
                matrix = real.to(device="cpu", dtype=torch.float64).reshape(entry.matrix_shape)
                self.matrices[index] = Matrix(matrix, factorable=len(entry.shape) >= 2)

    @cached_property
    def _small(self) -> frozenset[int]:
        """Vectors that are a small share of all numbers: their sizes need not be known at every bin size."""
        total = sum(matrix.values.numel() for matrix in self.matrices.values())
        vectors = [index for index, matrix in self.matrices.items() if not matrix.factorable]
        return frozenset(index for index in vectors if self.matrices[index].values.numel() < _SMALL * total)

    @property
    def finite(self) -> bool:
        """Whether all numbers are finite, and within what float32 holds the products of."""
        return all(bool((matrix.values.abs() <= _LARGEST).all()) for matrix in self.matrices.values())

    @cached_property
    def peak(self) -> float:
        """Largest magnitude that is rounded, singular values included."""
        return max((matrix.peak for matrix in self.matrices.values()), default=0.0)

    def signature(self, threshold: float) -> tuple[int | None, ...]:
        """The ranks kept at a threshold: thresholds of one signature give the same coarse weights."""
        return tuple(matrix.rank(threshold) for matrix in self.matrices.values())

    def _bits(self, index: int, coded: Coded) -> float:
        """Bits that the codes of a tensor are predicted to take, with the contexts that were best for it at first."""
        total = _SCALE_BITS * len(coded.scales)
        for place, array in enumerate(coded.arrays):
            key = index, coded.factored, place
            bits, best = _integers.predicted(array, self._contexts.get(key))
            self._contexts.setdefault(key, best)
            total += bits
        return total

    def _choose(self, index: int, rank: int | None, plan: Plan) -> tuple[Coded, float]:
        """One tensor in the tight encoding, in the form that promises the fewest bits, and these."""
        matrix, exponent = self.matrices[index], plan.exponent(index)
        direct = matrix.direct(plan.bin_size, exponent)
        bits = self._bits(index, direct) if rank is None else math.inf
        if rank is None and not (matrix.factorable and bits > _ZERO_BITS and matrix.low_rank(direct.step)):
            return direct, bits
        factors = matrix.factors(rank, plan.bin_size, exponent, direct.error)
        factor_bits = self._bits(index, factors)
        return (factors, factor_bits) if factor_bits < bits else (direct, bits)

    def _code(self, index: int, plan: Plan) -> Coded:
        """One tensor under a plan."""
        matrix, exponent = self.matrices[index], plan.exponent(index)
        rank = matrix.rank(plan.threshold)
        if self.encoding == "paper":
            return matrix.paper(rank, plan.bin_size, exponent)
        chosen = self._measure(plan, index).factors if matrix.factorable else None
        return matrix.direct(plan.bin_size, exponent) if chosen is None else matrix.factors_at(rank, plan.bin_size, chosen)

    def code(self, plan: Plan) -> dict[int, Coded]:
        """Every rounded tensor under a plan."""
        return {index: self._code(index, plan) for index in self.matrices if plan.only is None or index in plan.only}

    def _measure(self, plan: Plan, index: int) -> _Measured:
        """What is remembered of one tensor under a plan."""
        rank, exponent = self.matrices[index].rank(plan.threshold), plan.exponent(index)
        key = index, rank, plan.bin_size, exponent
        if key not in self._measured:
            if self.encoding == "paper":
                coded = self.matrices[index].paper(rank, plan.bin_size, exponent)
                self._measured[key] = self._counted(coded)
            else:
                coded, bits = self._choose(index, rank, plan)
                self._measured[key] = _Measured(bits, error=coded.error, factors=coded.exponent if coded.factored else None)
        return self._measured[key]

    def _counted(self, coded: Coded) -> _Measured:
        """The codes of the paper's encoding, counted down to the bits below which bzip2 finds nothing."""
        arrays = [array for array in _paper_order(coded) if array.numel()]
        if not arrays:
            return _Measured(0.0)
        shift = max(0, math.ceil(math.log2(max(self.peak / coded.step, 1.0))) - _COUNTED_BITS)
        return _Measured(shift * sum(array.numel() for array in arrays), _integers.neighbour_counts(arrays, shift))

    def bits(self, plan: Plan, indices: Iterable[int] | None = None) -> float:
        """Predicted bits of some tensors' codes under a plan, by default of all."""
        total = 0.0
        pools: dict[int, list[tuple[int, Tensor]]] = {}
        rough = replace(plan, bin_size=2 ** (round(_ROUGH * math.log2(plan.bin_size)) / _ROUGH))
        for index in self.matrices if indices is None else indices:
            measured = self._measure(rough if index in self._small else plan, index)
            total += measured.bits
            if measured.counts is not None:
                # bzip2 sees one stream: tensors of one bin size share their codes' frequencies.
                pools.setdefault(plan.exponent(index), []).append(measured.counts)
        return total + sum(_integers.pooled_bits(tables) for tables in pools.values())

    def error(self, plan: Plan, index: int) -> float:
        """Squared error of one tensor under a plan."""
        if self.encoding == "tight":
            return self._measure(plan, index).error
        matrix = self.matrices[index]
        return matrix.paper_error(matrix.rank(plan.threshold), plan.bin_size, plan.exponent(index))

    def restore(self, coded: Mapping[int, Coded]) -> dict[str, Tensor]:
        """The weights with the coded tensors replaced by their coarse versions."""
        tensors = restore(self.entries, coded, list(self.weights.values()))
        return dict(zip(self.weights, tensors, strict=True))


def restore(entries: Sequence[Entry], coded: Mapping[int, Coded], others: Sequence[Tensor | None]) -> list[Tensor]:
    """Tensors from codes; those without codes are taken from ``others``, whose devices are kept."""
    tensors: list[Tensor] = []
    for index, entry in enumerate(entries):
        other = others[index]
        if entry.alias is not None:
            tensors.append(tensors[entry.alias].permute(entry.permutation))
        elif index in coded:
            tensor = entry.restore(coded[index].restore(*entry.matrix_shape))
            tensors.append(tensor if other is None else tensor.to(other.device))
        elif other is not None:
            tensors.append(other.detach())
        else:
            raise ValueError("payload lacks a tensor")
    return tensors


# --- the byte string --------------------------------------------------------------------------------------------------
# encoding, threshold, bin size, number of tensors; for each its kind, dtype, number of dimensions, shape and, by kind,
# rank and exponent; then the arrays. In the paper's encoding everything after the first byte goes through bzip2.

_DIRECT, _FACTORS, _EXACT, _ALIAS = range(4)
_LOSSLESS = len(ENCODINGS)
_EXPONENTS_FLAG, _DEFLATED_FLAG = 16, 32


def _kind(entry: Entry, coded: Coded | None) -> int:
    if entry.alias is not None:
        return _ALIAS
    if coded is None:
        return _EXACT
    return _FACTORS if coded.factored else _DIRECT


def _write_entry(entry: Entry, coded: Coded | None, *, exponents: bool) -> bytes:
    kind = _kind(entry, coded)
    out = bytes([kind | (coded.sides if coded else 0) << 2, DTYPES.index(entry.dtype) | len(entry.shape) << 4])
    if entry.alias is not None:
        return out + unsigned(entry.alias) + bytes(entry.permutation)
    out += b"".join(unsigned(size) for size in entry.shape)
    if coded is None:
        return out
    if kind == _FACTORS:
        out += unsigned(coded.arrays[0].shape[0])
    return out + (signed(coded.exponent) if exponents else b"")


def _write_scales(scales: Sequence[int]) -> bytes:
    """Logarithms of singular values, which fall: the first, and where each of the following ones starts."""
    if not scales:
        return b""
    steps = [scales[place] - scales[place + 1] for place in range(len(scales) - 1)]
    return signed(scales[0]) + (_integers.pack(torch.tensor([steps])) if steps else b"")


def _read_scales(reader: Reader, rank: int) -> tuple[int, ...]:
    if rank == 0:
        return ()
    scales = [reader.signed()]
    if rank > 1:
        for step in _integers.unpack(reader, 1, rank - 1)[0].tolist():
            scales.append(scales[-1] - step)
    return tuple(scales)


def _paper_order(coded: Coded) -> tuple[Tensor, ...]:
    """Arrays as the paper has them: factors as ``U_k S_k`` and ``V_k``, with a column for each singular value."""
    return tuple(array.T for array in coded.arrays) if coded.factored else coded.arrays


def write(entries: Sequence[Entry], coded: Mapping[int, Coded], plan: Plan, encoding: str, tensors: Sequence[Tensor]) -> bytes:
    """The byte string that holds everything a decoder needs but the tensors' names."""
    exponents = encoding == "tight" or bool(plan.exponents)
    head = struct.pack("<ff", plan.threshold, plan.bin_size) + unsigned(len(entries))
    body = b""
    for index, entry in enumerate(entries):
        codes = coded.get(index)
        head += _write_entry(entry, codes, exponents=exponents)
        if codes is None:
            body += raw_bytes(tensors[index]) if entry.alias is None else b""
        elif encoding == "paper":
            body += b"".join(raw_bytes((array.double() * codes.step).float()) for array in _paper_order(codes))
        else:
            body += _write_scales(codes.scales) + b"".join(_integers.pack(array) for array in codes.arrays)
    if plan.bin_size == 0:
        return bytes([_LOSSLESS]) + bz2.compress(head + body)
    first = ENCODINGS.index(encoding) | (_EXPONENTS_FLAG if exponents else 0)
    if encoding == "paper":
        return bytes([first]) + bz2.compress(head + body)
    deflated = _integers.deflate(head)
    if len(deflated) + 1 < len(head):
        return bytes([first | _DEFLATED_FLAG]) + unsigned(len(deflated)) + deflated + body
    return bytes([first]) + head + body


def read(payload: bytes) -> list[Tensor]:
    """The tensors of a byte string."""
    if not payload:
        raise ValueError("payload is empty")
    encoding, exponents = payload[0] & 15, bool(payload[0] & _EXPONENTS_FLAG)
    if encoding > _LOSSLESS:
        raise ValueError(f"payload begins with {payload[0]}, which is no encoding")
    tight = encoding == ENCODINGS.index("tight")
    reader = head = Reader(payload[1:] if tight else bz2.decompress(payload[1:]))
    if payload[0] & _DEFLATED_FLAG:
        head = Reader(_integers.inflate(reader.take(reader.unsigned())))
    _, bin_size = struct.unpack("<ff", head.take(8))
    heads = [_read_entry(head, exponents=exponents) for _ in range(head.unsigned())]
    coded: dict[int, Coded] = {}
    exact: list[Tensor | None] = []
    for index, (entry, kind, sides, rank, exponent) in enumerate(heads):
        exact.append(None)
        if kind == _EXACT:
            data = reader.take(math.prod(entry.shape) * entry.dtype.itemsize)
            exact[-1] = from_bytes(data, entry.dtype).view(entry.shape)
        elif kind != _ALIAS:
            rows, columns = entry.matrix_shape
            shapes = [(rank, rows), (rank, columns)] if kind == _FACTORS else [(rows, columns)]
            scales = _read_scales(reader, rank) if tight and kind == _FACTORS else ()
            if tight:
                arrays = tuple(_integers.unpack(reader, *shape) for shape in shapes)
            else:
                arrays = tuple(
                    _read_floats(reader, *shape, _step(bin_size, exponent), transposed=kind == _FACTORS) for shape in shapes
                )
            coded[index] = Coded(arrays, bin_size, exponent, scales, sides)
    return restore([head[0] for head in heads], coded, exact)


def _read_entry(reader: Reader, *, exponents: bool) -> tuple[Entry, int, int, int, int]:
    """A tensor's entry, kind, transformed sides, rank and exponent."""
    first, second = reader.byte(), reader.byte()
    kind, sides, dtype, dimensions = first & 3, first >> 2, DTYPES[second & 15], second >> 4
    if kind == _ALIAS:
        alias = reader.unsigned()
        return Entry((), dtype, alias, tuple(reader.take(dimensions))), kind, 0, 0, 0
    entry = Entry(tuple(reader.unsigned() for _ in range(dimensions)), dtype)
    if kind == _EXACT:
        return entry, kind, 0, 0, 0
    rank = reader.unsigned() if kind == _FACTORS else 0
    return entry, kind, sides, rank, reader.signed() if exponents else 0


def _read_floats(reader: Reader, rows: int, columns: int, step: float, *, transposed: bool) -> Tensor:
    """Codes that were stored as float32 multiples of a bin size."""
    values = from_bytes(reader.take(4 * rows * columns), torch.float32)
    codes = (values.double() / step).round().long()
    return codes.view(columns, rows).T if transposed else codes.view(rows, columns)
