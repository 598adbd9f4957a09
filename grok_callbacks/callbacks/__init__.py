"""One Lightning callback for each measure, the detector, and the presets."""

from grok_callbacks.callbacks.detector import GrokkingDetector
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.callbacks.norm import NormMonitor
from grok_callbacks.callbacks.presets import default_callbacks
from grok_callbacks.callbacks.spectral_entropy import SpectralEntropyMonitor
from grok_callbacks.callbacks.weight_entropy import WeightEntropyMonitor

__all__ = [
    "GrokkingDetector",
    "Monitor",
    "NormMonitor",
    "SpectralEntropyMonitor",
    "WeightEntropyMonitor",
    "default_callbacks",
]
