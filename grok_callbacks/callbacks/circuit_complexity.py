"""Approximate local circuit complexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks._isolation import observing
from grok_callbacks.callbacks._tail import tail_after
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.functional.circuit import DEFAULT_MEMORY_LIMIT, bytes_of_pass, pruned_logits, pruning_masks
from grok_callbacks.metrics import CircuitComplexity
from grok_callbacks.probe import Batch
from grok_callbacks.selection import clean_name, select
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["CircuitComplexityMonitor"]

# Entries of masks that are kept from one measurement to the next; more are drawn anew.
_MOST_KEPT = 2**22
_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Bilinear)


class CircuitComplexityMonitor(Monitor):
    r"""Logs how far pruning a little of one layer at random moves the predictions.

    A random share of a layer's weights is set to zero, and the probe's predictions :math:`p'` are compared with the intact
    model's :math:`p`: :math:`\mathrm{KL}(p \,\|\, p')` of the softmaxes, mean over samples. Where many weights do a little
    each, little changes; where the predictions hang on fine-tuned details, much does. One mask is noisy, so several are drawn.

    Pruned copies are substituted in the forward pass and nothing is written: the weights stay bit-identical, tied ones too.
    Where that cannot work (weights split by tensor parallelism, or frozen into a scripted model) it is refused when fitting
    starts, as is a layer that the model does not call, whose pruning would seem harmless. Outputs are read as logits of a
    softmax, also under a squared loss, as the paper does.

    A layer is a weight of two or more dimensions, called by its module if the parameter's name is ``weight`` (``mlp.2``), and
    by the parameter's own name otherwise (``lstm.weight_hh_l0``).

    | key | value |
    |---|---|
    | `grok/circuit_complexity/{layer}` | mean over the masks, in nats |
    | `grok/circuit_complexity_std/{layer}` | standard deviation over the masks (``repeats`` of at least 2) |

    Cost: a forward pass of `num_samples` samples a layer, batched over the masks from that layer on; only those layers are run
    where they are a chain to the outputs. With less memory, and under FSDP2, more passes, up to one a mask. Ranks share the
    masks out and sum the results. The two layers of a 64-200-200-10 network take 3 to 4 ms on
    one core (benchmarks/results/overhead.md).

    Source: Golechha 2024 (arXiv 2405.12755). The paper's sum over samples is the mean times their number; Bernoulli masks and
    their repetition are our choice.

    Args:
        layers: Globs of layers. By default the middle one and the last of the linear and convolutional layers that the model
            calls, not counting the first; in a network with two hidden layers that is all but the first. (What comes before
            the pruned layer is computed once for all masks, so later layers cost less.) In a model without such layers, the
            same two of all its matrices.
        fraction: Probability of pruning a weight, in (0, 1].
        repeats: Number of masks.
        seed: Seed of the masks, the same at every step.
        num_samples: Training samples of the probe that are looked at, at most its size. On three networks in training
            values of other 128 samples deviated by 1 to 10%, of other masks by 4 to 15% (benchmarks/results/precision.md).
        memory_limit: Bytes that a batched pass may take.
        **kwargs: See :class:`~grok_callbacks.Monitor`.

    Example:
        >>> import torch
        >>> from grok_callbacks import CircuitComplexityMonitor, Probe, Recorder
        >>> model = torch.nn.Linear(3, 2)
        >>> monitor = CircuitComplexityMonitor(fraction=1.0, repeats=2)
        >>> _ = torch.nn.init.zeros_(model.bias), torch.nn.init.eye_(model.weight)
        >>> inputs, targets = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
        >>> values = Recorder(model, [monitor], Probe(train=(inputs, targets))).record(step=0)
        >>> {key: round(value, 4) for key, value in values.items()}
        {'grok/circuit_complexity/weight': 0.3278, 'grok/circuit_complexity_std/weight': 0.0}
    """

    question = "Is it compressing?"
    preset = "standard"

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        *,
        fraction: float = 0.1,
        repeats: int = 5,
        seed: int = 0,
        num_samples: int = 128,
        memory_limit: int = DEFAULT_MEMORY_LIMIT,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < fraction <= 1:
            raise MisconfigurationException(f"`fraction` must be more than 0 and at most 1, got {fraction!r}.")
        if repeats < 1:
            raise MisconfigurationException(f"`repeats` must be at least 1, got {repeats!r}.")
        if num_samples < 1:
            raise MisconfigurationException(f"`num_samples` must be at least 1, got {num_samples!r}.")
        if memory_limit <= 0:
            raise MisconfigurationException(f"`memory_limit` must be a positive number of bytes, got {memory_limit!r}.")
        self.layers = layers
        self.fraction = fraction
        self.repeats = repeats
        self.seed = seed
        self.num_samples = num_samples
        self.memory_limit = memory_limit
        self._weights: dict[str, str] = {}
        self._metrics: dict[str, CircuitComplexity] = {}
        # Of layers from which a chain of layers leads to the outputs: that chain. Nothing else needs to run.
        self._tails: dict[str, nn.Sequential] = {}
        self._needed: dict[str, int] = {}
        self._masks: dict[str, Tensor] = {}

    def bind(self, view: ModelView) -> None:
        """Choose the layers, and try out whether their weights can be substituted."""
        view.require_logits()
        _require_classes(view)
        weights = {_layer_of(name): name for name in view.matrices}
        if not weights:
            raise ValueError("The model has no parameter with two or more dimensions.")
        chosen = _middle_and_last(view) if self.layers is None else select(weights, self.layers, "layers")
        self._weights = {layer: weights[layer] for layer in chosen}
        self._tails, self._needed, self._masks = {}, {}, {}
        for layer, name in self._weights.items():
            _try_substituting(view, name)
            tail = _tail_from(view, layer, name)
            if tail is not None:
                self._tails[layer] = tail
                view.request([f"{layer}:input"])
        self._metrics = self.metrics_by_name(CircuitComplexity, self._weights, repeats=self.repeats)

    def measure(self, snapshot: Snapshot) -> Mapping[str, float | Tensor]:
        """Mean and standard deviation over the masks, of each layer."""
        values: dict[str, Tensor] = {}
        for layer in self._weights:
            complexities = self._complexities(snapshot, layer)
            values[f"circuit_complexity/{layer}"] = complexities.mean()
            if self.repeats > 1:
                values[f"circuit_complexity_std/{layer}"] = complexities.std()
        return values

    def _complexities(self, snapshot: Snapshot, layer: str) -> Tensor:
        """One value a mask; each rank evaluates its share."""
        metric, name, ranks = self._metrics[layer], self._weights[layer], snapshot.ranks
        weight = snapshot.weights[name]
        share = slice(ranks.rank, None, ranks.world_size)
        masks = self._masks_of(layer, weight.shape)[share].to(weight.device)
        metric.reset()
        if len(masks):
            # First, so that the passes to come find the common one's samples.
            intact, samples = snapshot.run().logits, snapshot.batch()
            if len(intact) == len(samples):
                # Otherwise which rows are of which samples is not known.
                samples = samples.first(self.num_samples)
            pruned = self._pruned(snapshot, layer, weight, masks, samples)
            align = snapshot.view.probe.align
            logits, *others = (align(one, samples.targets)[0] for one in (intact[: len(samples)], *pruned))
            metric.update(logits, torch.stack(others), share)
        # What is summed is the metric's state, so that every rank's checkpoint holds the whole.
        metric.total, metric.count = ranks.all_reduce(metric.total), ranks.all_reduce(metric.count)
        complexities: Tensor = metric.total / metric.count
        return complexities

    def _masks_of(self, layer: str, shape: torch.Size) -> Tensor:
        if layer in self._masks:
            return self._masks[layer]
        masks = pruning_masks(shape, self.fraction, self.repeats, self.seed)
        if masks.numel() <= _MOST_KEPT:
            self._masks[layer] = masks
        return masks

    def _pruned(self, snapshot: Snapshot, layer: str, weight: Tensor, masks: Tensor, samples: Batch) -> Tensor:
        name = self._weights[layer]
        tail = self._tails.get(layer)

        def logits_with(weights: dict[str, Tensor]) -> Tensor:
            # A copy, or a model that writes into its inputs would spoil the probe.
            return snapshot.forward(inputs=tree_map(_copied, samples.inputs), weights=weights).logits

        if snapshot.view.is_sharded:
            # FSDP's hooks can't be batched over.
            return pruned_logits(logits_with, name, weight, masks, 1)
        if tail is None:
            return self._in_passes(layer, logits_with, weight, masks)
        inputs = snapshot.activations(f"{layer}:input")[: len(samples)]
        with observing(snapshot.view.model):
            return self._in_passes(layer, lambda weights: _with_first(tail, weights[name], inputs), weight, masks)

    def _in_passes(
        self, layer: str, logits_with: Callable[[dict[str, Tensor]], Tensor], weight: Tensor, masks: Tensor
    ) -> Tensor:
        name = self._weights[layer]
        if layer not in self._needed:
            self._needed[layer] = bytes_of_pass(logits_with, name, weight)
        return pruned_logits(logits_with, name, weight, masks, self.memory_limit, needed=self._needed[layer])


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _with_first(layers: nn.Sequential, weight: Tensor, inputs: Tensor) -> Tensor:
    """What layers make of inputs, with another weight in the first."""
    return functional_call(layers, {"0.weight": weight}, (inputs,))  # type: ignore[no-any-return]


def _tail_from(view: ModelView, layer: str, name: str) -> nn.Sequential | None:
    """The layer and what comes after it, if the outputs follow from its input and its weight by a chain of layers alone."""
    site = f"{layer}:input"
    parameter = view.parameters[name]
    holders = sum(parameter is held for module in view.model.modules() for held in module._parameters.values())
    tail = tail_after(view, site) if site in view.sites and holders == 1 else None
    if tail is None or not isinstance(tail[0], _AFFINE) or tail[0]._parameters.get("weight") is not parameter:
        return None
    # Nothing of the kind can be seen of a model that computes with the weight elsewhere, too.
    snapshot = Snapshot(view, step=0)
    inputs = snapshot.batch().first(2).inputs
    weight = snapshot.weights[name].masked_fill(pruning_masks(parameter.shape, 0.5, 1)[0].to(parameter.device), 0)
    before = snapshot.forward(inputs=inputs, capture=[site]).captured[site]
    whole = snapshot.forward(inputs=inputs, weights={name: weight}).logits
    with observing(view.model):
        same = torch.allclose(_with_first(tail, weight, before), whole, rtol=1e-4, equal_nan=True)
    return tail if same else None


def _layer_of(name: str) -> str:
    return name.removesuffix(".weight")


def _middle_and_last(view: ModelView) -> list[str]:
    """Two layers, or one, in the order in which the model calls them."""
    names = {id(parameter): name for name, parameter in view.parameters.items()}
    modules = {clean_name(name): module for name, module in view.model.named_modules()}
    called = dict.fromkeys(site.partition("@")[0] for site in view.sites if not site.endswith(":input"))
    affine = [modules[name] for name in called if isinstance(modules[name], _AFFINE)]
    # A tied weight is there once, under its first name; a parametrised one has no name of its own.
    layers = list(dict.fromkeys(_layer_of(names[id(module.weight)]) for module in affine if id(module.weight) in names))
    layers = layers or [_layer_of(name) for name in view.matrices]
    layers = layers[1:] or layers
    return list(dict.fromkeys([layers[(len(layers) - 1) // 2], layers[-1]]))


def _require_classes(view: ModelView) -> None:
    snapshot = Snapshot(view, step=0)
    few = snapshot.batch().first(2)
    logits, _ = view.probe.align(snapshot.forward(inputs=few.inputs).logits, few.targets)
    if logits.ndim < 2 or logits.shape[-1] < 2:
        raise ValueError(
            "Circuit complexity compares probabilities of at least two classes, and the model's outputs have the shape "
            f"{tuple(logits.shape)}. Set `forward` of the Probe: a function (model, inputs) -> logits."
        )


def _try_substituting(view: ModelView, name: str) -> None:
    """Make sure that what is put in place of a weight reaches the outputs."""
    snapshot = Snapshot(view, step=0)
    inputs = snapshot.batch().first(2).inputs
    intact = snapshot.forward(inputs=inputs).logits
    try:
        # Unlike zero or a random value, "not a number" differs from every weight and comes through what follows.
        replaced = snapshot.forward(inputs=inputs, weights={name: torch.full_like(snapshot.weights[name], torch.nan)}).logits
    except Exception as error:
        raise ValueError(
            f"`layers`: {_layer_of(name)!r} can't be pruned: no other weights can be put in place of the model's own "
            f"({type(error).__name__}: {error})."
        ) from error
    if torch.equal(intact, replaced):
        raise ValueError(
            f"`layers`: pruning {_layer_of(name)!r} would say nothing: the outputs don't depend on it, or the model "
            "does not let its weights be replaced."
        )
