"""One Lightning callback for each measure, the detector, and the presets.

A monitor that is named here is importable from :mod:`grok_callbacks` and belongs to the presets that its class names.
"""

from grok_callbacks.callbacks.activation_sparsity import ActivationSparsityMonitor
from grok_callbacks.callbacks.circuit_complexity import CircuitComplexityMonitor
from grok_callbacks.callbacks.commutativity import CommutativityMonitor
from grok_callbacks.callbacks.complexity import ComplexityMonitor
from grok_callbacks.callbacks.detector import GrokkingDetector
from grok_callbacks.callbacks.feature_learning import FeatureLearningMonitor
from grok_callbacks.callbacks.forecast import GrokkingForecast
from grok_callbacks.callbacks.gradient_coherence import GradientCoherenceMonitor
from grok_callbacks.callbacks.group_law import GroupLawMonitor
from grok_callbacks.callbacks.linear_mapping_number import LinearMappingNumberMonitor
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.callbacks.norm import NormMonitor
from grok_callbacks.callbacks.presets import default_callbacks
from grok_callbacks.callbacks.representation import RepresentationMonitor
from grok_callbacks.callbacks.robustness import RobustnessMonitor
from grok_callbacks.callbacks.spectral_entropy import SpectralEntropyMonitor
from grok_callbacks.callbacks.truncation import TruncationMonitor
from grok_callbacks.callbacks.weight_entropy import WeightEntropyMonitor

__all__ = [
    "ActivationSparsityMonitor",
    "CircuitComplexityMonitor",
    "CommutativityMonitor",
    "ComplexityMonitor",
    "FeatureLearningMonitor",
    "GradientCoherenceMonitor",
    "GrokkingDetector",
    "GrokkingForecast",
    "GroupLawMonitor",
    "LinearMappingNumberMonitor",
    "Monitor",
    "NormMonitor",
    "RepresentationMonitor",
    "RobustnessMonitor",
    "SpectralEntropyMonitor",
    "TruncationMonitor",
    "WeightEntropyMonitor",
    "default_callbacks",
]
