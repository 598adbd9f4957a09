"""Every measure as a ``torchmetrics.Metric``, thin over :mod:`grok_callbacks.functional`."""

from grok_callbacks.metrics.li2 import FeatureLearning
from grok_callbacks.metrics.representation import (
    ClassDistanceRatio,
    LossOscillation,
    PredictionChurn,
    PredictionEntropy,
    RepresentationEntropy,
)

__all__ = [
    "ClassDistanceRatio",
    "FeatureLearning",
    "LossOscillation",
    "PredictionChurn",
    "PredictionEntropy",
    "RepresentationEntropy",
]
