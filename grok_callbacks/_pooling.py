"""Max pooling in the passes over the probe: the same values, sooner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["quick_pooling"]

_OWN = nn.MaxPool2d.forward


@contextmanager
def quick_pooling(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have max-pooling layers take rows and columns one after the other, without their indices.

    On the CPU torch looks for the place of each maximum too, one entry at a time unless channels come last. With the windows of
    common networks the maxima alone are to be had 5 to 14 times sooner (benchmarks/results/pooling.md).

    Args:
        modules: The model's; without a pooling layer among them nothing is done.
    """
    # Of the class for the while: what is set on a layer itself would go along with a copy of it.
    is_wanted = nn.MaxPool2d.forward is _OWN and any(isinstance(module, nn.MaxPool2d) for module in modules)
    if is_wanted:
        nn.MaxPool2d.forward = _forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if is_wanted:
            nn.MaxPool2d.forward = _OWN  # type: ignore[method-assign]


def _forward(layer: nn.MaxPool2d, *args: Any, **kwargs: Any) -> Any:
    images: Any = args[0] if len(args) == 1 and not kwargs else None
    given = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    settings = [pair for pair in map(_pair, given) if pair is not None]
    if not _is_plain(layer, images) or len(settings) < len(given) or not _fits(images.shape[-2:], settings):
        return _OWN(layer, *args, **kwargs)
    sizes, strides, (vertical, horizontal), dilations = settings
    if vertical or horizontal:
        images = nn.functional.pad(images, (horizontal, horizontal, vertical, vertical), value=-torch.inf)
    # Rows first: these maxima are of long stretches of memory.
    for dim, size, stride, dilation in zip((-2, -1), sizes, strides, dilations, strict=True):
        images = _maxima(images, dim, size, stride, dilation)
    # As torch's are, so that a view of them can be taken.
    return images.contiguous()


def _is_plain(layer: nn.MaxPool2d, images: Any) -> bool:
    of_its_own = layer.return_indices or layer.ceil_mode
    # Of equal entries torch's derivative is that of the first.
    derived = torch.is_grad_enabled() or forward_ad._current_level >= 0
    if type(images) is not Tensor or of_its_own or derived:
        return False
    # Where channels come last, torch is quick.
    return images.ndim == 4 and images.is_floating_point() and images.device.type == "cpu" and images.stride(-1) == 1


def _pair(setting: Any) -> tuple[int, int] | None:
    """A setting for rows and columns; ``None`` for others that torch may know what to do with."""
    if type(setting) is int:
        return setting, setting
    if type(setting) is tuple and len(setting) == 2 and all(type(each) is int for each in setting):
        return setting
    return None


def _fits(lengths: Sequence[int], settings: Sequence[Any]) -> bool:
    """Whether the windows are inside of the images (if not, torch has an error for it) and more than single entries."""
    sizes, strides, paddings, dilations = settings
    return max(sizes) > 1 and all(
        stride > 0 <= padding and dilation > 0 < size and 2 * padding <= size and dilation * (size - 1) < length + 2 * padding
        for length, size, stride, padding, dilation in zip(lengths, sizes, strides, paddings, dilations, strict=True)
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
