"""A penalty, or a reward, for the norm of the weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grok_callbacks.mixins._base import Mixin, chosen_parameters, finite, no_autocast, whole

__all__ = ["NormPenaltyMixin"]


class NormPenaltyMixin(Mixin):
    r"""Adds :math:`w \, \lVert \theta \rVert_p^q` to the loss, over the chosen parameters taken as one vector.

    A negative weight rewards large norms: with :math:`w = -2 \cdot 10^{-10}` and the squared L2 norm the paper shows a run
    that groks while its norm grows. Unlike weight decay in AdamW the penalty goes through the optimizer as part of the
    gradient. Several with different globs penalise groups of parameters each in its own way.

    Only trainable parameters count, tied ones once. The norm is that of the clean weights, also under weight noise. Under
    FSDP2 parameters are gathered from all ranks.

    Args:
        weight: Factor w, of either sign. With 0 training is the plain one.
        ord: Order p of the norm, at least 1; ``inf`` for the largest absolute value.
        power: Exponent q, at least 1. The default 2 with ``ord=2`` is the sum of squares; 1 with ``ord=1`` is the sum of
            absolute values.
        parameters: Globs on clean parameter names, ``!`` taking away, such as ``["*", "!*.bias"]``. All by default.

    Logged: ``grok/penalty/norm``, the penalty with its factor.

    Cost: a few passes over the parameters and a copy of them at every (micro-)batch.

    Source: the negative penalty is that of Golechha 2024, "Progress Measures for Grokking on Real-world Tasks",
    arXiv 2405.12755.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> layer.weight.data, layer.bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])
        >>> NormPenaltyMixin(0.5).penalty(layer).item()
        84.5
        >>> NormPenaltyMixin(1.0, power=1, parameters="weight").penalty(layer).item()
        5.0
    """

    kind = "norm"

    def __init__(
        self,
        weight: float,
        ord: float = 2.0,  # noqa: A002 - torch's and the field's name for it
        power: float = 2.0,
        parameters: str | Sequence[str] | None = None,
    ) -> None:
        self.weight = finite("weight", weight)
        self.ord = ord if ord == torch.inf else finite("ord", ord, minimum=1)
        self.power = finite("power", power, minimum=1)
        self.parameters = parameters

    @property
    def active(self) -> bool:
        """False where ``weight`` is 0."""
        return self.weight != 0

    def check(self, module: nn.Module) -> None:
        """Raise ``ValueError`` if ``parameters`` matches nothing."""
        chosen_parameters(module, self.parameters)

    def penalty(self, module: nn.Module) -> Tensor:
        """The penalty as a differentiable scalar, for a loss of your own (under manual optimisation, say)."""
        parameters = list(chosen_parameters(module, self.parameters).values())
        if not parameters:
            return torch.zeros(())
        with no_autocast(parameters[0]):
            # In half precision the sum of squares would overflow, or lose what is small.
            precision = functools.reduce(torch.promote_types, (parameter.dtype for parameter in parameters), torch.float32)
            flat = [whole(parameter).flatten().to(parameters[0].device, precision) for parameter in parameters]
            # Concatenating copies, as it must: the backward pass may run while the parameters hold noisy weights.
            norm = torch.linalg.vector_norm(torch.cat(flat), self.ord)
            penalty: Tensor = self.weight * norm**self.power
        return penalty

    def weight_penalty(self, module: nn.Module) -> Tensor:
        """See :meth:`penalty`."""
        return self.penalty(module)
