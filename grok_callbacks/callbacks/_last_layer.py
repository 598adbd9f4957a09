"""The last linear layer of a network: its features, its weight, and which rows of the features make which logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grok_callbacks.probe import Split
from grok_callbacks.selection import clean_name, select
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["LastLayer", "class_labels", "subset"]

# Predictions looked at, if positions make more of them: Gram matrices and one-hot targets grow with their number.
_MOST_ROWS = 4096
_INPUT = ":input"


@dataclass(frozen=True)
class LastLayer:
    """Where a network's features become its logits.

    Args:
        output: Site of the layer's output.
        form: How the logits are made of the output: ``"same"``; ``"moved"``, classes second; ``"squeezed"``, the one
            class left out; or the position that is answered at.
    """

    output: str
    form: str | int

    @classmethod
    def find(cls, view: ModelView, layer: str | None) -> LastLayer:
        """The layer of this name, or the last ``nn.Linear`` whose output the model returns.

        Raises:
            ValueError: If there is none.
        """
        view.require_logits("train")
        modules = _modules(view)
        inputs = {site.removesuffix(_INPUT) for site in view.sites if site.endswith(_INPUT)}
        # Of a module that is called several times, the last call.
        calls = {site.partition("@")[0]: site for site in view.sites if not site.endswith(_INPUT) and site in inputs}
        is_wanted = _is_linear if layer is not None else _is_plain_linear
        calls = {name: site for name, site in calls.items() if is_wanted(modules[name])}
        if layer is not None:
            chosen = select(calls, layer, "layer")
            if len(chosen) > 1:
                raise ValueError(f"`layer`: {layer!r} matches {chosen}; name one.")
            calls = {chosen[0]: calls[chosen[0]]}
        for site, output, logits in reversed(_tried(view, list(calls.values()))):
            form = next(_forms(output, logits, exactly=layer is None), None)
            if form is not None:
                return cls(site, form)
        if layer is not None:
            raise ValueError(f"`layer`: the output of {layer!r} does not make one row of logits each.")
        raise ValueError(
            "`layer`: the model returns the output of no `nn.Linear`; name the layer that its logits are made by. "
            f"Linear layers: {', '.join(calls) or 'none'}."
        )

    @property
    def name(self) -> str:
        """The module's name."""
        return self.output.partition("@")[0]

    @property
    def site(self) -> str:
        """Where the features pass."""
        return f"{self.output}{_INPUT}"

    def parameter(self, view: ModelView) -> str | None:
        """The name of its weight, also where another layer has it first; ``None`` if it is computed from other parameters."""
        weight = _modules(view)[self.name].weight
        return next((name for name, parameter in view.parameters.items() if parameter is weight), None)

    def weight(self, snapshot: Snapshot) -> Tensor:
        """(K, C): features times this, plus a bias, are the output."""
        name = self.parameter(snapshot.view)
        if name is not None:
            return snapshot.weights[name].T
        with torch.no_grad():
            weight: Tensor = _modules(snapshot.view)[self.name].weight
            return weight.detach().T

    def rows(self, features: Tensor, targets: Any, snapshot: Snapshot) -> Tensor:
        """Which rows of the features, flattened to ``(rows, K)``, belong to the aligned logits, in the logits' order."""
        leading = features.shape[:-1]
        numbers = torch.arange(leading.numel(), device=features.device).reshape(leading)
        classes = len(_modules(snapshot.view)[self.name].weight)
        if not isinstance(targets, Tensor):
            return (numbers[:, self.form] if isinstance(self.form, int) else numbers).flatten()
        numbers = _arranged(numbers[..., None].expand(*leading, classes), self.form)
        aligned, _ = snapshot.view.probe.align(numbers, targets)
        return aligned.reshape(len(aligned), -1)[:, 0]

    def features(self, snapshot: Snapshot, split: Split) -> Tensor:
        """One row for each of the aligned logits."""
        features = snapshot.activations(self.site, split)
        return features.flatten(0, -2)[self.rows(features, snapshot.batch(split).targets, snapshot)]


def subset(size: int) -> Tensor:
    """Numbers of at most 4,096 of so many predictions, always the same."""
    if size <= _MOST_ROWS:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:_MOST_ROWS].sort().values


def class_labels(targets: Tensor, logits: Tensor) -> Tensor | None:
    """Class labels of aligned targets, also of one-hot ones; ``None`` for regression."""
    if logits.ndim < 2 or logits.shape[-1] < 2:
        return None
    if not targets.is_floating_point():
        return targets
    binary, rows = (targets == 0) | (targets == 1), targets.sum(-1) == 1
    is_one_hot = targets.shape[-1:] == logits.shape[-1:] and bool(binary.all() and rows.all())
    return targets.argmax(-1) if is_one_hot else None


def _modules(view: ModelView) -> Mapping[str, Any]:
    return {clean_name(name): module for name, module in view.model.named_modules()}


def _is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def _tried(view: ModelView, sites: list[str]) -> list[tuple[str, Tensor, Tensor]]:
    """Each site's output on a few samples, beside the logits."""
    snapshot = Snapshot(view, step=0)
    run = snapshot.forward(inputs=snapshot.batch().first(2).inputs, capture=sites)
    return [(site, run.captured[site], run.logits) for site in sites]


def _forms(output: Tensor, logits: Tensor, *, exactly: bool) -> Iterator[str | int]:
    """Ways in which logits are made of a layer's output; unless ``exactly``, something may happen to each row on the way."""
    positions = range(output.shape[1] - 1, -1, -1) if output.ndim == 3 else ()
    forms = ["same", *(["moved"] if output.ndim > 2 else []), *(["squeezed"] if output.shape[-1] == 1 else [])]
    fitting = [form for form in [*forms, *positions] if _arranged(output, form).shape == logits.shape]
    yield from (form for form in fitting if torch.equal(_arranged(output, form).nan_to_num(), logits.nan_to_num()))
    if not exactly:
        # At which position such a model answers can't be seen.
        yield from (form for form in fitting if isinstance(form, str))


def _arranged(tensor: Tensor, form: str | int) -> Tensor:
    if form == "moved":
        return tensor.movedim(-1, 1)
    if form == "squeezed":
        return tensor.squeeze(-1)
    return tensor[:, form] if isinstance(form, int) else tensor
