"""What comes after a site of a network: as layers where it is a chain of them, otherwise by substitution."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from grok_callbacks._isolation import observing
from grok_callbacks.snapshot import ModelView, Snapshot

__all__ = ["is_affine_after", "is_cut", "substituted", "tail_after"]

_FEW = 2
# Enough segments that a few units of a small network bend on one of them.
_SEVERAL = 32


def tail_after(view: ModelView, site: str) -> nn.Sequential | None:
    """The layers from a site to the logits, if these are made from it by a chain of layers alone.

    Each layer in the chain is a module without children that was called with the tensor before it and nothing else, and the
    last one's output is what the model returned. Whatever else uses those tensors, the logits then follow from the site's
    tensor by these layers. Of operations between layers that are no modules only flattening is known, as before the head of a
    convolutional network; others (an addition, an activation) break the chain.

    Returns:
        The layers, themselves and no copies, or ``None``; also for a model sharded by FSDP2, whose layers can't be called
        alone.
    """
    if view.is_sharded:
        return None
    calls: list[tuple[nn.Module, Tensor | None, Any]] = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        calls.append((module, args[0] if alone else None, output))

    snapshot = Snapshot(view, step=-1)
    inputs = snapshot.batch("train").first(_FEW).inputs
    leaves = [module for module in view.model.modules() if next(module.children(), None) is None]
    with ExitStack() as stack:
        for module in leaves:
            stack.callback(module.register_forward_hook(remember, with_kwargs=True).remove)
        run = snapshot.forward(inputs=inputs, capture=[site], grad=True)
    current: Any = run.captured[site]
    chain: list[nn.Module] = []
    later = calls[_first_call_after(calls, site, current) :]
    while (found := _next_call(later, current)) is not None:
        module, given, output = later[found]
        chain += [module] if given is current else [nn.Flatten(), module]
        current, later = output, later[found + 1 :]
    if not chain or current is not run.logits:
        return None
    tail = nn.Sequential(*chain)
    return tail if _leads_to_the_logits(tail, snapshot, site, inputs) else None


def _next_call(calls: list[tuple[nn.Module, Tensor | None, Any]], tensor: Any) -> int | None:
    """Index of the call that takes a tensor as it is, otherwise of one that takes it flattened."""
    taken = (index for index, (_, given, _) in enumerate(calls) if given is not None and given is tensor)
    flattened = (index for index, (_, given, _) in enumerate(calls) if _is_flat(given, tensor))
    return next(taken, next(flattened, None))


def _is_flat(given: Tensor | None, before: Any) -> bool:
    """Whether a layer was given the tensor before it with all dimensions but the first made one."""
    return (
        given is not None
        and isinstance(before, Tensor)
        and before.ndim > 2
        and given.shape == (len(before), before.shape[1:].numel())
        and given.is_contiguous()
        and before.is_contiguous()
        and given.data_ptr() == before.data_ptr()
    )


def _leads_to_the_logits(tail: nn.Sequential, snapshot: Snapshot, site: str, inputs: Any) -> bool:
    """Whether the layers alone do: something may have written into a tensor between two of them."""
    run = snapshot.forward(inputs=inputs, capture=[site])
    try:
        with observing(snapshot.view.model):
            logits = tail(run.captured[site])
    except Exception:
        return False  # A layer that needs what its parent prepares.
    return logits.shape == run.logits.shape and bool(torch.allclose(logits, run.logits, rtol=1e-4, equal_nan=True))


def _first_call_after(calls: list[tuple[nn.Module, Tensor | None, Any]], site: str, tensor: Tensor) -> int:
    """Index of the first call that can take a site's tensor; a layer that works in place returns the one it was given."""
    if site.endswith(":input"):
        return next((index for index, (_, given, _) in enumerate(calls) if given is tensor), len(calls))
    made = [index for index, (_, _, output) in enumerate(calls) if output is tensor]
    return made[0] + 1 if made else 0


def is_cut(view: ModelView, site: str) -> bool:
    """Whether every path from the input to the logits passes through a site, so that its tensor determines them."""
    snapshot = Snapshot(view, step=-1)
    batch = snapshot.batch("train").first(_FEW)
    if len(batch) < _FEW:
        return True
    run = snapshot.forward(inputs=batch.inputs, capture=[site])
    activations = run.captured[site]
    if len(activations) != len(batch):
        return False
    swapped = tree_map(lambda value: value.flip(0) if isinstance(value, Tensor) and value.ndim else value, batch.inputs)
    replaced = snapshot.forward(inputs=swapped, replace={site: activations})
    # Other rows stood beside these in the batch, which may change the last digits.
    noise = 1e-5 * float(run.logits.abs().nan_to_num().max())
    return torch.allclose(replaced.logits, run.logits, rtol=0.0, atol=noise, equal_nan=True)


def substituted(snapshot: Snapshot, site: str) -> Callable[[Tensor], Tensor]:
    """The network as a function of a site's tensor: what else reaches the output is held at the first sample's."""
    context = snapshot.batch("train").first(1).inputs

    def function(rows: Tensor) -> Tensor:
        inputs = tree_map(
            lambda value: value.expand(len(rows), *value.shape[1:]) if isinstance(value, Tensor) and value.ndim else value,
            context,
        )
        return snapshot.forward(inputs=inputs, replace={site: rows}).logits

    return function


def is_affine_after(view: ModelView, site: str) -> bool:
    """Whether the network is linear from a site on, as far as the middles between samples tell."""
    snapshot = Snapshot(view, step=-1)
    batch = snapshot.batch("train").first(_SEVERAL)
    if len(batch) < _FEW:
        return False
    ends = snapshot.forward(inputs=batch.inputs, capture=[site]).captured[site]
    others = ends.roll(1, 0)
    function = substituted(snapshot, site)
    outputs, inside = function(ends).double(), function((ends + others) / 2).double()
    noise = 1e-4 * float((outputs - outputs.roll(1, 0)).abs().max())
    return bool(((inside - (outputs + outputs.roll(1, 0)) / 2).abs() <= noise).all())
