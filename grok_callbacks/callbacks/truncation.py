"""What is left of a network when each weight matrix keeps only its leading directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.callbacks._last_layer import class_labels
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional.early_signs import check_shares, cut_to_share, leading_directions
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["TruncationMonitor"]

# A matrix with fewer rows or columns, such as a table of three positions, has no spectrum to speak of.
_FEWEST = 8


class TruncationMonitor(Monitor):
    r"""Logs the training loss of the network with each weight matrix cut to its leading singular directions.

    Of each matrix the fewest directions are kept that hold a share q of its squared norm, all matrices at once
    (:func:`~grok_callbacks.functional.truncate_spectrum`), and the loss on the probe's training samples is taken. A network
    that has memorised needs nearly all of its directions. One that is on its way to a general solution is carried by fewer and
    fewer: the cut network gets better at the training data while the whole one has long been perfect, and before validation
    moves. Cut weights are substituted in the forward pass and nothing is written.

    | key | value |
    |---|---|
    | `grok/truncation/loss/{share}` | loss of the cut network on training samples |
    | `grok/truncation/accuracy/{share}` | its accuracy; where samples have class labels |

    It is no verdict by itself: with weight decay it also falls a little on random labels.

    Cost: the eigenvectors of each matrix's Gram matrix, and for each share a product and a forward pass of the probe.
    Memory: a copy of the matrices at a time.
    Source: our own.

    Args:
        parameters: Globs of the matrices to cut; by default all that have at least 8 rows and columns, or all if none has.
        shares: The shares q of the squared norm to keep.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Raises:
        MisconfigurationException: If a share is not more than 0 and at most 1; at fit start, if there is no matrix.

    Example:
        >>> import torch
        >>> from grok_callbacks import Probe, Recorder, TruncationMonitor
        >>> model = torch.nn.Linear(3, 3)
        >>> _ = torch.nn.init.zeros_(model.bias), model.weight.data.copy_(torch.diag(torch.tensor([30.0, 20.0, 10.0])))
        >>> probe = Probe(train=(torch.eye(3), torch.arange(3)))
        >>> values = Recorder(model, [TruncationMonitor(shares=[0.5, 0.9], probe=probe)]).record(step=0)
        >>> {key: round(value, 3) for key, value in values.items() if "loss" in key}
        {'grok/truncation/loss/0.5': 0.732, 'grok/truncation/loss/0.9': 0.366}
    """

    question = "Is it about to generalise?"
    preset = "standard"

    def __init__(
        self, parameters: str | Sequence[str] | None = None, *, shares: Sequence[float] = (0.5, 0.7, 0.9), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        try:
            check_shares(shares)
        except ValueError as error:
            raise MisconfigurationException(f"`shares`: {error}.") from error
        self.parameters = parameters
        self.shares = tuple(shares)
        self._names: list[str] = []

    def bind(self, view: ModelView) -> None:
        """Choose the matrices."""
        view.require_loss("train")
        names = view.select_matrices(self.parameters)
        large = [name for name in names if min(view.parameters[name].flatten(1).shape) >= _FEWEST]
        self._names = large if large and self.parameters is None else names

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Loss and accuracy for each share."""
        directions = {name: leading_directions(snapshot.weights[name]) for name in self._names}
        values: dict[str, float | Tensor] = {}
        # One share at a time: the cut weights are a copy of the network's.
        for share in self.shares:
            weights = {name: cut_to_share(snapshot.weights[name], found, share) for name, found in directions.items()}
            run = snapshot.forward(weights=weights)
            logits, targets = snapshot.view.probe.align(run.logits, snapshot.batch().targets)
            values[f"truncation/loss/{share:g}"] = snapshot.loss_of(logits, targets)
            labels = class_labels(targets, logits) if isinstance(targets, Tensor) else None
            if labels is not None:
                values[f"truncation/accuracy/{share:g}"] = (logits.argmax(-1) == labels).double().mean()
        return values
