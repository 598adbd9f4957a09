from __future__ import annotations

import math
import random
from collections import deque
from threading import Thread

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from grok_callbacks import Probe
from grok_callbacks._copying import copies
from grok_callbacks._drawing import _order, draw


def numbers(count=100):
    """Samples that tell their index."""
    return TensorDataset(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count))


def drawn(source, size=1000, most_batches=math.inf):
    """The targets of all samples that can be drawn."""
    drawing = draw(source, size, 0, most_batches)
    return sorted(int(target) for batch in drawing.batches for target in batch[1])


# Copies are indexed.


class Pool(Dataset):
    """Hands out its samples without replacement, whatever index it is asked for."""

    def __init__(self, container=list):
        self.made = container
        self.pool = container(range(20))
        self.count = 0
        self.cache = {}
        self.seen = set()

    def __len__(self):
        return 20

    def __getitem__(self, index):
        self.count += 1
        self.seen.add(index)
        self.cache.setdefault("all", []).append(index)
        chosen = self.pool.pop()
        return torch.zeros(1), chosen

    def state(self):
        return self.made(self.pool), self.count, {key: list(value) for key, value in self.cache.items()}, set(self.seen)


class Wrapper(Dataset):
    """Asks what it wraps for all that it has not, as wrappers do."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


class Held:
    """Holds a data set in a plain object."""

    def __init__(self, dataset):
        self.inner = {"datasets": (dataset,)}

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.inner["datasets"][0][index]


@pytest.mark.parametrize("container", [list, deque])
@pytest.mark.parametrize(
    "around",
    [
        lambda pool: pool,
        lambda pool: Subset(pool, range(20)),
        lambda pool: ConcatDataset([pool, pool]),
        Wrapper,
        lambda pool: Wrapper(Wrapper(Subset(pool, range(20)))),
        Held,
    ],
)
def test_data_sets_that_change_as_they_are_indexed_stay_as_they_were(container, around):
    pool = Pool(container)
    pool.cache["all"] = [0]
    before = pool.state()
    assert len(draw(DataLoader(around(pool), 4), 8, 0).batches[0][1]) == 8
    assert pool.state() == before


def test_a_file_that_is_opened_when_first_read_is_not_opened_for_training(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(range(20)))
    opened = []

    class File(Dataset):
        handle = None

        def __len__(self):
            return 20

        def __getitem__(self, index):
            if self.handle is None:
                self.handle = path.open("rb", buffering=0)
                opened.append(self.handle)
            self.handle.seek(index)
            return torch.zeros(1), self.handle.read(1)[0]

        def __del__(self):
            if self.handle is not None:
                self.handle.close()

    data = File()
    assert drawn(DataLoader(data, 4)) == list(range(20))
    assert data.handle is None
    assert len(opened) == 1
    opened.pop().close()
    # One that is open already is shared, and left open.
    assert data[3][1] == 3
    assert drawn(DataLoader(data, 4)) == list(range(20))
    assert data[4][1] == 4
    assert len(opened) == 1


def test_a_method_that_collates_belongs_to_the_copy():
    class Counting(Dataset):
        calls = 0

        def __len__(self):
            return 20

        def __getitem__(self, index):
            return torch.zeros(1), index

        def collate(self, items):
            self.calls += 1
            return default_collate(items)

    data = Counting()
    assert drawn(DataLoader(data, 4, collate_fn=data.collate)) == list(range(20))
    assert data.calls == 0


def test_tensors_and_arrays_are_shared_and_everything_else_of_the_data_set_is_too():
    class Holding(Dataset):
        def __init__(self):
            self.tensor, self.array = torch.zeros(3), np.zeros(3)
            self.module, self.function = torch.nn.Linear(1, 1), len
            self.lines = [object() for _ in range(5000)]
            self.twice = self.again = {"a": 1}

    class Slots(Dataset):
        __slots__ = ("pool",)

    slots = Slots()
    slots.pool = [1]
    data = Holding()
    with copies() as copy_of:
        assert copy_of(slots).pool == [1]
        assert copy_of(slots).pool is not slots.pool
        twin = copy_of(data)
        assert twin is copy_of(data)
        assert twin is not data
        assert type(twin) is Holding
        for name in ("tensor", "array", "module", "function"):
            assert getattr(twin, name) is getattr(data, name)
        assert twin.lines is not data.lines
        assert twin.lines[0] is data.lines[0]
        assert twin.twice is twin.again is not data.twice


def test_what_cannot_be_copied_is_indexed_itself():
    class Refusing(Dataset):
        def __reduce_ex__(self, protocol):
            raise TypeError("an open connection")

    class Filled(Dataset):
        def __init__(self):
            self.worker = Thread(target=print)
            self.buffer = deque()

    with copies() as copy_of:
        # What a thread fills, it fills in the original alone.
        for data in (Refusing(), iter([1]), Filled(), numbers().tensors[0], torch.nn.Linear(1, 1)):
            assert copy_of(data) is data


# Samples that a loader can come to.


def test_a_list_of_indices_as_sampler():
    places = list(range(0, 100, 2))
    assert drawn(DataLoader(numbers(), 8, sampler=places)) == places
    assert drawn(DataLoader(numbers(), 8, sampler=np.array(places))) == places
    assert drawn(DataLoader(numbers(), 8, sampler=torch.tensor(places))) == places
    assert drawn(DataLoader(numbers(), batch_sampler=[[5, 6], [7]])) == [5, 6, 7]


class Own(Sampler):
    """A sampler of the user's, which must not notice that it has been asked."""

    def __init__(self, indices, *, endless=False):
        self.indices = indices
        self.endless = endless
        self.epochs = 0
        self.order = []

    def __iter__(self):
        self.epochs += 1
        while True:
            self.order[:] = random.sample(self.indices, len(self.indices))
            yield from self.order
            if not self.endless:
                return


@pytest.mark.parametrize("endless", [False, True])
def test_a_sampler_of_ones_own_is_asked_and_does_not_notice(endless):
    sampler = Own(list(range(30)), endless=endless)
    random.seed(3)
    expected = random.random()
    random.seed(3)
    assert drawn(DataLoader(numbers(), 8, sampler=sampler)) == list(range(30))
    assert (sampler.epochs, sampler.order) == (0, [])
    assert random.random() == expected


def test_batches_of_indices_that_are_no_numbers():
    class Sized(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, key):
            index, size = key
            return torch.full((1,), size), index

    class Batches:
        def __iter__(self):
            for start in (0, 8):
                yield [(index, 2.0) for index in range(start, start + 8)]

    assert drawn(DataLoader(Sized(), batch_sampler=Batches())) == list(range(16))


def test_batches_of_a_sampler_without_end():
    class Batches:
        def __iter__(self):
            while True:
                yield random.sample(range(30), 10)

    order = _order(DataLoader(numbers(1000), batch_sampler=Batches()), math.inf, lambda value: value)
    assert set(order.indices) == set(range(30))
    assert order.batch_size == 10


def test_of_large_nested_lists_only_so_much_is_copied():
    class Nested(Dataset):
        def __init__(self):
            self.rows = [[[place] for place in range(1000)] for _ in range(1000)]

    data = Nested()
    with copies() as copy_of:
        twin = copy_of(data)
        assert twin.rows is not data.rows
        assert sum(new is not old for new, old in zip(twin.rows[0], data.rows[0], strict=True)) == 1000
        assert sum(new is not old for new, old in zip(twin.rows[-1], data.rows[-1], strict=True)) == 0


def test_weights_of_zero_are_never_drawn():
    weights = [0.0] * 60 + [1.0] * 40
    assert drawn(DataLoader(numbers(), 8, sampler=WeightedRandomSampler(weights, 10))) == list(range(60, 100))


def test_a_sampler_of_a_part():
    assert drawn(DataLoader(numbers(), 8, sampler=SequentialSampler(range(30)))) == list(range(30))


# Samples that a limit leaves.


@pytest.mark.parametrize(
    ("make", "last"),
    [
        (lambda: DataLoader(numbers(), 8), 16),
        (lambda: DataLoader(numbers(), 8, shuffle=True), 100),
        (lambda: DataLoader(numbers(), 8, sampler=list(range(50))), 16),
        (lambda: DataLoader(numbers(), batch_sampler=BatchSampler(range(50), 4, False)), 8),
        (lambda: DataLoader(numbers(), batch_sampler=[[0, 1, 2], [3, 4], [5]]), 5),
        (lambda: DataLoader(numbers(), sampler=Own(list(range(50)))), 50),
        (lambda: DataLoader(numbers(), 8, sampler=DistributedSampler(numbers(), 3, 0, shuffle=False)), 48),
        (lambda: DataLoader(numbers(), 8, sampler=DistributedSampler(numbers(), 3, 0)), 100),
        (lambda: DataLoader(numbers(), 1, sampler=_Straight()), 2),
    ],
)
def test_where_the_order_stays_the_same_only_the_samples_within_a_limit(make, last):
    assert drawn(make(), most_batches=2) == list(range(last))


class _Straight:
    def __iter__(self):
        return iter(range(100))


def test_without_automatic_batching_a_limit_counts_items():
    class Batches(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return torch.full((4, 1), float(index)), torch.full((4,), index)

    assert set(drawn(DataLoader(Batches(), batch_size=None), most_batches=3)) == {0, 1, 2}


# Loaders that are more than their data set.


class Around:
    """Changes batches on their way."""

    def __init__(self, loader):
        self.loader, self.dataset, self.collate_fn = loader, loader.dataset, loader.collate_fn

    def __iter__(self):
        return ((x / 2, y) for x, y in self.loader)


class Changing(DataLoader):
    def __iter__(self):
        return ((x / 2, y) for x, y in super().__iter__())


class Collating(DataLoader):
    """Changes no more than how it is made."""

    def __init__(self, data):
        super().__init__(data, 8, collate_fn=default_collate)


def test_only_loaders_that_yield_what_they_index_are_indexed():
    assert draw(Around(DataLoader(numbers())), 8, 0) is None
    assert draw(Changing(numbers()), 8, 0) is None
    assert drawn(Collating(numbers())) == list(range(100))
    with pytest.raises(ValueError, match="can only be iterated"):
        Probe(train=Around(DataLoader(numbers()))).sample("train")


# How many samples, unless that is said.


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: DataLoader(numbers(1000), 2), 32),
        (lambda: DataLoader(numbers(1000), 16), 256),
        (lambda: DataLoader(numbers(1000), 500), 256),
        (lambda: DataLoader(numbers(1000), batch_sampler=BatchSampler(range(1000), 3, True)), 48),
        (lambda: DataLoader(numbers(1000), batch_sampler=[[place, place + 1] for place in range(0, 1000, 2)]), 32),
        (lambda: numbers(1000), 256),
    ],
)
def test_the_default_size_is_at_most_sixteen_batches(make, expected):
    batch = Probe().sample("train", make())
    assert len(batch) == batch.asked == expected
    assert len(Probe(size=100).sample("train", make())) == 100


@pytest.mark.parametrize(("each", "expected"), [(4, 64), (100, 256)])
def test_the_default_size_without_automatic_batching(each, expected):
    class Batches(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return torch.full((each, 1), float(index)), torch.full((each,), index)

    source = DataLoader(Batches(), batch_size=None)
    batch = Probe().sample("train", source)
    assert len(batch) == batch.asked == expected
    assert len(Probe(size=100).sample("train", source)) == 100


def test_data_that_are_fewer_are_known_to_be_all():
    batch = Probe().sample("train", DataLoader(numbers(30), 2))
    assert (len(batch), batch.asked) == (30, 32)
