"""Lossless coding of small integer matrices: a range coder (rANS) with contexts, beside the standard library's coders.

The codes of coarse-grained weights are almost independent of each other given the scale of their row or column: what
there is to gain over one histogram is a histogram for each such scale. Rows (or columns) of like mean magnitude share
a table of frequencies; the tables, and which row uses which, are part of the stream.
"""

from __future__ import annotations

import bz2
import lzma
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Frequencies of a table sum to this many units; states are renormalised by 16-bit words.
_PRECISION = 14
_TOTAL = 1 << _PRECISION
_STATE = 1 << 16
# Symbols per table at most, and at least one for so many codes; what exceeds that is split into a symbol and low bits that
# are stored as they are: a finer table would cost more than it saves.
_ALPHABET = (16, 256)
_CODES_PER_SYMBOL = 16
# Frequencies are stored by their logarithm, in quarters of an octave: six bits a symbol.
_LEVEL_BITS = 6
_TOP_LEVEL = (1 << _LEVEL_BITS) - 1
_LEVELS = [0] + [max(1, round(_TOTAL * 2 ** (-level / 4))) for level in range(_TOP_LEVEL - 1)]
# Mean magnitudes of rows are told apart by octaves, within these.
_OCTAVES = (-6, 6)
# What a table costs beside its six bits a symbol, and a stream beside its tables.
_TABLE_BITS = 20
_STREAM_BITS = 56

_ZEROS, PLAIN, ROWS, COLUMNS, _BZIP2, _DEFLATE, _LZMA = range(7)
# What the library's coders gain over the range coder comes from repeats, and these a fast deflate sees as well: the
# slow ones are tried where it comes this close.
_LIBRARY_MARGIN = 1.15
_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


class Reader:
    """A position in a byte string."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise ValueError("payload is cut short")
        self.position += count
        return taken

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def unsigned(self) -> int:
        """A whole number, seven bits a byte."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def signed(self) -> int:
        """A whole number of either sign."""
        value = self.unsigned()
        return value >> 1 if value % 2 == 0 else -(value >> 1) - 1


def unsigned(value: int) -> bytes:
    """A whole number, seven bits a byte."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed(value: int) -> bytes:
    """A whole number of either sign."""
    return unsigned(2 * value if value >= 0 else -2 * value - 1)


def raw_bytes(tensor: Tensor) -> bytes:
    """The memory of a tensor, of any dtype."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """One-dimensional tensor of ``dtype`` over a copy of ``data``."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


# --- histograms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """Codes as ``(symbol + first) * 2^shift + low bits``."""

    symbols: Tensor
    first: int
    size: int
    shift: int

    @staticmethod
    def of(codes: Tensor) -> _Split:
        low, high = (int(bound) for bound in torch.aminmax(codes))
        limit = min(max(codes.numel() // _CODES_PER_SYMBOL, _ALPHABET[0]), _ALPHABET[1])
        shift = 0
        while (high >> shift) - (low >> shift) >= limit:
            shift += 1
        symbols = codes >> shift if shift else codes
        first = low >> shift
        return _Split(symbols - first, first, (high >> shift) - first + 1, shift)


def _histograms(split: _Split) -> Tensor:
    """Counts of each symbol in each row: ``(rows, symbols)``."""
    rows = split.symbols.shape[0]
    keys = split.symbols + torch.arange(rows).unsqueeze(1) * split.size
    return torch.bincount(keys.flatten(), minlength=rows * split.size).view(rows, split.size)


def _classes(counts: Tensor, first: int) -> Tensor:
    """For each row the index of its table: rows of mean magnitudes within one octave share one."""
    magnitudes = (torch.arange(counts.shape[1]) + first).abs().double()
    means = (counts.double() @ magnitudes) / counts.sum(1).clamp(min=1)
    octaves = means.log2().round().clamp(*_OCTAVES)
    octaves = torch.where(means > 0, octaves, torch.full_like(octaves, _OCTAVES[0] - 1))
    classes: Tensor = torch.unique(octaves, return_inverse=True)[1]
    return classes


def _gather(counts: Tensor, classes: Tensor) -> Tensor:
    """Counts of each symbol in each class."""
    return torch.zeros(int(classes.max()) + 1, counts.shape[1], dtype=counts.dtype).index_add_(0, classes, counts)


def _bits(counts: Tensor) -> float:
    """Bits of the symbols under their own tables, and of the tables: ``counts`` is ``(classes, symbols)``."""
    counts = counts.double()
    sums = counts.sum(1)
    entropy = torch.special.xlogy(sums, sums).sum() - torch.special.xlogy(counts, counts).sum()
    present = (counts > 0).to(torch.uint8)
    spans = counts.shape[1] - present.argmax(1) - present.flip(1).argmax(1)
    tables = counts.shape[0] * _TABLE_BITS + _LEVEL_BITS * int((spans - 1).sum())
    return float(entropy) / math.log(2) + tables


def _context_bits(counts: Tensor, first: int) -> float:
    """Bits with a table for each class of rows, the classes themselves included."""
    classes = _classes(counts, first)
    return _bits(_gather(counts, classes)) + _bits(torch.bincount(classes).unsqueeze(0)) + _STREAM_BITS / 2


def predicted(codes: Tensor, contexts: int | None = None) -> tuple[float, int]:
    """Bits of :func:`pack` without packing, to a percent or so, and the contexts that give the fewest.

    Args:
        codes: ``(rows, columns)`` int64.
        contexts: ``PLAIN``, ``ROWS`` or ``COLUMNS``; by default all are tried.
    """
    if codes.numel() == 0:
        return 0.0, PLAIN
    split = _Split.of(codes)
    if split.size == 1 and split.first == 0 and split.shift == 0:
        return 8.0, PLAIN
    if codes.shape[0] == 1 or contexts == PLAIN:
        options = [(_bits(torch.bincount(split.symbols.flatten(), minlength=split.size).unsqueeze(0)), PLAIN)]
    else:
        options = []
        if contexts != COLUMNS:
            counts = _histograms(split)
            options += [(_bits(counts.sum(0, keepdim=True)), PLAIN), (_context_bits(counts, split.first), ROWS)]
        if contexts != ROWS and codes.shape[1] > 1:
            transposed = _Split(split.symbols.T, split.first, split.size, split.shift)
            options.append((_context_bits(_histograms(transposed), split.first), COLUMNS))
    bits, best = min(options)
    return bits + split.shift * codes.numel() + _STREAM_BITS, best


# Magnitudes that bzip2 is taken to tell apart in what stands beside a code, and the class of each up to the last.
_NEIGHBOURS = (1, 3, 7, 15, 31, 63)
_CLASS_OF = torch.bucketize(torch.arange(_NEIGHBOURS[-1] + 1), torch.tensor(_NEIGHBOURS), right=True).to(torch.int32)


def neighbour_counts(arrays: Sequence[Tensor], shift: int) -> tuple[int, Tensor]:
    """How often each code stands before a code of each class of magnitudes: the least code, and ``(classes, codes)``.

    bzip2 sorts by what follows, so that what it can know of a number is the next one: entropies of these counts predict
    its size, where plain ones overrate matrices whose rows differ and underrate factors.

    Args:
        arrays: Codes, at least one.
        shift: Low bits of the codes that are left out.
    """
    codes = torch.cat([array.flatten() for array in arrays]).to(torch.int32)
    following = _CLASS_OF.index_select(0, codes.roll(-1).abs_().clamp_(max=_NEIGHBOURS[-1]))
    symbols = codes >> shift if shift else codes
    first, last = (int(bound) for bound in torch.aminmax(symbols))
    size = last - first + 1
    counts = torch.bincount(following.mul_(size).add_(symbols).sub_(first), minlength=(len(_NEIGHBOURS) + 1) * size)
    return first, counts.view(-1, size)


def pooled_bits(tables: Sequence[tuple[int, Tensor]]) -> float:
    """Bits of the codes that were counted, under one table for each class over all of them."""
    low = min(first for first, _ in tables)
    high = max(first + counts.shape[1] for first, counts in tables)
    pool = torch.zeros(len(_NEIGHBOURS) + 1, high - low, dtype=torch.float64)
    for first, counts in tables:
        pool[:, first - low : first - low + counts.shape[1]] += counts
    sums = pool.sum(1)
    return float(torch.special.xlogy(sums, sums).sum() - torch.special.xlogy(pool, pool).sum()) / math.log(2)


# --- tables -----------------------------------------------------------------------------------------------------------


def _frequencies(levels: list[int]) -> list[int]:
    """Frequencies summing to ``2^14`` from their stored logarithms; the symbol marked as top takes what is left."""
    frequencies = [0 if level == _TOP_LEVEL else _LEVELS[level] for level in levels]
    while sum(frequencies) >= _TOTAL:
        frequencies = [max(1, 15 * frequency // 16) if frequency else 0 for frequency in frequencies]
    frequencies[levels.index(_TOP_LEVEL)] = _TOTAL - sum(frequencies)
    return frequencies


def _table_levels(counts: list[int]) -> list[int]:
    """Logarithms of the frequencies as they are stored."""
    total, top = sum(counts), counts.index(max(counts))
    levels = [0 if count == 0 else 1 + min(round(4 * math.log2(total / count)), _TOP_LEVEL - 2) for count in counts]
    levels[top] = _TOP_LEVEL
    return levels


def _write_table(counts: list[int]) -> tuple[bytes, list[int]]:
    """A table's bytes, and its frequencies."""
    present = [symbol for symbol, count in enumerate(counts) if count]
    start, stop = present[0], present[-1] + 1
    levels = _table_levels(counts[start:stop])
    head = unsigned(start) + unsigned(len(levels))
    frequencies = [0] * start + _frequencies(levels) + [0] * (len(counts) - stop)
    return head + (_pack_bits(levels, _LEVEL_BITS) if len(levels) > 1 else b""), frequencies


def _read_table(reader: Reader, size: int) -> list[int]:
    start, count = reader.unsigned(), reader.unsigned()
    levels = _unpack_bits(reader, count, _LEVEL_BITS) if count > 1 else [_TOP_LEVEL]
    return [0] * start + _frequencies(levels) + [0] * (size - start - count)


def _pack_bits(values: list[int], width: int) -> bytes:
    """Whole numbers of ``width`` bits each, the first lowest."""
    packed = b"".join(
        sum(value << (width * place) for place, value in enumerate(values[start : start + 8])).to_bytes(width, "little")
        for start in range(0, len(values), 8)
    )
    return packed[: (len(values) * width + 7) // 8]


def _unpack_bits(reader: Reader, count: int, width: int) -> list[int]:
    data = reader.take((count * width + 7) // 8)
    mask = (1 << width) - 1
    values: list[int] = []
    for start in range(0, len(data), width):
        word = int.from_bytes(data[start : start + width], "little")
        values.extend(word >> (width * place) & mask for place in range(8))
    return values[:count]


# --- rANS -------------------------------------------------------------------------------------------------------------


def _rans_encode(starts: Tensor, frequencies: Tensor) -> bytes:
    """The state (4 bytes) and the words of an asymmetric numeral system, in the order the decoder reads them."""
    state = _STATE
    words: list[int] = []
    limits = frequencies << (32 - _PRECISION)
    reverse = (part.flip(0).tolist() for part in (starts, frequencies, limits))
    for start, frequency, limit in zip(*reverse, strict=True):
        if state >= limit:
            words.append(state & 0xFFFF)
            state >>= 16
        state = (state // frequency << _PRECISION) + state % frequency + start
    words.reverse()
    return unsigned(len(words)) + state.to_bytes(4, "little") + raw_bytes(torch.tensor(words).to(torch.uint16))


def _rans_decode(reader: Reader, classes: list[int], tables: list[list[int]]) -> list[int]:
    """Symbols, one for each entry of ``classes``, which names the table it was coded with."""
    count = reader.unsigned()
    state = int.from_bytes(reader.take(4), "little")
    words = iter(from_bytes(reader.take(2 * count), torch.uint16).tolist())
    slots = [[symbol for symbol, frequency in enumerate(table) for _ in range(frequency)] for table in tables]
    starts = [[sum(table[:symbol]) for symbol in range(len(table))] for table in tables]
    symbols: list[int] = []
    for index in classes:
        slot = state & (_TOTAL - 1)
        symbol = slots[index][slot]
        symbols.append(symbol)
        frequency = tables[index][symbol]
        if frequency < _TOTAL:  # a sure symbol was never coded
            state = frequency * (state >> _PRECISION) + slot - starts[index][symbol]
            if state < _STATE:
                state = state << 16 | next(words)
    return symbols


def _pack_rans(codes: Tensor, contexts: int) -> bytes:
    """Shift, alphabet, classes, tables, state, words, low bits."""
    split = _Split.of(codes)
    counts = _histograms(split)
    head = bytes([split.shift]) + signed(split.first) + unsigned(split.size)
    if contexts == PLAIN:
        classes = torch.zeros(codes.shape[0], dtype=torch.int64)
    else:
        classes = _classes(counts, split.first)
        head += pack(classes.unsqueeze(0), PLAIN)
    tables = [_write_table(row) for row in _gather(counts, classes).tolist()]
    frequencies = torch.tensor([table for _, table in tables])
    starts = frequencies.cumsum(1) - frequencies
    keys = (split.symbols + classes.unsqueeze(1) * split.size).flatten()
    chosen = frequencies.flatten()[keys]
    coded = chosen < _TOTAL
    body = _rans_encode(starts.flatten()[keys][coded], chosen[coded])
    low = (codes & ((1 << split.shift) - 1)).flatten().tolist() if split.shift else []
    return head + b"".join(table for table, _ in tables) + body + (_pack_bits(low, split.shift) if low else b"")


def _unpack_rans(reader: Reader, rows: int, columns: int, contexts: int) -> Tensor:
    shift, first, size = reader.byte(), reader.signed(), reader.unsigned()
    classes = torch.zeros(rows, dtype=torch.int64)
    if contexts != PLAIN:
        classes = unpack(reader, 1, rows)[0]
    tables = [_read_table(reader, size) for _ in range(int(classes.max()) + 1)]
    symbols = _rans_decode(reader, classes.repeat_interleave(columns).tolist(), tables)
    codes = (torch.tensor(symbols).view(rows, columns) + first) << shift
    if shift:
        codes = codes | torch.tensor(_unpack_bits(reader, rows * columns, shift)).view(rows, columns)
    return codes


# --- the choice -------------------------------------------------------------------------------------------------------


def _lzma_filters(size: int) -> list[dict[str, int]]:
    return [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, 1 << (size - 1).bit_length())}]


def _lzma_compress(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_lzma_filters(len(data)))


def _lzma_decompress(data: bytes, size: int) -> bytes:
    return lzma.decompress(data, lzma.FORMAT_RAW, filters=_lzma_filters(size))


def deflate(data: bytes, level: int = 9) -> bytes:
    """A raw deflate stream, without the header and the checksum of zlib."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15)
    return compressor.compress(data) + compressor.flush()


def inflate(data: bytes) -> bytes:
    """What :func:`deflate` was given."""
    return zlib.decompress(data, -15)


_Compress = Callable[[bytes], bytes]
_Decompress = Callable[[bytes, int], bytes]
_LIBRARY: dict[int, tuple[_Compress, _Decompress]] = {
    _BZIP2: (bz2.compress, lambda data, _: bz2.decompress(data)),
    _DEFLATE: (deflate, lambda data, _: inflate(data)),
    _LZMA: (_lzma_compress, _lzma_decompress),
}


def pack(codes: Tensor, contexts: int | None = None) -> bytes:
    """The shortest of the streams that hold ``codes``; the first byte says which it is.

    Args:
        codes: ``(rows, columns)`` int64 of magnitudes below 2^62.
        contexts: Which of the range coder's contexts to use; by default those that promise the fewest bits.
    """
    if codes.numel() == 0 or not codes.any():
        return bytes([_ZEROS])
    if contexts is None:
        contexts = predicted(codes)[1]
    streams = [bytes([contexts]) + _pack_rans(codes.T if contexts == COLUMNS else codes, contexts)]
    largest = int(codes.abs().max())
    width = next(index for index, dtype in enumerate(_DTYPES) if largest <= torch.iinfo(dtype).max)
    data = raw_bytes(codes.to(_DTYPES[width]))
    if len(deflate(data, 1)) < _LIBRARY_MARGIN * len(streams[0]):
        for method, (compress, _) in _LIBRARY.items():
            body = compress(data)
            streams.append(bytes([method | width << 4]) + unsigned(len(body)) + body)
    return min(streams, key=len)


def unpack(reader: Reader, rows: int, columns: int) -> Tensor:
    """The codes that :func:`pack` was given."""
    head = reader.byte()
    method, dtype = head & 15, _DTYPES[head >> 4]
    if method == _ZEROS:
        return torch.zeros(rows, columns, dtype=torch.int64)
    if method in (PLAIN, ROWS):
        return _unpack_rans(reader, rows, columns, method)
    if method == COLUMNS:
        return _unpack_rans(reader, columns, rows, method).T
    if method not in _LIBRARY:
        raise ValueError(f"payload names an unknown coder, {method}")
    data = _LIBRARY[method][1](reader.take(reader.unsigned()), rows * columns * dtype.itemsize)
    return from_bytes(data, dtype).view(rows, columns).long()
