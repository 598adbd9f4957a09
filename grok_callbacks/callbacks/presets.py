"""Ready-made lists of callbacks."""

from __future__ import annotations

from typing import get_args

import grok_callbacks.callbacks as _callbacks
from grok_callbacks.callbacks.monitor import Monitor, Preset
from grok_callbacks.probe import Probe
from grok_callbacks.schedule import Budget, Schedule

__all__ = ["PRESETS", "default_callbacks", "preset_monitors"]

#: From the cheapest to the most complete; each holds the one before it.
PRESETS: tuple[Preset, ...] = get_args(Preset)


def preset_monitors(preset: Preset) -> list[type[Monitor]]:
    """The monitors that say that they belong to this preset or to a smaller one, smaller ones first.

    Raises:
        ValueError: If there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {list(PRESETS)}, got {preset!r}.")
    exported = [getattr(_callbacks, name) for name in _callbacks.__all__]
    monitors = [value for value in exported if isinstance(value, type) and issubclass(value, Monitor)]
    return [monitor for rank in PRESETS[: PRESETS.index(preset) + 1] for monitor in monitors if monitor.preset == rank]


def default_callbacks(
    preset: Preset = "standard",
    *,
    probe: Probe | None = None,
    schedule: Schedule | None = None,
    budget: float | Budget | None = None,
) -> list[Monitor]:
    """The callbacks to pass to a Trainer. Monitors that do not apply to the model are left out with a warning.

    Args:
        preset: ``"economy"`` (norms, weight and spectral entropy, detector), ``"standard"`` or ``"full"``.
        probe: The samples to look at; by default drawn from the Trainer's data.
        schedule: When to measure; log-spaced by default.
        budget: The share of the training time that their measurements may take together, see
            :class:`~grok_callbacks.Budget`; no limit by default.

    Returns:
        A new list of monitors.

    Raises:
        ValueError: If there is no such preset.

    Example:
        >>> [type(callback).__name__ for callback in default_callbacks("economy")]
        ['GrokkingDetector', 'NormMonitor', 'SpectralEntropyMonitor', 'WeightEntropyMonitor']
    """
    classes = preset_monitors(preset)
    together = Budget.of(budget)
    callbacks = [make(probe=probe, schedule=schedule, budget=together) for make in classes]
    for callback in callbacks:
        callback.optional = True
    return callbacks
