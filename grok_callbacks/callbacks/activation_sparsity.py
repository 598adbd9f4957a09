"""Activation sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional.sparsity import root_mean_square
from grok_callbacks.metrics import ActivationSparsity
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["ActivationSparsityMonitor"]


class ActivationSparsityMonitor(Monitor):
    r"""Logs how silent each hidden layer is: the share of its activations that lie below a threshold.

    .. math:: S = \frac{1}{D\,n} \sum_{i=1}^{D} \sum_{j=1}^{n} \mathbb{1}[a_{ij} < \tau]

    over the probe's training samples :math:`i` and the units :math:`j` of one layer after its non-linearity. The comparison is
    strict and signed, so :math:`\tau = 0` on a ReLU gives 0, and what a GELU, SiLU or tanh lets through below zero counts as
    silent. A layer of zeros has sparsity 1.

    Where all weights shrink, every activation comes to lie below an absolute threshold in the end; with ``relative=True`` the
    threshold is in multiples of the layer's root mean square and sees only the shape of the distribution.

    Hidden activations are found without being named: the outputs of activation modules (``nn.ReLU``, ``nn.GELU``, ``nn.SiLU``
    and their kin), and, where a function such as ``F.relu`` or ``F.gelu`` is called instead, the input of the module that takes
    its result (dropout, pooling and reshaping on the way don't matter), called ``fc2:input`` after that module. An activation
    module that is called several times has a key for each call: ``act@0``, ``act@1``.

    | key | value |
    |---|---|
    | `grok/sparsity/{layer}` | silent share of one layer, in [0, 1] |

    Cost: one pass over the activations of the probe, whose forward pass all monitors share. Source: Golechha 2024 (arXiv
    2405.12755); the paper names no threshold, 0.1 is our choice, and so is the relative one.

    Args:
        threshold: :math:`\tau`, in the units of the activations, or in multiples of their root mean square.
        relative: Whether it is in multiples of the layer's root mean square over the probe.
        layers: Globs of sites: a module's name for its output, ``name:input`` for its input. All hidden activations by default.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Example:
        >>> import torch
        >>> from grok_callbacks import ActivationSparsityMonitor, Probe, Recorder
        >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> inputs, targets = torch.tensor([[-1.0, 0.05, 1.0, 2.0]]), torch.tensor([0])
        >>> Recorder(model, [ActivationSparsityMonitor()], Probe(train=(inputs, targets))).record(step=0)
        {'grok/sparsity/1': 0.5}
    """

    question = "Is it compressing?"
    preset = "standard"

    def __init__(
        self, threshold: float = 0.1, *, relative: bool = False, layers: str | Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not math.isfinite(threshold):
            raise MisconfigurationException(f"`threshold` must be a finite number, got {threshold!r}.")
        self.threshold = threshold
        self.relative = relative
        self.layers = layers
        self._metrics: dict[str, ActivationSparsity] = {}

    def bind(self, view: ModelView) -> None:
        """Find the hidden activations."""
        sites = view.select_sites(self.layers)
        view.request(sites)
        # Relative ones too: the scale is taken out beforehand, so that no checkpoint holds the activations themselves.
        self._metrics = self.metrics_by_name(ActivationSparsity, sites, threshold=self.threshold)

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Sparsity at each site, from the shared pass over the probe."""
        return {
            f"sparsity/{site}": self._sparsity(metric, snapshot.activations(site)) for site, metric in self._metrics.items()
        }

    def _sparsity(self, metric: ActivationSparsity, activations: Tensor) -> Tensor:
        return self.evaluate(metric, activations / root_mean_square(activations) if self.relative else activations)
