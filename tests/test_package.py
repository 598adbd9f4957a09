"""The package's face: light to import, complete, and documented."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import grok_callbacks
from grok_callbacks import Monitor, default_callbacks
from grok_callbacks.callbacks.presets import PRESETS, preset_monitors


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, grok_callbacks; grok_callbacks.LogSpaced; "
        "print([name for name in ('torch', 'lightning', 'pytorch_lightning', 'torchmetrics', 'matplotlib', 'tensorboard') "
        "if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_all_names_load():
    for name in dir(grok_callbacks):
        assert getattr(grok_callbacks, name) is not None
    with pytest.raises(AttributeError, match="Nonsense"):
        grok_callbacks.Nonsense  # noqa: B018


def every_monitor():
    """Monitors found by looking into every module, not by asking for the exported ones."""
    package = importlib.import_module("grok_callbacks.callbacks")
    modules = [importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return sorted((cls for cls in found if issubclass(cls, Monitor) and cls is not Monitor), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("monitor", every_monitor(), ids=lambda cls: cls.__name__)
def test_monitor_is_exported_and_says_what_it_logs_and_costs(monitor):
    assert getattr(grok_callbacks, monitor.__name__) is monitor
    assert monitor.__name__ in grok_callbacks.__all__
    doc = monitor.__doc__
    assert "| key | value |" in doc
    assert "Cost" in doc
    assert "Args:" in doc
    assert monitor.preset is None or monitor.preset in PRESETS


def test_each_preset_holds_the_one_before_it():
    monitors = [preset_monitors(preset) for preset in PRESETS]
    assert set(monitors[0]) <= set(monitors[1]) <= set(monitors[2])
    assert {cls.__name__ for cls in monitors[0]} == {
        "GrokkingDetector",
        "NormMonitor",
        "SpectralEntropyMonitor",
        "WeightEntropyMonitor",
    }
    for preset, classes in zip(PRESETS, monitors, strict=True):
        callbacks = default_callbacks(preset)
        assert [type(callback) for callback in callbacks] == classes
        assert all(callback.optional for callback in callbacks)
    with pytest.raises(ValueError, match="`preset` must be one of"):
        default_callbacks("everything")


def test_a_budget_is_shared():
    callbacks = default_callbacks("economy", budget=0.02)
    assert {callback.budget for callback in callbacks} == {callbacks[0].budget}
    assert callbacks[0].budget.share == 0.02
