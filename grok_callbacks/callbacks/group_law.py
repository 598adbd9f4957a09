"""Which laws of its task's group a network has learned, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from grok_callbacks.callbacks._training_set import row_keys, seen_rows
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional import associativity_agreement, identity_agreement, inverse_agreement
from grok_callbacks.probe import Batch
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["GroupLawMonitor"]

# Pairs that go through the model at a time.
_AT_ONCE = 4096


class GroupLawMonitor(Monitor):
    r"""Logs how far a network that learns a group's product obeys the group's laws, on its own answers :math:`f(a, b)`.

    Identity: :math:`f(a, e) = a`. Inverse: :math:`f(a, a^{-1}) = e`. Associativity: :math:`f(f(a, b), c) = f(a, f(b, c))`.
    Each over all pairs, over those trained on, and over the others; a triple of the associative law counts as seen if all four
    of its questions were. Constant answers are associative: read it beside the accuracy.

    | key | value |
    |---|---|
    | `grok/group_law/identity` | share of elements that the identity leaves alone |
    | `grok/group_law/inverse` | share of elements whose product with their inverse is the identity |
    | `grok/group_law/associativity` | share of triples that obey it |
    | `grok/group_law/{law}/seen`, `/unseen` | over questions trained on, over those not; left out where there are none |

    Cost: a forward pass on all :math:`n^2` pairs, and :math:`O(n^3)` table look-ups.
    Source: the laws are those that Tan and Huang 2023 (arXiv 2311.06597) call basic; the measure is ours.

    Args:
        table: The group's product ``(n, n)``, integer, such as ``modular_arithmetic("add", 31).group.table``. The model's
            class ``k`` is element ``k``.
        train_pairs: Pairs of elements trained on ``(m, 2)``. By default those whose inputs are found in the training data.
        inputs: ``inputs(pairs) -> model inputs`` for pairs of elements, int64 ``(m, 2)``; by default the pairs themselves.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Example:
        >>> import torch
        >>> from grok_callbacks import GroupLawMonitor, Recorder
        >>> class Difference(torch.nn.Module):
        ...     def forward(self, pairs):
        ...         return torch.nn.functional.one_hot((pairs[:, 0] - pairs[:, 1]) % 5, 5).float()
        >>> n = torch.arange(5)
        >>> monitor = GroupLawMonitor((n[:, None] + n) % 5, train_pairs=torch.tensor([[0, 0], [1, 4]]))
        >>> values = Recorder(Difference(), [monitor]).record(step=0)
        >>> [values[f"grok/group_law/{law}"] for law in ("identity", "inverse", "associativity")]
        [1.0, 0.2, 0.2]
    """

    question = "Is it about to generalise?"

    def __init__(
        self,
        table: Tensor,
        train_pairs: Tensor | None = None,
        inputs: Callable[[Tensor], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # A table without an identity or inverses is refused here, and not in the middle of a run.
        inverse_agreement(table, table)
        order = len(table)
        if train_pairs is not None and not _are_pairs(train_pairs, order):
            raise ValueError(
                f"`train_pairs` must be integers (m, 2) in 0 .. {order - 1}, got shape {tuple(train_pairs.shape)}."
            )
        self.table = table.cpu()
        self.train_pairs = train_pairs
        self.inputs = inputs
        self._seen = torch.zeros(order, order, dtype=torch.bool)

    def bind(self, view: ModelView) -> None:
        """Find out which pairs were trained on, and try the model on one."""
        pairs = self._pairs
        self._seen = self._seen_pairs(view, pairs).view(self.table.shape)
        self._answers(Snapshot(view, step=0), pairs[:1])

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Every law over all, seen and unseen pairs."""
        answers = torch.cat([self._answers(snapshot, pairs) for pairs in torch.split(self._pairs, _AT_ONCE)])
        answers = answers.view(self.table.shape)
        values: dict[str, float] = {}
        for suffix, chosen in (("", None), ("/seen", self._seen), ("/unseen", ~self._seen)):
            values |= {f"group_law/{law}{suffix}": value for law, value in self._laws(answers, chosen).items()}
        return values

    @property
    def _pairs(self) -> Tensor:
        elements = torch.arange(len(self.table))
        return torch.cartesian_prod(elements, elements)

    def _laws(self, answers: Tensor, chosen: Tensor | None) -> dict[str, float]:
        if bool((answers < 0).any()):
            return dict.fromkeys(_LAWS, math.nan)
        agreements = (
            identity_agreement(answers, self.table, chosen),
            inverse_agreement(answers, self.table, chosen),
            associativity_agreement(answers, chosen),
        )
        # Without a question there is no answer, good or bad.
        return {law: float(value) for law, value in zip(_LAWS, agreements, strict=True) if not value.isnan()}

    def _seen_pairs(self, view: ModelView, pairs: Tensor) -> Tensor:
        if self.train_pairs is not None:
            order = len(self.table)
            numbers = self.train_pairs.cpu().long() @ torch.tensor([order, 1])
            return torch.zeros(order**2, dtype=torch.bool).index_fill(0, numbers, True)
        seen = seen_rows(self, view)
        if seen is None:
            raise ValueError("`train_pairs`: the training set is too large to read, or can only be iterated; name the pairs.")
        found = torch.tensor([key in seen for key in row_keys(self._build(pairs))])
        if not bool(found.any()):
            raise ValueError(
                "`inputs`: no pair is among the training inputs; set `inputs`, pairs (m, 2) -> inputs, or `train_pairs`."
            )
        return found

    def _build(self, pairs: Tensor) -> Any:
        return pairs if self.inputs is None else self.inputs(pairs)

    def _answers(self, snapshot: Snapshot, pairs: Tensor) -> Tensor:
        """The predicted element for each pair; -1 where the logits are not numbers."""
        parameter = next(snapshot.view.model.parameters(), None)
        dtype = parameter.dtype if parameter is not None and parameter.is_floating_point() else None
        batch = Batch(self._build(pairs)).to(snapshot.view.device, dtype)
        logits = snapshot.forward(inputs=batch.inputs).logits
        if logits.ndim != 2 or len(logits) != len(pairs) or logits.shape[1] < len(self.table):
            raise ValueError(
                f"Logits of shape {tuple(logits.shape)} don't fit {len(pairs)} pairs and {len(self.table)} elements. "
                "Set `forward` of the Probe, (model, inputs) -> logits, or `inputs`."
            )
        spoilt = (logits.isnan() | logits.isposinf()).any(1)
        return logits.argmax(1).masked_fill(spoilt, -1).cpu()


_LAWS = ("identity", "inverse", "associativity")


def _are_pairs(pairs: Tensor, order: int) -> bool:
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point() or pairs.is_complex() or pairs.dtype == torch.bool:
        return False
    return pairs.numel() == 0 or 0 <= int(pairs.min()) <= int(pairs.max()) < order
