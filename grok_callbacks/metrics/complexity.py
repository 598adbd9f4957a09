"""Total description length of a network and its targets."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from grok_callbacks.functional.complexity import code_length, generalization_bound

__all__ = ["DescriptionLength"]


class DescriptionLength(Metric):
    r"""Length of a network's description and of the targets given the network, and what it bounds.

    ``update`` takes what the *coarse* network (:func:`~grok_callbacks.functional.rate_distortion`) says about a batch of the
    training set. k updates give what :func:`~grok_callbacks.functional.code_length` and
    :func:`~grok_callbacks.functional.generalization_bound` give on the concatenated batches:

    - ``bits``: of the network's description, K.
    - ``data_bits``: of the targets given the network, :math:`-\sum_i \log_2 p(y_i | x_i)`.
    - ``total_bits``: their sum, the total description length.
    - ``risk``: the coarse network's error rate.
    - ``bound``: on the error rate over unseen samples, from K and as many samples as were seen here. Above 1 it is vacuous.

    Description length and bound are about a whole training set, the one that K was searched with. Of a probe, a part of it,
    they are estimates: give ``num_samples`` to scale ``data_bits`` to the whole.

    Under DDP: sharded. Ranks hold different samples, and sums over samples are reduced; ``bits`` are the same on all
    ranks, the largest counts.

    Args:
        num_samples: Size of the training set of which the updates are a part; by default they are all of it.
        delta: Probability that the bound fails.
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = DescriptionLength()
        >>> metric.update(torch.zeros(3, 4), torch.tensor([0, 1, 2]), bits=100)
        >>> values = metric.compute()
        >>> values["data_bits"].item(), values["total_bits"].item(), bool(values["bound"] > 1)
        (6.0, 106.0, True)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    bits: Tensor
    data_bits: Tensor
    errors: Tensor
    count: Tensor

    def __init__(self, num_samples: int | None = None, delta: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be positive, got {num_samples}")
        if not 0 < delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {delta}")
        self.num_samples = num_samples
        self.delta = delta
        self.add_state("bits", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")
        for name in ("data_bits", "errors", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor, bits: Tensor | float) -> None:
        """Add a batch.

        Args:
            logits: ``(n, C)`` of the coarse network.
            targets: ``(n,)`` class indices.
            bits: Of the description, the same in every update.
        """
        self.data_bits = self.data_bits + code_length(logits, targets)
        self.bits = torch.maximum(self.bits, torch.as_tensor(bits, dtype=torch.float64, device=self.bits.device))
        self.errors = self.errors + (logits.argmax(1) != targets).sum()
        self.count = self.count + len(targets)

    def compute(self) -> dict[str, Tensor]:
        """The five values in float64; NaN before the first sample."""
        scale = 1.0 if self.num_samples is None else self.num_samples / self.count
        seen = torch.where(self.count > 0, self.count, torch.full_like(self.count, torch.nan))
        bits, data_bits = self.bits + 0 * seen, self.data_bits * scale + 0 * seen
        risk = self.errors / seen
        return {
            "bits": bits,
            "data_bits": data_bits,
            "total_bits": bits + data_bits,
            "risk": risk,
            "bound": generalization_bound(risk, bits, seen, self.delta),
        }

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several, see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
