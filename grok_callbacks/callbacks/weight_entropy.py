"""Absolute weight entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.metrics import WeightEntropy
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["WeightEntropyMonitor"]


class WeightEntropyMonitor(Monitor):
    r"""Logs the absolute weight entropy :math:`H(W) = -\sum_{ij} |w_{ij}| \ln |w_{ij}|` of each weight matrix.

    It is not normalised: it grows with the matrix, depends on the scale of the weights, and is negative where they exceed 1 in
    magnitude. Compare a matrix with itself over training only.

    | key | value |
    |---|---|
    | `grok/weight_entropy/{param}` | entropy in nats of one weight matrix |

    Cost: one pass over the weights; under FSDP2 over this rank's shards, whose entropies are then summed.
    Source: Golechha 2024 (arXiv 2405.12755).

    Args:
        parameters: Globs of parameter names with two or more dimensions; all such by default. Biases are left out.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Example:
        >>> import torch
        >>> from grok_callbacks import Recorder, WeightEntropyMonitor
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(model.weight, 0.5)
        >>> values = Recorder(model, [WeightEntropyMonitor()]).record(step=0)
        >>> {key: round(value, 4) for key, value in values.items()}
        {'grok/weight_entropy/weight': 0.6931}
    """

    question = "Is it compressing?"
    preset = "economy"

    def __init__(self, parameters: str | Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parameters = parameters
        self._metrics: dict[str, WeightEntropy] = {}

    def bind(self, view: ModelView) -> None:
        """Choose the matrices."""
        self._metrics = self.metrics_by_name(WeightEntropy, view.select_matrices(self.parameters))

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Entropy of each matrix in float64."""
        entropies = torch.stack([self.evaluate(metric, snapshot.pieces[name]).cpu() for name, metric in self._metrics.items()])
        if snapshot.view.is_sharded:
            entropies = snapshot.ranks.all_reduce(entropies).cpu()
            for metric, entropy in zip(self._metrics.values(), entropies, strict=True):
                # What is summed is the metric's state, so that every rank's checkpoint holds the whole.
                metric.entropy = entropy
        return {f"weight_entropy/{name}": entropy for name, entropy in zip(self._metrics, entropies, strict=True)}
