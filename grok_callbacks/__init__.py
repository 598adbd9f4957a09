"""Diagnostics of grokking for PyTorch Lightning: is a run memorising, compressing, or about to generalise?

Importing the package is light: names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "grok_callbacks.callbacks": (
        "GrokkingDetector",
        "Monitor",
        "NormMonitor",
        "SpectralEntropyMonitor",
        "WeightEntropyMonitor",
        "default_callbacks",
    ),
    "grok_callbacks.history": ("History", "Series"),
    "grok_callbacks.probe": ("Batch", "Probe"),
    "grok_callbacks.recorder": ("Recorder",),
    "grok_callbacks.schedule": ("AtValidation", "EveryEpoch", "EverySteps", "LogSpaced", "Schedule"),
    "grok_callbacks.snapshot": ("ModelView", "Snapshot"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from grok_callbacks.callbacks import *
    from grok_callbacks.history import *
    from grok_callbacks.probe import *
    from grok_callbacks.recorder import *
    from grok_callbacks.schedule import *
    from grok_callbacks.snapshot import *
