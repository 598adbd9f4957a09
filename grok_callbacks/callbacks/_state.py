"""The state of a metric as tensors and plain Python: ``Metric.state_dict`` is empty unless persistent, and lacks the count."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import ref

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
    """:func:`metric_state` of one metric, packed anew only when a state has been written or replaced.

    Writes that torch does not count (through ``.data`` or numpy) are noticed at the next that it does.
    """

    def __init__(self) -> None:
        self._packed = Packed()
        self._changes = 0
        self._seen: list[tuple[Any, ...]] | None = None

    def of(self, metric: Metric | MetricCollection) -> Tensor:
        """The packed state."""
        seen = _looked_at(metric)
        if seen is None or seen != self._seen:
            self._changes, self._seen = self._changes + 1, seen
        return self._packed.of(self._changes, lambda: metric_state(metric))


def _looked_at(metric: Metric | MetricCollection) -> list[tuple[Any, ...]] | None:
    """Where which tensors stand and how often they were written, ``None`` where nobody counts."""
    seen: list[tuple[Any, ...]] = []
    for name_of_member, member in _members(metric):
        seen.append((name_of_member, type(member), member._update_count))
        for name in member._defaults:
            state = getattr(member, name)
            is_list = isinstance(state, list)
            for value in state if is_list else [state]:
                # Tensors of inference mode count no writes, and a user's metric may keep other things.
                if not isinstance(value, Tensor) or value.is_inference():
                    return None
                # References that keep nothing alive: a metric's old state would stay in memory with its new one.
                seen.append((name, is_list, _Same(value), value._version))
    return seen


class _Same:
    """Equal to another of the very same tensor, and to none once that is gone."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = ref(tensor)

    def __eq__(self, other: object) -> bool:
        tensor = self._tensor()
        return isinstance(other, _Same) and tensor is not None and other._tensor() is tensor

    __hash__ = None  # type: ignore[assignment]


def _members(metric: Metric | MetricCollection, name: str = "") -> Iterator[tuple[str, Metric]]:
    if isinstance(metric, MetricCollection):
        for inner, member in metric.items(keep_base=True, copy_state=False):
            yield from _members(member, f"{name}/{inner}")
    else:
        yield name, metric


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
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
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
