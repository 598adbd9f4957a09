"""Signs of generalisation to come, over many batches or ranks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from grok_callbacks.functional._common import to_double
from grok_callbacks.functional.early_signs import check_gradients, check_logits, entropy_of_answers

__all__ = ["AnswerEntropy", "GradientCoherence"]


class AnswerEntropy(Metric):
    """Entropy of the answers as a whole: :func:`~grok_callbacks.functional.answer_entropy` of all samples seen.

    Under DDP: sharded. Each rank gives it other samples.

    Args:
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = AnswerEntropy()
        >>> metric.update(torch.tensor([[100.0, 0.0]]))
        >>> metric.update(torch.tensor([[0.0, 100.0]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    totals: list[Tensor] | Tensor
    counts: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The number of classes is known with the first logits, so the sums are kept one for each update.
        self.add_state("totals", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor) -> None:
        """Add samples.

        Args:
            logits: (n, C).
        """
        check_logits(logits)
        assert isinstance(self.totals, list)
        assert isinstance(self.counts, list)
        probabilities = to_double(logits.detach()).softmax(-1)
        self.totals.append(probabilities.sum(0, keepdim=True))
        self.counts.append(probabilities.new_full((1,), len(logits)))

    def compute(self) -> Tensor:
        """Entropy of the mean answer so far."""
        return entropy_of_answers(dim_zero_cat(self.totals).sum(0) / dim_zero_cat(self.counts).sum())

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)


class GradientCoherence(Metric):
    """Agreement of two gradients: :func:`~grok_callbacks.functional.gradient_coherence` of all pieces of them seen.

    Each update takes a piece of both, such as the gradients of one parameter; k updates give what the function gives for the
    pieces joined.

    Under DDP: sharded. Each rank gives it other pieces.

    Args:
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = GradientCoherence()
        >>> metric.update(torch.tensor([1.0]), torch.tensor([1.0]))
        >>> metric.update(torch.tensor([0.0]), torch.tensor([1.0]))
        >>> metric.compute()
        tensor(0.7071, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    product: Tensor
    first_square: Tensor
    second_square: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("product", "first_square", "second_square"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add a piece of both gradients.

        Args:
            first: Any shape.
            second: Of the same shape.
        """
        check_gradients(first, second)
        one, other = to_double(first.detach()).flatten(), to_double(second.detach()).flatten()
        self.product = self.product + one @ other
        self.first_square = self.first_square + one @ one
        self.second_square = self.second_square + other @ other

    def compute(self) -> Tensor:
        """Coherence of all pieces; NaN where one of the two is zero."""
        coherence = self.product / (self.first_square.sqrt() * self.second_square.sqrt())
        return coherence.clamp(-1.0, 1.0)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)
