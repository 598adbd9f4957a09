"""Norms of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional.norm import check_order
from grok_callbacks.metrics import ParameterNorm
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["NormMonitor"]

_TOTAL = ""


class NormMonitor(Monitor):
    r"""Logs the norm of all parameters together, and of each: :math:`\lVert\theta\rVert_p = (\sum_i |\theta_i|^p)^{1/p}`.

    Biases and embeddings are included; tied weights count once. The norm is the oldest progress measure and the one that every
    other must beat: it often falls before generalisation, but also where nothing generalises.

    | key | value |
    |---|---|
    | `grok/norm` | norm of all chosen parameters together |
    | `grok/norm/{param}` | norm of one parameter |

    Cost: one pass over the weights; under FSDP2 over this rank's shards, whose norms are then gathered, and never a weight.
    Source: Liu et al. 2023 (arXiv 2310.05918), Golechha 2024 (arXiv 2405.12755).

    Args:
        parameters: Globs of parameter names; all by default.
        ord: Order of the norm, positive, ``inf`` for the largest magnitude.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Raises:
        MisconfigurationException: If ``ord`` is not a positive number.

    Example:
        >>> import torch
        >>> from grok_callbacks import NormMonitor, Recorder
        >>> model = torch.nn.Linear(3, 1)
        >>> _ = torch.nn.init.ones_(model.weight), torch.nn.init.ones_(model.bias)
        >>> Recorder(model, [NormMonitor(parameters="weight", ord=1)]).record(step=0)
        {'grok/norm': 3.0, 'grok/norm/weight': 3.0}
    """

    question = "Is it compressing?"
    preset = "economy"

    def __init__(self, parameters: str | Sequence[str] | None = None, ord: float = 2.0, **kwargs: Any) -> None:  # noqa: A002
        super().__init__(**kwargs)
        try:
            check_order(ord)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.parameters = parameters
        self.ord = ord
        self._metrics: dict[str, ParameterNorm] = {}

    def bind(self, view: ModelView) -> None:
        """Choose the parameters."""
        names = view.select_parameters(self.parameters)
        self._metrics = self.metrics_by_name(ParameterNorm, [_TOTAL, *names], ord=self.ord)

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Norms in float64, each weight looked up once."""
        parts = {name: self.evaluate(metric, snapshot.pieces[name]) for name, metric in self._metrics.items() if name != _TOTAL}
        norms = torch.stack([part.cpu() for part in parts.values()])
        if snapshot.view.is_sharded:
            # The norm of all pieces is the norm of their norms.
            shares = torch.stack(snapshot.ranks.gather(norms), 1)
            norms = torch.stack([self.evaluate(self._metrics[name], share) for name, share in zip(parts, shares, strict=True)])
        total = self.evaluate(self._metrics[_TOTAL], norms)
        return {"norm": total, **{f"norm/{name}": norm for name, norm in zip(parts, norms, strict=True)}}
