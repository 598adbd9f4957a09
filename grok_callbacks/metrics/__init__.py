"""Every measure as a ``torchmetrics.Metric``, thin over :mod:`grok_callbacks.functional`."""

from grok_callbacks.metrics.circuit import (
    CircuitComplexity,
)
from grok_callbacks.metrics.complexity import DescriptionLength
from grok_callbacks.metrics.early_signs import AnswerEntropy, GradientCoherence
from grok_callbacks.metrics.information import (
    MatrixEntropy,
    MatrixMutualInformation,
)
from grok_callbacks.metrics.li2 import FeatureLearning
from grok_callbacks.metrics.lmn import LinearMappingNumber
from grok_callbacks.metrics.norm import ParameterNorm
from grok_callbacks.metrics.representation import (
    ClassDistanceRatio,
    LossOscillation,
    PredictionChurn,
    PredictionEntropy,
    RepresentationEntropy,
)
from grok_callbacks.metrics.sparsity import (
    ActivationSparsity,
)
from grok_callbacks.metrics.spectral import SpectralEntropy
from grok_callbacks.metrics.symmetry import (
    Commutativity,
)
from grok_callbacks.metrics.weight_entropy import WeightEntropy

__all__ = [
    "ActivationSparsity",
    "AnswerEntropy",
    "CircuitComplexity",
    "ClassDistanceRatio",
    "Commutativity",
    "DescriptionLength",
    "FeatureLearning",
    "GradientCoherence",
    "LinearMappingNumber",
    "LossOscillation",
    "MatrixEntropy",
    "MatrixMutualInformation",
    "ParameterNorm",
    "PredictionChurn",
    "PredictionEntropy",
    "RepresentationEntropy",
    "SpectralEntropy",
    "WeightEntropy",
]
