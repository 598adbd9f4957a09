"""The state of a metric as tensors and plain Python: ``Metric.state_dict`` is empty unless persistent, and lacks the count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

__all__ = ["metric_state", "restore_metric"]


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
    if not isinstance(states, Mapping) or set(states) != set(metric._defaults) or not isinstance(updates, int):
        raise ValueError(f"The saved state does not belong to a {type(metric).__name__}.")
    for name, value in states.items():
        setattr(metric, name, _copy(value, metric.device))
    metric._update_count = updates
    metric._computed = None


def _copy(value: Any, device: torch.device | str = "cpu") -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list):
        return [_copy(item, device) for item in value]
    return value
