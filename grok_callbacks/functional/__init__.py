"""Every measure as a pure function of tensors: no state, no Lightning."""

from grok_callbacks.functional.circuit import (
    circuit_complexity,
    pruned_logits,
    pruning_masks,
)
from grok_callbacks.functional.complexity import (
    RateDistortion,
    StoredTensor,
    code_length,
    decode,
    encode,
    generalization_bound,
    naive_size,
    rate_distortion,
)
from grok_callbacks.functional.early_signs import answer_entropy, gradient_coherence, truncate_spectrum
from grok_callbacks.functional.information import (
    InputGradient,
    feature_entropy,
    feature_mutual_information,
    gram_matrix,
    matrix_entropy,
    matrix_mutual_information,
    mean_squared_input_gradient,
)
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
from grok_callbacks.functional.lmn import (
    LinearMappingEstimate,
    linear_connectivity,
    linear_mapping_number,
    linear_mapping_number_estimate,
)
from grok_callbacks.functional.norm import parameter_norm
from grok_callbacks.functional.representation import (
    class_distance_ratio,
    loss_oscillation,
    prediction_churn,
    prediction_confidence,
    prediction_entropy,
    representation_entropy,
)
from grok_callbacks.functional.sparsity import (
    activation_sparsity,
)
from grok_callbacks.functional.spectral import effective_rank, singular_values, spectral_entropy
from grok_callbacks.functional.spectral_penalty import spectral_entropy_penalty
from grok_callbacks.functional.symmetry import (
    associativity_agreement,
    commutativity,
    identity_agreement,
    inverse_agreement,
    logit_distance,
)
from grok_callbacks.functional.weight_entropy import weight_entropy

__all__ = [
    "InputGradient",
    "Li2Stage",
    "LinearMappingEstimate",
    "RateDistortion",
    "StoredTensor",
    "activation_sparsity",
    "answer_entropy",
    "associativity_agreement",
    "center",
    "circuit_complexity",
    "class_distance_ratio",
    "code_length",
    "commutativity",
    "decode",
    "effective_rank",
    "encode",
    "feature_energy",
    "feature_entropy",
    "feature_gradient",
    "feature_mutual_information",
    "generalization_bound",
    "gradient_coherence",
    "gradient_scale",
    "gram_matrix",
    "identity_agreement",
    "inverse_agreement",
    "largest_feature_cosine",
    "lazy_alignment",
    "linear_connectivity",
    "linear_mapping_number",
    "linear_mapping_number_estimate",
    "logit_distance",
    "loss_oscillation",
    "matrix_entropy",
    "matrix_mutual_information",
    "mean_squared_input_gradient",
    "naive_size",
    "parameter_norm",
    "participation_ratio",
    "prediction_churn",
    "prediction_confidence",
    "prediction_entropy",
    "pruned_logits",
    "pruning_masks",
    "rate_distortion",
    "relative_change",
    "representation_entropy",
    "residual_alignment",
    "residual_ratio",
    "ridge_distance",
    "ridge_solution",
    "ridge_strength",
    "singular_values",
    "spectral_entropy",
    "spectral_entropy_penalty",
    "truncate_spectrum",
    "weight_entropy",
]
