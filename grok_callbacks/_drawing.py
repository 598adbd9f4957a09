"""Samples by index from a data set or from behind a loader, neither of which notices."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from grok_callbacks._copying import copies
from grok_callbacks._isolation import isolated_rng

__all__ = ["EMPTY", "Drawing", "default_size", "draw"]

EMPTY = "The probe's data are empty."

_DEFAULT_SIZE = 256
# The probe goes through the model in one pass, whose memory training has not been planned for.
_DEFAULT_BATCHES = 16
# Of a sampler that we don't know so many indices are listed at most, as it may have no end.
_MOST_LISTED = 2**20
# Loaders whose iteration is known to yield what their data sets and collate functions make.
_INDEXING_MODULES = ("torch.utils.data", "torchdata.stateful_dataloader")


class Drawing(NamedTuple):
    """Raw batches, and how many samples were asked for; there are fewer if the data hold no more."""

    batches: list[Any]
    size: int


def default_size(batch_size: float) -> int:
    """The samples of a probe whose size is not given: 256, and no more than 16 batches hold."""
    return math.ceil(min(_DEFAULT_SIZE, _DEFAULT_BATCHES * batch_size))


def draw(source: Any, size: int | None, seed: int, most_batches: float = math.inf) -> Drawing | None:
    """Samples chosen by ``seed``, or ``None`` if ``source`` can only be iterated.

    Copies are indexed: a data set that counts, shuffles or opens a file as it is indexed is as it was afterwards.

    Args:
        source: A data set, a loader, or one ready batch.
        size: How many samples, ``None`` for :func:`default_size`.
        seed: Chooses them, and starts the generators that augmentations use.
        most_batches: How many batches of the loader a run uses before it begins again. Where their order is the same each
            time, samples are drawn from these alone.

    Raises:
        ValueError: If there is no sample.
    """
    loader = source if hasattr(source, "dataset") and not isinstance(source, Dataset) else None
    if loader is None and not isinstance(source, Dataset):
        return Drawing([source], size or _DEFAULT_SIZE)
    dataset = source if loader is None else loader.dataset
    if not _can_be_indexed(dataset) or (loader is not None and not _yields_what_it_indexes(loader)):
        return None
    if len(dataset) == 0:
        raise ValueError(EMPTY)
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    with isolated_rng(dataset, *samplers, seed=seed), copies() as copy_of:
        if loader is None:
            return _items(copy_of(dataset), range(len(dataset)), default_collate, size or _DEFAULT_SIZE, seed)
        order = _order(loader, most_batches, copy_of)
        if len(order.indices) == 0:
            raise ValueError(EMPTY)
        dataset, collate = copy_of(dataset), copy_of(loader.collate_fn)
        if loader.batch_sampler is None:
            return _whole_batches(dataset, order.indices, collate, size, seed)
        return _items(dataset, order.indices, collate, size or default_size(order.batch_size), seed)


def _can_be_indexed(dataset: Any) -> bool:
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _yields_what_it_indexes(loader: Any) -> bool:
    """Whether a loader's batches are those of its data set: others may change them on the way."""
    if not isinstance(loader, DataLoader):
        return False
    ways = (type(loader).__iter__, type(loader)._get_iterator)
    return all(way.__module__.startswith(_INDEXING_MODULES) for way in ways)


def _items(dataset: Any, indices: Sequence[Any], collate: Callable[[Any], Any], size: int, seed: int) -> Drawing:
    chosen = _chosen(indices, size, seed)
    items = dataset.__getitems__(chosen) if hasattr(dataset, "__getitems__") else [dataset[index] for index in chosen]
    return Drawing([collate(items)], size)


def _whole_batches(dataset: Any, indices: Sequence[Any], convert: Callable[[Any], Any], size: int | None, seed: int) -> Drawing:
    """Without automatic batching each item is a batch of its own."""
    wanted = size or _DEFAULT_SIZE
    most = len(indices) if size else min(len(indices), _DEFAULT_BATCHES)
    batches: list[Any] = []
    total = 0
    for index in _chosen(indices, min(most, wanted), seed):
        batches.append(convert(dataset[index]))
        leaves = [leaf for leaf in tree_leaves(batches[-1]) if isinstance(leaf, Tensor) and leaf.ndim > 0]
        total += len(leaves[0]) if leaves else 1
        if total >= wanted:
            break
    return Drawing(batches, min(wanted, total) if len(batches) < len(indices) else wanted)


def _chosen(indices: Sequence[Any], size: int, seed: int) -> list[Any]:
    # ``sample`` of a range draws without listing it: the data may have billions of samples.
    return [indices[place] for place in random.Random(seed).sample(range(len(indices)), min(size, len(indices)))]


# The indices that a loader can come to: where one data set is split by samplers, the other loader's are not among them.


class _Order(NamedTuple):
    """Indices, each once, whether they come in the same order each time, and how many make a batch."""

    indices: Sequence[Any]
    is_fixed: bool
    batch_size: float
    #: How many processes share them, in turns.
    shares: int = 1


def _order(loader: Any, most_batches: float, copy_of: Callable[[Any], Any]) -> _Order:
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:
        order = _order_of(loader.sampler, len(loader.dataset), copy_of, most_batches)
    elif getattr(type(batch_sampler), "__iter__", None) is BatchSampler.__iter__:
        size = batch_sampler.batch_size
        order = _order_of(batch_sampler.sampler, len(loader.dataset), copy_of, most_batches * size)._replace(batch_size=size)
    else:
        return _order_of_batches(batch_sampler, len(loader.dataset), copy_of, most_batches)
    used = most_batches * order.batch_size * order.shares
    return order._replace(indices=order.indices[: int(used)]) if order.is_fixed and used < len(order.indices) else order


def _order_of(sampler: Any, total: int, copy_of: Callable[[Any], Any], used: float) -> _Order:
    way = getattr(type(sampler), "__iter__", None)
    if way is DistributedSampler.__iter__:
        return _Order(_up_to(sampler.dataset, total), not sampler.shuffle, 1, sampler.num_replicas)
    if isinstance(sampler, DistributedSampler) and hasattr(sampler.dataset, "_sampler"):
        # The user's own, which Lightning has wrapped as if it were a data set to share it out.
        inner = _order_of(sampler.dataset._sampler, total, copy_of, used)
        return inner._replace(is_fixed=inner.is_fixed and not sampler.shuffle, shares=sampler.num_replicas)
    if way in (SequentialSampler.__iter__, RandomSampler.__iter__):
        return _Order(_up_to(sampler.data_source, total), way is SequentialSampler.__iter__, 1)
    if way is SubsetRandomSampler.__iter__:
        return _Order([int(index) for index in sampler.indices], False, 1)
    if way is WeightedRandomSampler.__iter__:
        return _Order(torch.as_tensor(sampler.weights).nonzero().flatten().tolist(), False, 1)
    listed, is_fixed = _listed(sampler, min(total, _MOST_LISTED), copy_of, used)
    return _Order(_once(listed), is_fixed, 1)


def _up_to(data: Any, total: int) -> range:
    return range(min(len(data), total))


def _order_of_batches(batch_sampler: Any, total: int, copy_of: Callable[[Any], Any], most_batches: float) -> _Order:
    batches, is_fixed = _listed(batch_sampler, min(total, _MOST_LISTED), copy_of, most_batches, size_of=len)
    batches = batches[: int(most_batches)] if is_fixed and most_batches < len(batches) else batches
    indices = [index for batch in batches for index in batch]
    return _Order(_once(indices), is_fixed, len(indices) / max(len(batches), 1))


def _listed(
    sampler: Any, most: int, copy_of: Callable[[Any], Any], used: float, *, size_of: Callable[[Any], int] = lambda _: 1
) -> tuple[list[Any], bool]:
    """What a sampler gives, up to so many indices, and whether the part that a run uses is the same the next time."""
    if isinstance(sampler, Sequence) or type(sampler).__module__ in ("numpy", "torch"):
        return sampler.tolist() if hasattr(sampler, "tolist") else list(sampler), True
    listed: list[Any] = []
    sizes = 0
    for item in copy_of(sampler):
        if sizes >= most:
            break
        listed.append(item)
        sizes += size_of(item)
    if hasattr(sampler, "set_epoch") or used >= len(listed):
        return listed, False
    with isolated_rng(seed=1), copies() as copy_again:
        again = list(islice(iter(copy_again(sampler)), int(used)))
    return listed, _same(again, listed[: int(used)])


def _same(first: list[Any], second: list[Any]) -> bool:
    try:
        return bool(first == second)
    except (RuntimeError, ValueError):
        return False  # Indices that are tensors or arrays.


def _once(indices: list[Any]) -> list[Any]:
    return list(dict.fromkeys(indices)) if all(isinstance(index, Hashable) for index in indices) else indices
