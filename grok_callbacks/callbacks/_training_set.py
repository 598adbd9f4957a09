"""The whole training set, for measures that tell what a model has seen from what it has not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from grok_callbacks.probe import Batch
from grok_callbacks.snapshot import ModelView

if TYPE_CHECKING:
    from grok_callbacks.callbacks.monitor import Monitor

__all__ = ["row_keys", "seen_rows"]

# Larger sets are not read: the start of a run should take seconds, and hold no second copy of the data.
_LARGEST_SET = 2**18
_MOST_BYTES = 2**26


def row_keys(inputs: Any) -> list[bytes]:
    """One key for each sample, equal for samples whose tensors are equal to the last bit.

    Args:
        inputs: Tensors with samples first, in any structure.

    Raises:
        ValueError: If the tensors don't have as many samples.
    """
    tensors = [leaf.detach().cpu() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    if len({len(tensor) for tensor in tensors}) != 1:
        raise ValueError(f"Inputs must be tensors of as many samples, got {[tuple(tensor.shape) for tensor in tensors]}.")
    parts = [tensor.reshape(len(tensor), -1).contiguous().view(torch.uint8) for tensor in tensors]
    return [row.tobytes() for row in torch.cat(parts, 1).numpy()]


def seen_rows(monitor: Monitor, view: ModelView) -> frozenset[bytes] | None:
    """Keys of all training inputs, or ``None`` where they can't be had: data that can only be iterated, or too many.

    Every rank must call it.
    """
    samples = view.require_samples("train")
    bytes_each = sum(leaf[:1].nbytes for leaf in tree_leaves(samples.inputs) if isinstance(leaf, Tensor) and leaf.ndim > 0)
    limit = min(_LARGEST_SET, _MOST_BYTES // max(bytes_each, 1))
    probe = replace(view.probe, size=limit + 1)
    everything = probe.sample("train") if monitor.session is None else monitor.session._sample(probe, "train")
    if not isinstance(everything, Batch) or len(everything) > limit:
        return None
    return frozenset(row_keys(everything.inputs))
