"""The state of a metric as tensors and plain Python: ``Metric.state_dict`` is empty unless persistent, and lacks the count."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

__all__ = ["checksum", "metric_state", "restore_metric"]


def metric_state(metric: Metric | MetricCollection) -> dict[str, Any]:
    """What :func:`restore_metric` needs, copied to the CPU."""
    if isinstance(metric, MetricCollection):
        return {name: metric_state(member) for name, member in metric.items(keep_base=True, copy_state=False)}
    state = {name: _copy(getattr(metric, name)) for name in metric._defaults}
    return {"states": state, "updates": metric._update_count}


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
    total = 0
    for chunk in _chunks(parts):
        total = zlib.crc32(chunk, total)
    return total


def _chunks(value: Any) -> Iterator[bytes]:
    if type(value) is Tensor and value.layout is torch.strided and not value.is_quantized:
        plain = value.detach().cpu().contiguous()
        yield f"{plain.dtype} {tuple(plain.shape)}".encode()
        # Not every type of tensor has one of numpy's.
        yield plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"{{{len(value)}".encode()
        for key in sorted(value, key=str):
            yield from _chunks(key)
            yield from _chunks(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _chunks(item)
    elif isinstance(value, (bool, int, float, str, bytes, type(None))):
        yield f"{type(value).__name__} {value!r}".encode()
    else:
        # What may look otherwise in another process stands for itself.
        yield type(value).__name__.encode()


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
