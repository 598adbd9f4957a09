"""The state of a metric as tensors and plain Python: ``Metric.state_dict`` is empty unless persistent, and lacks the count."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from grok_callbacks._packing import Packed

__all__ = ["MetricState", "checksum", "metric_state", "restore_metric"]


def metric_state(metric: Metric | MetricCollection) -> dict[str, Any]:
    """What :func:`restore_metric` needs, copied to the CPU."""
    if isinstance(metric, MetricCollection):
        return {name: metric_state(member) for name, member in metric.items(keep_base=True, copy_state=False)}
    state = {name: _copy(getattr(metric, name)) for name in metric._defaults}
    return {"states": state, "updates": metric._update_count}


class MetricState:
    """:func:`metric_state` of one metric, packed anew only when a state has been written or replaced."""

    def __init__(self) -> None:
        self._packed = Packed()
        # Kept alive, or the identity of one that is gone could be another's.
        self._tensors: list[Tensor] = []

    def of(self, metric: Metric | MetricCollection) -> Tensor:
        """The packed state."""
        tensors = list(_tensors(metric))
        packed = self._packed.of(_version(metric, tensors), lambda: metric_state(metric))
        self._tensors = tensors
        return packed


def _version(metric: Metric | MetricCollection, tensors: Iterable[Tensor]) -> Hashable | None:
    try:
        versions = tuple((id(tensor), tensor._version) for tensor in tensors)
    except RuntimeError:  # Tensors of inference mode count no versions.
        return None
    return id(metric), versions, tuple(member._update_count for member in _members(metric))


def _members(metric: Metric | MetricCollection) -> Iterator[Metric]:
    if isinstance(metric, MetricCollection):
        for _, member in metric.items(keep_base=True, copy_state=False):
            yield from _members(member)
    else:
        yield metric


def _tensors(metric: Metric | MetricCollection) -> Iterator[Tensor]:
    for member in _members(metric):
        for name in member._defaults:
            state = getattr(member, name)
            yield from state if isinstance(state, list) else [state]


def restore_metric(metric: Metric | MetricCollection, state: Mapping[str, Any]) -> None:
    """Put a metric back to a saved state; members that the state does not know stay as they are.

    Raises:
        ValueError: If the state is of another kind of metric.
    """
    if isinstance(metric, MetricCollection):
        for name, member in metric.items(keep_base=True, copy_state=False):
            if name in state:
                restore_metric(member, state[name])
        return
    states, updates = state.get("states"), state.get("updates")
    if (
        not (isinstance(states, Mapping) and set(states) == set(metric._defaults) and isinstance(updates, int))
        or not all(_is_like(states[name], default) for name, default in metric._defaults.items())
    ):  # fmt: skip
        raise ValueError(f"The saved state does not belong to a {type(metric).__name__}.")
    for name, value in states.items():
        setattr(metric, name, _copy(value, metric.device))
    metric._update_count = updates
    metric._computed = None


def checksum(*parts: Any) -> int:
    """Of tensors and plain Python, however deep: the same after saving and loading, another if anything is another."""
    words: list[str] = []
    tensors: list[Tensor] = []
    _take_apart(parts, words, tensors)
    total = zlib.crc32("\n".join(words).encode())
    for tensor in tensors:
        # Not every type of tensor has one of numpy's.
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _take_apart(value: Any, words: list[str], tensors: list[Tensor]) -> None:
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        words.append(f"{type(value).__name__} {value!r}")
    elif isinstance(value, Mapping):
        words.append(f"{{{len(value)}")
        for key in sorted(value, key=str):
            _take_apart(key, words, tensors)
            _take_apart(value[key], words, tensors)
    elif isinstance(value, (list, tuple)):
        words.append(f"[{len(value)}")
        for item in value:
            _take_apart(item, words, tensors)
    elif type(value) is Tensor and value.layout is torch.strided and not value.is_quantized:
        plain = value.detach().cpu().contiguous()
        words.append(f"{plain.dtype} {tuple(plain.shape)}")
        tensors.append(plain)
    else:
        # What may look otherwise in another process stands for itself.
        words.append(type(value).__name__)


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, Tensor):
        return isinstance(value, Tensor) and (value.shape, value.dtype) == (default.shape, default.dtype)
    return isinstance(value, list) and all(isinstance(item, Tensor) for item in value)


def _copy(value: Any, device: torch.device | str = "cpu") -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list):
        return [_copy(item, device) for item in value]
    return value
