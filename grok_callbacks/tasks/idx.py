"""MNIST from the files in which it is distributed: the IDX format, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

Labelled = tuple[Tensor, Tensor]

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path) -> Tensor:
    """Contents of an IDX file of unsigned bytes.

    The format: two zero bytes, a byte for the type of the elements, a byte for the number of dimensions, each dimension as a
    big-endian 32-bit number, then the elements.

    Args:
        path: The file; whether it is compressed is told from its first bytes, not from its name.

    Returns:
        uint8, in the shape that the file states.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an IDX file of unsigned bytes, or is shorter or longer than it states.
    """
    path = Path(path)
    content = _uncompressed(path)
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path} is not an IDX file: it begins with {content[:4].hex(' ') or 'nothing'} instead of 00 00.")
    if content[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path} holds elements of the IDX type {content[2]:#04x}; only unsigned bytes (0x08) can be read.")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ValueError(f"{path} is truncated: {len(content)} bytes, of which the header alone takes {header}.")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) != expected:
        state = "truncated" if len(content) < expected else "too long"
        raise ValueError(f"{path} is {state}: {len(content)} bytes instead of {expected} for the shape {shape}.")
    # A bytearray, since a tensor can be written to and bytes can't.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(shape)


def load_mnist(folder: str | Path) -> tuple[Labelled, Labelled]:
    """MNIST, or a data set in the same four files.

    Args:
        folder: Where ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte`` and
            ``t10k-labels-idx1-ubyte`` are, each plain or with ``.gz`` at its end.

    Returns:
        Training images ``(n, 1, height, width)``, float32 in [0, 1], and their classes ``(n,)``, int64; the same for testing.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
        ValueError: If a file is damaged or of another kind, images and labels don't match, or a label is above 9.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    train, test = _labelled(folder, "train"), _labelled(folder, "t10k")
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = " and ".join(str(tuple(images.shape[2:])) for images, _ in (train, test))
        raise ValueError(f"Training and test images in {folder} differ in size: {shapes}.")
    return train, test


def _labelled(folder: Path, part: str) -> Labelled:
    images = _read_part(folder, f"{part}-images-idx3-ubyte", 3)
    labels = _read_part(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"There are {len(images)} images and {len(labels)} labels for {part} in {folder}.")
    if labels.max() > 9:
        raise ValueError(f"The labels for {part} in {folder} go up to {int(labels.max())}; digits go up to 9.")
    return images.float().unsqueeze(1) / 255, labels.long()


def _read_part(folder: Path, name: str, dimensions: int) -> Tensor:
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"There is neither {name} nor {name}.gz in {folder}.")
    values = read_idx(path)
    if values.ndim != dimensions:
        raise ValueError(f"{path} has the shape {tuple(values.shape)}, not {dimensions} dimension(s): is it another file?")
    return values


def _uncompressed(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} can't be uncompressed, it is truncated or damaged: {error}") from error
