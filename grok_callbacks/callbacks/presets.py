"""Ready-made lists of callbacks."""

from __future__ import annotations

from typing import Literal

from grok_callbacks.callbacks.detector import GrokkingDetector
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.callbacks.norm import NormMonitor
from grok_callbacks.callbacks.spectral_entropy import SpectralEntropyMonitor
from grok_callbacks.callbacks.weight_entropy import WeightEntropyMonitor
from grok_callbacks.probe import Probe
from grok_callbacks.schedule import Schedule

__all__ = ["PRESETS", "Preset", "default_callbacks"]

Preset = Literal["economy", "standard", "full"]

_ECONOMY: tuple[type[Monitor], ...] = (NormMonitor, WeightEntropyMonitor, SpectralEntropyMonitor)
_STANDARD: tuple[type[Monitor], ...] = _ECONOMY
_FULL: tuple[type[Monitor], ...] = _STANDARD

#: The monitors of each preset, in the order in which they measure; the detector comes last, since it reads what they found.
PRESETS: dict[str, tuple[type[Monitor], ...]] = {
    "economy": (*_ECONOMY, GrokkingDetector),
    "standard": (*_STANDARD, GrokkingDetector),
    "full": (*_FULL, GrokkingDetector),
}


def default_callbacks(
    preset: Preset = "standard",
    *,
    probe: Probe | None = None,
    schedule: Schedule | None = None,
    budget: float | None = None,
) -> list[Monitor]:
    """The callbacks to pass to a Trainer. Monitors that do not apply to the model are left out with a warning.

    Args:
        preset: ``"economy"`` (norms, weight and spectral entropy, detector), ``"standard"`` or ``"full"``.
        probe: The samples to look at; by default drawn from the Trainer's data.
        schedule: When to measure; log-spaced by default.
        budget: The share of the training time that all of them may take together; no limit by default.

    Returns:
        A new list of monitors.

    Raises:
        ValueError: If there is no such preset.

    Example:
        >>> [type(callback).__name__ for callback in default_callbacks("economy")]
        ['NormMonitor', 'WeightEntropyMonitor', 'SpectralEntropyMonitor', 'GrokkingDetector']
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {list(PRESETS)}, got {preset!r}.")
    classes = PRESETS[preset]
    share = None if budget is None else budget / len(classes)
    callbacks = [make(probe=probe, schedule=schedule, budget=share) for make in classes]
    for callback in callbacks:
        callback.optional = True
    return callbacks
