"""Spectral entropy and effective rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.metrics import SpectralEntropy
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["SpectralEntropyMonitor"]


class SpectralEntropyMonitor(Monitor):
    r"""Logs spectral entropy and effective rank of each weight matrix.

    With singular values :math:`s_i` and :math:`p_i = s_i / \sum_j s_j`, the entropy is :math:`H = -\sum_i p_i \ln p_i` in nats
    and the effective rank :math:`e^H`, between 1 and the smaller dimension. Both ignore scale and rotation. Convolutions are
    flattened to (out, in * k); biases are left out. A zero matrix has no spectrum to speak of and gives NaN.

    | key | value |
    |---|---|
    | `grok/spectral_entropy/{param}` | entropy in nats |
    | `grok/effective_rank/{param}` | its exponential |

    Cost: one singular-value decomposition of each matrix, shared with the other monitors; cubic in the smaller dimension.
    Source: DeMoss et al. 2024 (arXiv 2412.09810); Roy and Vetterli 2007.

    Args:
        parameters: Globs of parameter names with two or more dimensions; all such by default.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Example:
        >>> import torch
        >>> from grok_callbacks import Recorder, SpectralEntropyMonitor
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> values = Recorder(model, [SpectralEntropyMonitor()]).record(step=0)
        >>> {key: round(value, 4) for key, value in values.items()}
        {'grok/spectral_entropy/weight': 0.6931, 'grok/effective_rank/weight': 2.0}
    """

    question = "Is it compressing?"
    preset = "economy"

    def __init__(self, parameters: str | Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parameters = parameters
        self._metrics: dict[str, SpectralEntropy] = {}

    def bind(self, view: ModelView) -> None:
        """Choose the matrices."""
        self._metrics = self.metrics_by_name(SpectralEntropy, view.select_matrices(self.parameters))

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Entropy and effective rank of each matrix from its shared spectrum."""
        entropies = {
            name: self.evaluate(metric, snapshot.weights[name], snapshot.spectrum(name))
            for name, metric in self._metrics.items()
        }
        return {
            **{f"spectral_entropy/{name}": entropy for name, entropy in entropies.items()},
            **{f"effective_rank/{name}": entropy.exp() for name, entropy in entropies.items()},
        }
