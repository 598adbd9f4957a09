"""Whether a step that fits one half of the training data fits the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.metrics import GradientCoherence
from grok_callbacks.probe import Batch
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["GradientCoherenceMonitor"]

_TOTAL = ""


class GradientCoherenceMonitor(Monitor):
    r"""Logs how far the gradients of two halves of the probe's training samples agree: their cosine.

    Where a network memorises, what it learns of one sample says nothing of another, and the gradients of disjoint samples have
    little in common; where it learns a rule, they point the same way. Late, with every sample fitted, what is left of the
    gradient is small and often pulls the halves apart: the cosine falls below zero, and how far tells of the solution.

    The halves are the samples of even and of odd number, the same at every step. Gradients are those of the probe's loss, in
    eval mode, and the optimiser's are not touched.

    | key | value |
    |---|---|
    | `grok/gradient_coherence` | cosine of the gradients of all chosen parameters together, -1 to 1 |
    | `grok/gradient_coherence/{matrix}` | the same for each weight matrix |

    NaN where a gradient is zero, or there is but one sample. Gradients can't be taken under FSDP2.

    Cost: one forward and one backward pass of the probe.
    Source: our own use of a customary quantity (Fort et al. 2019, arXiv 1901.09491, call it stiffness).

    Args:
        parameters: Globs of the parameters; all that are trained by default.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Raises:
        MisconfigurationException: At fit start, if no parameter is trained or the model is sharded.

    Example:
        >>> import torch
        >>> from grok_callbacks import GradientCoherenceMonitor, Probe, Recorder
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> probe = Probe(train=(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0])))
        >>> values = Recorder(model, [GradientCoherenceMonitor(probe=probe)]).record(step=0)
        >>> {key: round(value, 3) for key, value in values.items()}
        {'grok/gradient_coherence': 0.707, 'grok/gradient_coherence/weight': 0.707}
    """

    question = "Is it about to generalise?"
    preset = "standard"

    def __init__(self, parameters: str | Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parameters = parameters
        self._names: list[str] = []
        self._metrics: dict[str, GradientCoherence] = {}

    def bind(self, view: ModelView) -> None:
        """Choose the parameters."""
        view.require_loss("train")
        if view.is_sharded:
            raise ValueError("Gradients can't be taken through a model that is sharded by FSDP2.")
        all_of = view.parameters
        chosen = view.select_parameters(self.parameters)
        self._names = [name for name in chosen if all_of[name].requires_grad and all_of[name].numel()]
        if not self._names:
            raise ValueError("`parameters`: none of them is trained.")
        matrices = [name for name in self._names if name in view.matrices]
        self._metrics = self.metrics_by_name(GradientCoherence, [_TOTAL, *matrices])

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """The cosine for all parameters and for each matrix."""
        batch = snapshot.batch()
        if len(batch) < 2:
            return {self._key(name): torch.nan for name in self._metrics}
        first, second = (self._gradients(snapshot, _every_other(batch, start)) for start in (0, 1))
        for metric in self._metrics.values():
            metric.reset()
        for name in self._names:
            for key in (_TOTAL, name):
                if key in self._metrics:
                    self._metrics[key].update(first[name], second[name])
        return {self._key(name): metric.compute() for name, metric in self._metrics.items()}

    @staticmethod
    def _key(name: str) -> str:
        return f"gradient_coherence/{name}" if name else "gradient_coherence"

    def _gradients(self, snapshot: Snapshot, half: Batch) -> dict[str, Tensor]:
        with torch.enable_grad():
            leaves = {name: snapshot.weights[name].clone().requires_grad_() for name in self._names}
            run = snapshot.forward(inputs=half.inputs, weights=leaves, grad=True)
            loss = snapshot.loss_of(*snapshot.view.probe.align(run.logits, half.targets))
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True))


def _every_other(batch: Batch, start: int) -> Batch:
    """The samples of even or of odd number."""
    total = len(batch)

    def half(value: Any) -> Any:
        sized = isinstance(value, Tensor) and value.ndim > 0 and len(value) == total
        return value[start::2].clone() if sized else value

    return Batch(tree_map(half, batch.inputs), tree_map(half, batch.targets))
