"""Every measure as a pure function of tensors: no state, no Lightning."""

from grok_callbacks.functional.li2 import (
    Li2Stage,
    center,
    feature_energy,
    feature_gradient,
    gradient_scale,
    largest_feature_cosine,
    lazy_alignment,
    participation_ratio,
    relative_change,
    residual_alignment,
    residual_ratio,
    ridge_distance,
    ridge_solution,
    ridge_strength,
)
from grok_callbacks.functional.representation import (
    class_distance_ratio,
    loss_oscillation,
    prediction_churn,
    prediction_entropy,
    representation_entropy,
)

__all__ = [
    "Li2Stage",
    "center",
    "class_distance_ratio",
    "feature_energy",
    "feature_gradient",
    "gradient_scale",
    "largest_feature_cosine",
    "lazy_alignment",
    "loss_oscillation",
    "participation_ratio",
    "prediction_churn",
    "prediction_entropy",
    "relative_change",
    "representation_entropy",
    "residual_alignment",
    "residual_ratio",
    "ridge_distance",
    "ridge_solution",
    "ridge_strength",
]
