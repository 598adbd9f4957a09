from __future__ import annotations

import pickle
import random
from collections import UserDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, default_collate, random_split

from grok_callbacks import Batch, Probe
from tests._common import Stream, samples


def numbers(count=100):
    """Samples that tell their index."""
    return TensorDataset(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count))


# Which samples.


def test_takes_a_seeded_choice_of_the_asked_size():
    chosen = [Probe(size=10, seed=seed, train=numbers()).sample("train").targets.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 10


def test_inputs_and_targets_stay_together():
    batch = Probe(size=50, train=numbers()).sample("train")
    assert torch.equal(batch.inputs[:, 0].long(), batch.targets)


@pytest.mark.parametrize("size", [1, 99, 100, 1000])
def test_takes_all_there_are_if_the_data_are_fewer(size):
    batch = Probe(size=size, train=numbers()).sample("train")
    assert len(batch) == min(size, 100)
    assert len(set(batch.targets.tolist())) == len(batch)


def test_train_and_validation_are_told_apart():
    probe = Probe(size=5, train=numbers(), validation=TensorDataset(-torch.ones(8, 1), torch.zeros(8)))
    assert (probe.sample("train").inputs >= 0).all()
    assert (probe.sample("validation").inputs == -1).all()
    assert Probe(train=numbers()).sample("validation") is None


@pytest.mark.parametrize("kwargs", [{"shuffle": True}, {"shuffle": False}, {"batch_size": 7}, {"num_workers": 1}])
def test_indexes_a_loaders_dataset_and_leaves_the_loader_alone(kwargs):
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state().clone(), torch.get_rng_state().clone()
    source = DataLoader(numbers(), generator=generator, **kwargs)
    assert torch.equal(Probe(size=9).sample("train", source).targets, Probe(size=9, train=numbers()).sample("train").targets)
    assert source._iterator is None
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_of_a_dataset_split_by_samplers_only_the_loaders_own_share():
    train = DataLoader(numbers(), 8, sampler=SubsetRandomSampler(range(60)))
    validation = DataLoader(numbers(), 8, sampler=SubsetRandomSampler(range(60, 100)))
    assert Probe(size=100).sample("train", train).targets.sort().values.tolist() == list(range(60))
    assert Probe(size=100).sample("validation", validation).targets.sort().values.tolist() == list(range(60, 100))
    batched = DataLoader(numbers(), batch_sampler=torch.utils.data.BatchSampler(SubsetRandomSampler(range(60)), 8, False))
    assert Probe(size=100).sample("train", batched).targets.max() < 60
    with pytest.raises(ValueError, match="empty"):
        Probe().sample("train", DataLoader(numbers(), 8, sampler=SubsetRandomSampler([])))


def test_subsets_and_collate_functions_and_batched_fetching():
    subset, _ = random_split(numbers(), [30, 70], generator=torch.Generator().manual_seed(0))
    assert set(Probe(size=99, train=subset).sample("train").targets.tolist()) == set(subset.indices)

    class Fetching(Dataset):
        def __len__(self):
            return 20

        def __getitems__(self, indices):
            return [(torch.tensor([float(i)]), i) for i in indices]

        def __getitem__(self, index):
            raise AssertionError("__getitems__ is there")

    def doubling(items):
        x, y = default_collate(items)
        return 2 * x, y

    batch = Probe(size=5).sample("train", DataLoader(Fetching(), collate_fn=doubling))
    assert torch.equal(batch.inputs[:, 0], 2.0 * batch.targets)


def test_augmentations_are_the_same_each_time_and_disturb_nobody():
    class Augmenting(Dataset):
        def __init__(self):
            self.own = np.random.default_rng(0)

        def __len__(self):
            return 50

        def __getitem__(self, index):
            return torch.rand(1) + random.random() + np.random.rand() + self.own.random(), index

    data, twin = Augmenting(), Augmenting()
    torch.manual_seed(1)
    first = Probe(size=10).sample("train", DataLoader(data))
    torch.manual_seed(2)
    random.random()
    assert torch.equal(Probe(size=10).sample("train", DataLoader(data)).inputs, first.inputs)
    assert data.own.random() == twin.own.random()


def test_loaders_without_automatic_batching():
    class Batches(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return torch.full((4, 1), float(index)), torch.full((4,), index)

    batch = Probe(size=10).sample("train", DataLoader(Batches(), batch_size=None))
    assert len(batch) == 10
    assert batch.targets.unique().numel() == 3
    assert torch.equal(batch.inputs[:, 0].long(), batch.targets)
    assert len(Probe(size=1000).sample("train", DataLoader(Batches(), batch_size=None))) == 40


def test_data_that_can_only_be_iterated():
    assert Probe().sample("train", DataLoader(Stream(samples()), 8)) is None
    with pytest.raises(ValueError, match="`train` of the Probe can only be iterated"):
        Probe(train=DataLoader(Stream(samples()), 8)).sample("train")


def test_a_ready_batch_is_copied():
    x, y = torch.randn(6, 2), torch.zeros(6, dtype=torch.long)
    batch = Probe(size=4, train=(x, y)).sample("train")
    x.zero_()
    assert len(batch) == 4
    assert batch.inputs.abs().min() > 0
    assert not Probe(train=torch.randn(3, 2, requires_grad=True)).sample("train").inputs.requires_grad


def test_nothing_to_draw_from():
    assert Probe().sample("train") is None


@pytest.mark.parametrize("empty", [TensorDataset(torch.zeros(0, 3)), torch.zeros(0, 3), (torch.zeros(0, 3), torch.zeros(0))])
def test_empty_data(empty):
    with pytest.raises(ValueError, match="empty"):
        Probe(train=empty).sample("train")


def test_batches_of_different_shapes():
    with pytest.raises(ValueError, match=r"different shapes.*`unpack`"):
        Probe().join([torch.zeros(2, 5), torch.zeros(2, 6)])
    with pytest.raises(ValueError, match="different shapes"):
        Probe().join(
            [{"x": torch.zeros(2), "z": torch.zeros(2), "y": torch.zeros(2)}, {"x": torch.zeros(2), "y": torch.zeros(2)}]
        )


def test_samples_drawn_in_inference_mode_can_be_differentiated():
    with torch.inference_mode():
        made_there = torch.randn(4, 2)
        batch = Probe().join([(made_there, torch.zeros(4))])
        indexed = Probe(train=TensorDataset(torch.randn(4, 2))).sample("train")
    for inputs in (batch.inputs, indexed.inputs):
        weight = torch.ones(2, requires_grad=True)
        (inputs @ weight).sum().backward()


# Settings.


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "8"])
def test_refuses_a_size_that_is_none(size):
    with pytest.raises(ValueError, match="`size`"):
        Probe(size=size)


def test_probes_with_the_same_settings_are_one_probe():
    data = numbers()
    assert Probe(train=data) == Probe(train=data)
    assert hash(Probe(train=data)) == hash(Probe(train=data))
    assert len({Probe(), Probe(size=1), Probe(seed=1), Probe(train=data), Probe(train=numbers()), Probe(loss=F.mse_loss)}) == 6
    assert Probe() != 3
    assert repr(Probe(size=3, train=data)) == "Probe(size=3, seed=0, train=...)"


def test_pickles():
    probe = pickle.loads(pickle.dumps(Probe(size=5, train=numbers(), loss=F.mse_loss)))
    assert probe.size == 5
    assert len(probe.sample("train")) == 5


# What a batch is.


@pytest.mark.parametrize(
    ("batch", "targets"),
    [
        ((torch.ones(2, 3), torch.zeros(2)), True),
        ([torch.ones(2, 3), torch.zeros(2)], True),
        (namedtuple("Pair", "x y")(torch.ones(2, 3), torch.zeros(2)), True),
        ((torch.ones(2, 3),), False),
        (torch.ones(2, 3), False),
        *[({"x": torch.ones(2, 3), key: torch.zeros(2)}, True) for key in ("labels", "label", "targets", "target", "y")],
        (UserDict(pixel_values=torch.ones(2, 3), labels=torch.zeros(2)), True),
    ],
)
def test_forms_of_batches(batch, targets):
    unpacked = Probe().unpack_batch(batch)
    assert torch.equal(unpacked.inputs, torch.ones(2, 3))
    assert (unpacked.targets is not None) == targets
    assert len(unpacked) == 2


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2), torch.ones(2), torch.ones(2)), (), "text", 3, None, {"a": torch.ones(2)}, {"y": torch.ones(2)},
        {"x": torch.ones(2), "y": torch.ones(2), "labels": torch.ones(2)}, SimpleNamespace(x=1),
    ],
    ids=lambda batch: type(batch).__name__,
)  # fmt: skip
def test_a_batch_that_it_cannot_read_names_the_argument(batch):
    with pytest.raises(ValueError, match="`unpack` of the Probe"):
        Probe().join([batch])


def test_unpack():
    probe = Probe(unpack=lambda batch: (batch[0], batch[2]))
    batch = probe.join([(torch.ones(2), None, torch.zeros(2))])
    assert batch.inputs.sum() == 2
    assert batch.targets.sum() == 0
    with pytest.raises(ValueError, match="no tensor with a sample dimension"):
        Probe(unpack=lambda batch: ("text", None)).join([torch.ones(3)])


def test_causal_labels_that_repeat_the_tokens_are_shifted():
    tokens = torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]])
    labels = torch.tensor([[5, 6, 7, 8], [5, 9, -100, -100]])
    batch = Probe().unpack_batch({"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": labels})
    assert batch.targets.tolist() == [[6, 7, 8, -100], [9, -100, -100, -100]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    # Labels that the data set has shifted itself, or of another kind, stay.
    shifted = torch.tensor([[6, 7, 8, -100], [9, -100, -100, -100]])
    assert Probe().unpack_batch({"input_ids": tokens, "labels": shifted}).targets is shifted
    classes = torch.tensor([0, 1])
    assert Probe().unpack_batch({"input_ids": tokens, "labels": classes}).targets is classes


# How the model is called.


class Keywords(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=input_ids.float() * attention_mask)


class AnyKeywords(nn.Module):
    def forward(self, **kwargs):
        return {"logits": torch.tensor(float(len(kwargs))), "loss": None}


def test_mappings_go_in_by_name():
    inputs = {"input_ids": torch.ones(2, 3), "attention_mask": torch.full((2, 3), 2), "idx": torch.zeros(2)}
    assert torch.equal(Probe().call(Keywords(), inputs), torch.full((2, 3), 2.0))
    assert Probe().call(AnyKeywords(), inputs) == 3
    with pytest.raises(ValueError, match=r"none of the batch's.*`forward` of the Probe"):
        Probe().call(Keywords(), {"pixels": torch.ones(2), "depth": torch.ones(2)})


def test_forward():
    probe = Probe(forward=lambda model, inputs: model(inputs)[1])

    class Pair(nn.Module):
        def forward(self, x):
            return x, x + 1

    assert probe.call(Pair(), torch.zeros(2)).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"returned a tuple.*`forward` of the Probe"):
        Probe().call(Pair(), torch.zeros(2))


# Aligning outputs with targets.


def test_rows_of_logits():
    logits, targets = Probe().align(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert logits.shape == (4, 3)
    assert targets.shape == (4,)
    logits, targets = Probe().align(torch.randn(4, 5, 3), None)
    assert logits.shape == (20, 3)
    assert targets is None


@pytest.mark.parametrize("layout", ["positions last", "classes last"])
def test_positions_are_flattened_and_ignored_ones_dropped(layout):
    logits, targets = torch.randn(2, 4, 3), torch.tensor([[0, 1, -100, 2], [-100, 0, 0, -100]])
    given = logits if layout == "classes last" else logits.movedim(-1, 1)
    rows, labels = Probe().align(given, targets)
    assert labels.tolist() == [0, 1, 2, 0, 0]
    assert torch.equal(rows, torch.stack([logits[0, 0], logits[0, 1], logits[0, 3], logits[1, 1], logits[1, 2]]))


def test_images_of_logits():
    logits, targets = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    rows, labels = Probe().align(logits, targets)
    assert rows.shape == (40, 3)
    assert labels.shape == (40,)
    assert torch.allclose(F.cross_entropy(rows, labels), F.cross_entropy(logits, targets))


def test_regression_targets():
    logits, targets = Probe().align(torch.randn(4, 1), torch.randn(4))
    assert logits.shape == targets.shape == (4,)
    logits, targets = Probe().align(torch.randn(4, 5, 2), torch.randn(4, 5, 2))
    assert logits.shape == targets.shape == (20, 2)
    one_hot = F.one_hot(torch.tensor([0, 2]), 3).float()
    assert Probe().align(torch.randn(2, 3), one_hot)[1] is one_hot


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.randn(4, 3), torch.zeros(5, dtype=torch.long)), (torch.randn(4, 7, 3), torch.zeros(4, dtype=torch.long)),
        (torch.randn(4, 3), torch.randn(4, 2)), (torch.randn(()), torch.zeros(4, dtype=torch.long)),
    ],
)  # fmt: skip
def test_outputs_that_do_not_fit_the_targets(logits, targets):
    with pytest.raises(ValueError, match=r"don't fit.*`forward`.*`unpack`"):
        Probe().align(logits, targets)


# Losses.


def test_default_losses():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert Probe().loss_of(logits, labels) == F.cross_entropy(logits.double(), labels)
    assert Probe().loss_of(logits.bfloat16(), labels.int()).dtype == torch.float64
    targets = torch.randn(5, 3)
    assert Probe().loss_of(logits, targets) == F.mse_loss(logits.double(), targets.double())


def test_losses_of_ones_own():
    probe = Probe(loss=lambda logits, targets: F.binary_cross_entropy_with_logits(logits[:, 0], targets.float()))
    logits, labels = torch.randn(4, 1), torch.tensor([0, 1, 1, 0])
    assert torch.isclose(
        probe.loss_of(logits, labels).float(), F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    )
    # One logit and zeros and ones need no function of one's own.
    expected = F.binary_cross_entropy_with_logits(logits[:, 0].double(), labels.double())
    assert torch.isclose(Probe().loss_of(logits, labels), expected)
    with pytest.raises(ValueError, match="`loss` of the Probe"):
        Probe().loss_of(logits, labels + 1)
    with pytest.raises(ValueError, match=r"no targets.*`unpack`"):
        Probe().loss_of(logits, None)


@pytest.mark.parametrize("targets", [[0, 3], [-1, 2], [0, 9]])
def test_targets_that_are_no_classes(targets):
    with pytest.raises(ValueError, match=r"Targets from .* returns 3 numbers.*embedding.*`forward` of the Probe"):
        Probe().check_classes(torch.tensor(targets), 3)
    Probe(loss=F.mse_loss).check_classes(torch.tensor(targets), 3)


def test_targets_that_are_classes():
    for targets in ([0, 1, 2], [-100, 2], [-100, -100], []):
        Probe().check_classes(torch.tensor(targets, dtype=torch.long), 3)
    Probe().check_classes(torch.tensor([0.5, 7.0]), 3)
    # A single output is checked by its loss.
    Probe().check_classes(torch.tensor([0, 5]), 1)


# Batches.


def test_a_batch_moves_and_converts_its_floating_inputs_only():
    batch = Batch({"x": torch.randn(3, 2), "ids": torch.ones(3, dtype=torch.long), "name": "a"}, torch.randn(3))
    moved = batch.to(torch.device("cpu"), torch.bfloat16)
    assert moved.inputs["x"].dtype == torch.bfloat16
    assert moved.inputs["ids"].dtype == torch.long
    assert moved.targets.dtype == torch.float32
    moved.inputs["ids"].zero_()
    moved.targets.zero_()
    assert batch.inputs["ids"].sum() == 3
    assert batch.targets.abs().sum() > 0


def test_the_first_samples_of_a_batch():
    batch = Batch([torch.arange(5), torch.tensor(7.0), torch.randn(3, 3)], torch.arange(5))
    head = batch.first(2)
    assert head.inputs[0].tolist() == [0, 1]
    assert head.inputs[1] == 7
    assert head.inputs[2].shape == (3, 3)
    assert head.targets.tolist() == [0, 1]
