"""Splits, seeds and loaders of the data modules."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from grok_callbacks.tasks import ArrayDataset, DigitsDataModule, PairTaskDataModule, load_digits, make_task


def pairs_of(dataset):
    return {(*inputs.tolist(), target.item()) for inputs, target in (dataset[i] for i in range(len(dataset)))}


@pytest.mark.parametrize(
    ("task", "size", "train_fraction"), [("add", 13, 0.7), ("div", 7, 0.5), ("permutation", 3, 0.3), ("random", 5, 0.9)]
)
def test_split_is_disjoint_and_covers(task, size, train_fraction):
    data = PairTaskDataModule(task, size, train_fraction, seed=5)
    whole = make_task(task, size, seed=5)
    train, val = pairs_of(data.train_set), pairs_of(data.val_set)
    assert len(data.train_set) == len(train) == round(train_fraction * len(whole))
    assert not train & val
    assert train | val == pairs_of(ArrayDataset(whole.inputs, whole.targets))


def test_seed_decides_the_split():
    first, again, other = (PairTaskDataModule("add", 13, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.train_set.inputs, again.train_set.inputs)
    assert torch.equal(first.val_set.targets, again.val_set.targets)
    assert pairs_of(first.train_set) != pairs_of(other.train_set)


def test_global_generator_neither_moves_nor_matters():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = PairTaskDataModule("add", 13)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(first.train_set.inputs, PairTaskDataModule("add", 13).train_set.inputs)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0, 1e-6, 1 - 1e-6, float("nan")])
def test_both_parts_hold_something(fraction):
    with pytest.raises(ValueError, match="`train_fraction`"):
        PairTaskDataModule("add", 5, train_fraction=fraction)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_is_positive(batch_size):
    with pytest.raises(ValueError, match="`batch_size`"):
        PairTaskDataModule("add", 5, batch_size=batch_size)


def test_full_batch_is_one_step_an_epoch_with_every_sample():
    data = PairTaskDataModule("add", 7)
    for loader, dataset in (
        (data.train_dataloader(), data.train_set),
        (data.val_dataloader(), data.val_set),
    ):
        assert len(loader) == 1
        ((inputs, targets),) = loader
        assert torch.equal(inputs, dataset.inputs)
        assert torch.equal(targets, dataset.targets)


def test_small_batches_are_shuffled_and_complete():
    data = PairTaskDataModule("add", 7, batch_size=5)
    loader = data.train_dataloader()
    assert len(loader) == -(-len(data.train_set) // 5)
    torch.manual_seed(0)
    epochs = [[(*x.tolist(), y.item()) for batch in loader for x, y in zip(*batch, strict=True)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) == set(epochs[1]) == pairs_of(data.train_set)
    assert len(epochs[0]) == len(data.train_set)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("make", [lambda: PairTaskDataModule("xor", 3), lambda: DigitsDataModule(train_size=50)])
def test_collating_indexed_samples_gives_the_loaders_batch(make, num_workers):
    loader = make().train_dataloader()
    size = len(loader.dataset)
    loader = DataLoader(loader.dataset, batch_size=size, collate_fn=loader.collate_fn, num_workers=num_workers)
    samples = [loader.dataset[i] for i in range(size)]
    for inputs, targets in (next(iter(loader)), loader.collate_fn(samples), default_collate(samples)):
        assert torch.equal(inputs, loader.dataset.inputs)
        assert torch.equal(targets, loader.dataset.targets)


def test_dataset_wants_a_target_for_each_input():
    with pytest.raises(ValueError, match="`targets`"):
        ArrayDataset(torch.zeros(3, 2), torch.zeros(2))


@pytest.mark.parametrize("one_hot", [True, False])
def test_digits(one_hot):
    images, labels = load_digits()
    data = DigitsDataModule(train_size=1000, one_hot=one_hot, seed=2)
    assert len(data.train_set) == 1000
    assert len(data.val_set) == 797
    both = torch.cat([data.train_set.inputs, data.val_set.inputs]).flatten(1)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, images.flatten(1).tolist()))
    targets = torch.cat([data.train_set.targets, data.val_set.targets])
    if one_hot:
        assert targets.dtype == torch.float32
        assert targets.sum(1).eq(1).all()
        assert targets.max() == 1
        targets = targets.argmax(1)
    assert targets.bincount().tolist() == labels.bincount().tolist()
    # An image keeps its label through the split.
    found = (images.flatten(1) == both[0]).all(1).nonzero().item()
    assert labels[found] == targets[0]


@pytest.mark.parametrize("train_size", [0, -1, 1797, 2000])
def test_digits_train_size(train_size):
    with pytest.raises(ValueError, match="`train_size`"):
        DigitsDataModule(train_size=train_size)
