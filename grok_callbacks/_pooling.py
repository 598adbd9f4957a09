"""Max pooling in the passes over the probe: the same values, sooner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["quick_pooling"]


@contextmanager
def quick_pooling(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have the max-pooling layers among ``modules`` take rows and columns one after the other, without their indices.

    On the CPU torch looks for the place of each maximum too, one entry at a time unless channels come last. That is five to ten
    times slower than the maxima alone, and most of what a small convolutional network does in a pass without gradients.
    """
    layers = [layer for layer in modules if type(layer) is nn.MaxPool2d and "forward" not in vars(layer)]
    for layer in layers:
        vars(layer)["forward"] = partial(_pooled, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _pooled(layer: nn.MaxPool2d, images: Tensor) -> Tensor:
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    sizes, strides, paddings, dilations = map(_pair, settings)
    if not _is_plain(layer, images) or not _fits(images.shape[-2:], sizes, paddings, dilations):
        largest: Tensor = nn.MaxPool2d.forward(layer, images)
        return largest
    if any(paddings):
        vertical, horizontal = paddings
        images = nn.functional.pad(images, (horizontal, horizontal, vertical, vertical), value=-torch.inf)
    # Rows first: these maxima are of long stretches of memory.
    for dim, size, stride, dilation in zip((-2, -1), sizes, strides, dilations, strict=True):
        images = _maxima(images, dim, size, stride, dilation)
    return images


def _is_plain(layer: nn.MaxPool2d, images: Tensor) -> bool:
    of_its_own = layer.return_indices or layer.ceil_mode or torch.is_grad_enabled()
    plain = type(images) is Tensor and images.ndim == 4 and images.is_floating_point() and images.device.type == "cpu"
    # Where channels come last, torch is quick.
    return plain and not of_its_own and images.stride(-1) == 1


def _fits(lengths: Sequence[int], sizes: Sequence[int], paddings: Sequence[int], dilations: Sequence[int]) -> bool:
    """Whether the windows are inside of the images; if not, torch has an error for it."""
    return all(
        2 * padding <= size and dilation * (size - 1) < length + 2 * padding
        for length, size, padding, dilation in zip(lengths, sizes, paddings, dilations, strict=True)
    )


def _maxima(values: Tensor, dim: int, size: int, stride: int, dilation: int) -> Tensor:
    """The largest of each ``size`` entries, ``dilation`` apart, that begin ``stride`` apart along a dimension."""
    last = (values.shape[dim] - dilation * (size - 1) - 1) // stride * stride
    windows = [values.narrow(dim, dilation * k, last + 1) for k in range(size)]
    every = (..., slice(None, None, stride), slice(None)) if dim == -2 else (..., slice(None, None, stride))
    largest = windows[0][every]
    for window in windows[1:]:
        # As in torch's pooling, what is not a number wins.
        largest = torch.maximum(largest, window[every])
    return largest


def _pair(setting: int | tuple[int, ...]) -> tuple[int, ...]:
    return (setting, setting) if isinstance(setting, int) else tuple(setting)
