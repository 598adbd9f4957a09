"""Diagnostics of grokking for PyTorch Lightning: is a run memorising, compressing, or about to generalise?

Importing the package is light: names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_CORE = {
    "history": ("History", "Series"),
    "probe": ("Batch", "Probe"),
    "recorder": ("Recorder",),
    "schedule": ("AtValidation", "Budget", "EveryEpoch", "EverySteps", "LogSpaced", "Schedule"),
    "snapshot": ("ModelView", "Snapshot"),
}
# Whatever these export by name is importable from here: a new monitor or mixin is named once, in its own package.
_PACKAGES = ("callbacks", "mixins")
_FUNCTIONS = ("default_callbacks", "mixins_of", "with_mixins")


def _home_of(name: str) -> str | None:
    core = next((module for module, names in _CORE.items() if name in names), None)
    return core or next((package for package in _PACKAGES if name in import_module(f"{__name__}.{package}").__all__), None)


def __getattr__(name: str) -> Any:
    if name == "__all__":
        exported = [public for package in _PACKAGES for public in import_module(f"{__name__}.{package}").__all__]
        return ["__version__", *sorted({*exported, *(public for names in _CORE.values() for public in names)})]
    # Submodules and private names are looked for here too, and must not load Lightning.
    home = None if name.startswith("_") or (name.islower() and name not in _FUNCTIONS) else _home_of(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return list(__getattr__("__all__"))


if TYPE_CHECKING:
    from grok_callbacks.callbacks import *
    from grok_callbacks.history import *
    from grok_callbacks.mixins import *
    from grok_callbacks.probe import *
    from grok_callbacks.recorder import *
    from grok_callbacks.schedule import *
    from grok_callbacks.snapshot import *
