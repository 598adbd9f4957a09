"""Whether answers stay the same when the operands are swapped, or the input is mirrored in any other way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from grok_callbacks.callbacks._training_set import row_keys, seen_rows
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional import logit_distance
from grok_callbacks.metrics import Commutativity
from grok_callbacks.mixins.commutativity import swap_operands
from grok_callbacks.probe import Split
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["CommutativityMonitor"]

# Two operands and an equals sign.
_MOST_POSITIONS = 3


class CommutativityMonitor(Monitor):
    r"""Logs how often the prediction for an input is that for its mirror image: :math:`\arg\max f(a, b) = \arg\max f(b, a)`.

    Over training pairs this has a floor, since what was memorised in both orders agrees. So pairs with :math:`a \ne b` whose
    mirror image is no training input are reported apart. Of a training pair the answer is known by heart, so on a commutative
    task its agreement with an unseen mirror image is close to the validation accuracy; pairs of which neither order was seen
    (ours) tell whether the network *is* symmetric, whether right or wrong.

    | key | value |
    |---|---|
    | `grok/commutativity` | agreement over the probe's training samples |
    | `grok/commutativity/unseen` | over those of them whose mirror image differs and is no training input |
    | `grok/commutativity/both_unseen` | the same over validation samples |
    | `grok/commutativity/logit_distance` | mean squared difference of the logits over training samples |

    To know what was seen the monitor reads the whole training set once, when fit starts: of a Trainer's loader or the probe's
    ``train``, up to 262,144 samples or 64 MiB of inputs. A sample counts as seen if its inputs are equal to the last bit; with
    random augmentation nothing is. Where the training set can't be had (data that can only be iterated, larger ones), give
    ``train_inputs``; otherwise the keys that need it are left out, as they are where no sample is of their kind.

    Presets use this monitor only on inputs of two or three positions (a, b, and perhaps an equals sign): most sequences mean
    something else when their first two tokens are swapped.

    Cost: one more forward pass on each split of the probe; once, reading the training inputs.
    Source: Tan and Huang 2023 (arXiv 2311.06597).

    Args:
        swap: ``swap(inputs) -> mirrored inputs``, of any symmetry that the answers should have (a flipped image, say). By
            default the first two input positions are swapped, which needs tokens or numbers in positions.
        train_inputs: All inputs of the training set, as the model takes them, where they can't be read from the data.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Example:
        >>> import torch
        >>> from grok_callbacks import CommutativityMonitor, Probe, Recorder
        >>> class Sum(torch.nn.Module):
        ...     def forward(self, pairs):
        ...         return torch.nn.functional.one_hot(pairs.sum(1) % 5, 5).float()
        >>> pairs = torch.tensor([[0, 1], [2, 3], [3, 2], [4, 4]])
        >>> monitor = CommutativityMonitor(probe=Probe(train=(pairs, pairs.sum(1) % 5)))
        >>> Recorder(Sum(), [monitor]).record(step=0)
        {'grok/commutativity': 1.0, 'grok/commutativity/logit_distance': 0.0, 'grok/commutativity/unseen': 1.0}
    """

    question = "Is it about to generalise?"
    preset = "full"

    def __init__(self, swap: Callable[[Any], Any] | None = None, train_inputs: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if swap is not None and not callable(swap):
            raise ValueError(f"`swap` must be a function of the inputs, got a {type(swap).__name__}.")
        self.swap = swap
        self.train_inputs = train_inputs
        self._seen: frozenset[bytes] | None = None
        self._metrics: dict[str, Commutativity] = {}

    def bind(self, view: ModelView) -> None:
        """Try the swap out, and read what was seen in training."""
        view.require_logits("train")
        if self.optional and self.swap is None:
            _require_operands(view.require_samples("train").inputs)
        self._logits(Snapshot(view, step=0), "train")
        given = self.train_inputs
        self._seen = frozenset(row_keys(given)) if given is not None else seen_rows(self, view)
        if self._seen is None:
            self.announce(
                f"{self.label}: the training set is too large or can only be iterated, so pairs whose mirror image was not "
                "seen are not told apart; set `train_inputs`."
            )
        self._metrics = self.metrics_by_name(Commutativity, ["", "/unseen", "/both_unseen"])

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Agreement over all training pairs, and over those whose mirror image is new."""
        logits, mirrored = self._logits(snapshot, "train")
        values = {
            "commutativity": self.evaluate(self._metrics[""], logits, mirrored),
            "commutativity/logit_distance": logit_distance(logits, mirrored),
        }
        if self._seen is not None:
            values |= self._agreement("/unseen", logits, mirrored, self._is_new(snapshot, "train", self._seen))
            if snapshot.has("validation"):
                is_new = self._is_new(snapshot, "validation", self._seen)
                values |= self._agreement("/both_unseen", *self._logits(snapshot, "validation"), is_new)
        return values

    def _agreement(self, name: str, logits: Tensor, mirrored: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        if not bool(chosen.any()):
            return {}
        chosen = chosen.to(logits.device)
        return {f"commutativity{name}": self.evaluate(self._metrics[name], logits[chosen], mirrored[chosen])}

    def _is_new(self, snapshot: Snapshot, split: Split, seen: frozenset[bytes]) -> Tensor:
        """For each sample whether its mirror image is another one that was not trained on."""
        inputs = snapshot.view.require_samples(split).inputs
        pairs = zip(row_keys(inputs), row_keys(self._mirror(inputs)), strict=True)
        return torch.tensor([own != mirror and mirror not in seen for own, mirror in pairs])

    def _logits(self, snapshot: Snapshot, split: Split) -> tuple[Tensor, Tensor]:
        """Logits of the samples and of their mirror images, one row a sample."""
        batch = snapshot.batch(split)
        logits = snapshot.logits(split)
        run = snapshot.forward(inputs=self._mirror(batch.inputs))
        mirrored, _ = snapshot.view.probe.align(run.logits, batch.targets)
        if logits.ndim != 2 or len(logits) != len(batch):
            raise ValueError(
                f"Predictions of shape {tuple(logits.shape)} are not one for each of {len(batch)} samples. "
                "Set `forward` of the Probe, (model, inputs) -> logits, to give one row for each sample."
            )
        return logits, mirrored

    def _mirror(self, inputs: Any) -> Any:
        """Mirrored inputs, checked to be of the inputs' form."""
        # On a copy, or a swap in place would spoil the probe.
        leaves, structure = tree_flatten(inputs)
        copied = structure.unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        mirrored = (self.swap or swap_operands)(copied)
        forms = [
            [(leaf.shape, leaf.dtype) for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
            for value in (inputs, mirrored)
        ]
        if forms[0] != forms[1]:
            raise ValueError(f"`swap` must return inputs of the same form; it made {forms[1]} of {forms[0]}.")
        return mirrored


def _require_operands(inputs: Any) -> None:
    shape = inputs.shape if isinstance(inputs, Tensor) else ()
    if len(shape) > 1 and shape[1] > _MOST_POSITIONS:
        raise ValueError(f"Inputs of shape {tuple(shape)} don't look like two operands; set `swap`.")
