"""CommutativityMonitor on networks whose symmetry is known."""

from __future__ import annotations

import math
import warnings

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grok_callbacks import CommutativityMonitor, Probe, Recorder, default_callbacks
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.tasks import PairTaskDataModule
from grok_callbacks.tasks.modules import EmbeddingMLP
from tests._common import Plain, Stream, samples

KEY = "grok/commutativity"


class Table(nn.Module):
    """Answers from a table, as one-hot logits times ``scale``."""

    def __init__(self, answers, scale=1.0):
        super().__init__()
        self.register_buffer("answers", answers)
        self.scale = scale

    def forward(self, pairs):
        return self.scale * F.one_hot(self.answers[pairs[:, 0], pairs[:, 1]], len(self.answers)).float()


def table(seed=0, size=6):
    return torch.randint(size, (size, size), generator=torch.Generator().manual_seed(seed))


def all_pairs(size=6):
    return torch.cartesian_prod(torch.arange(size), torch.arange(size))


def record(model, train, validation=None, **settings):
    batch = [None if pairs is None else (pairs, torch.zeros(len(pairs), dtype=torch.long)) for pairs in (train, validation)]
    size = settings.pop("size", 256)
    monitor = CommutativityMonitor(probe=Probe(size=size, train=batch[0], validation=batch[1]), on_error="raise", **settings)
    return Recorder(model, [monitor]).record(step=0)


def test_counts_by_hand():
    answers = table()
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    train, validation = all_pairs()[order[:20]], all_pairs()[order[20:]]
    values = record(Table(answers, scale=3.0), train, validation)
    seen = {tuple(pair) for pair in train.tolist()}

    def share(pairs, only_new):
        chosen = [(a, b) for a, b in pairs.tolist() if not only_new or (a != b and (b, a) not in seen)]
        return sum(int(answers[a, b] == answers[b, a]) for a, b in chosen) / len(chosen)

    assert values[KEY] == pytest.approx(share(train, False))
    assert values[f"{KEY}/unseen"] == pytest.approx(share(train, True))
    assert values[f"{KEY}/both_unseen"] == pytest.approx(share(validation, True))
    # Two one-hot vectors times 3 that differ are 2 * 9 apart in 6 logits.
    assert values[f"{KEY}/logit_distance"] == pytest.approx((1 - values[KEY]) * 18 / 6, rel=1e-6)
    assert len(values) == 4


def test_the_whole_training_set_counts_as_seen_not_only_the_probe():
    pairs = all_pairs()
    small = record(Table(table()), pairs, size=5)
    assert f"{KEY}/unseen" not in small  # every mirror image was trained on
    data = TensorDataset(pairs, torch.zeros(36, dtype=torch.long))
    monitor = CommutativityMonitor(probe=Probe(size=5, train=data), on_error="raise")
    assert f"{KEY}/unseen" not in Recorder(Table(table()), [monitor]).record(0)


def test_train_inputs_given():
    pairs = torch.tensor([[0, 1], [2, 3]])
    values = record(Table(table()), pairs, train_inputs=torch.tensor([[1, 0], [2, 3]]))
    assert values[f"{KEY}/unseen"] == float(table()[2, 3] == table()[3, 2])


def test_memorised_pairs_do_not_hide_asymmetry():
    """A network that knows both orders of what it saw and guesses the rest looks commutative, but for unseen mirrors."""
    size = 6
    pairs = all_pairs(size)
    answers = (pairs.sum(1) % size).view(size, size)
    train = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2], [4, 5]])
    answers[5, 4] = (answers[4, 5] + 1) % size
    values = record(Table(answers), train)
    assert values[KEY] == pytest.approx(4 / 5)
    assert values[f"{KEY}/unseen"] == 0.0


def test_any_symmetry_can_be_watched():
    class Brightness(nn.Module):
        def forward(self, images):
            return torch.stack([images.flatten(1).sum(1), images[..., 0].flatten(1).sum(1)], 1)

    images = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    values = record(Brightness(), images, swap=lambda images: images.flip(-1))
    assert values[KEY] == values[f"{KEY}/unseen"] == 1.0
    assert values[f"{KEY}/logit_distance"] > 0


def test_a_swap_that_writes_in_place_leaves_the_probe_alone():
    def swap(pairs):
        pairs.copy_(pairs.flip(1).clone())
        return pairs

    pairs = all_pairs()[:9]
    assert record(Table(table()), pairs, swap=swap) == record(Table(table()), pairs)


@pytest.mark.parametrize(
    ("inputs", "swap"),
    [
        (torch.rand(5, 1, 4, 4), None),
        (torch.rand(5, 9), None),
        (torch.randint(5, (5, 2)), lambda pairs: pairs[:, :1]),
        (torch.randint(5, (5, 2)), lambda pairs: pairs[1:]),
        (torch.randint(5, (5, 2)), lambda pairs: pairs.float()),
    ],
)
def test_inputs_that_cannot_be_swapped_are_refused(inputs, swap):
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    model(inputs.float())

    class Floats(nn.Module):
        def forward(self, x):
            return model(x.float())

    with pytest.raises(ValueError, match="`swap`"):
        record(Floats(), inputs, swap=swap)


def test_predictions_per_position_are_refused():
    tokens = torch.randint(5, (4, 3))
    recorder = Recorder(nn.Embedding(5, 5), [CommutativityMonitor(probe=Probe(train=(tokens, tokens)))])
    with pytest.raises(ValueError, match="`forward`"):
        recorder.record(0)


def test_logits_that_are_not_numbers():
    class Broken(nn.Module):
        def forward(self, pairs):
            return torch.full((len(pairs), 3), torch.nan)

    with pytest.warns(UserWarning, match="nan at step 0"):
        values = record(Broken(), all_pairs()[:4])
    assert values
    assert all(math.isnan(value) for value in values.values())


def fit(module, data, *monitors):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=4, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(monitors),
    )  # fmt: skip
    trainer.fit(module, data)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_in_a_trainer_the_loaders_data_are_what_was_seen():
    data = PairTaskDataModule("add", 7, train_fraction=0.5)
    module = EmbeddingMLP(7, 7)
    logged = fit(module, data, CommutativityMonitor(on_error="raise", probe=Probe(size=20)))
    train, val = data.train_set.inputs, data.val_set.inputs
    direct = record(module, train, val)
    assert {key for key in logged if key.startswith(KEY)} == set(direct)
    # At all samples the values are those of the loop of one's own.
    logged = fit(EmbeddingMLP(7, 7), data, CommutativityMonitor(on_error="raise"))
    assert set(direct) <= set(logged)


def test_data_that_can_only_be_iterated_have_no_unseen_pairs():
    pairs = all_pairs(5)
    stream = DataLoader(Stream(TensorDataset(pairs, pairs.sum(1) % 5)), batch_size=5)
    probe = Probe(size=10)
    logged = fit(EmbeddingMLP(5, 5), stream, CommutativityMonitor(probe=probe, on_error="raise"))
    assert KEY in logged
    assert f"{KEY}/unseen" not in logged
    given = CommutativityMonitor(probe=probe, on_error="raise", train_inputs=pairs[:10])
    assert f"{KEY}/unseen" in fit(EmbeddingMLP(5, 5), stream, given)


def test_images_are_refused_at_the_start_of_fit_and_skipped_by_the_preset():
    data = DataLoader(samples(), batch_size=8)
    with pytest.raises(MisconfigurationException, match="`swap`"):
        fit(Plain(), data, CommutativityMonitor())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logged = fit(Plain(), data, *default_callbacks("full"))
    assert KEY not in logged
    assert any("CommutativityMonitor" in str(warning.message) and "left out" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(("positions", "expected"), [(2, True), (3, True), (4, False)])
def test_presets_take_operands_and_no_other_sequences(positions, expected):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(4 * positions, 5))
    tokens = torch.randint(5, (9, positions), generator=torch.Generator().manual_seed(0))
    monitor = CommutativityMonitor(probe=Probe(train=(tokens, tokens[:, 0])))
    monitor.optional = True
    recorder = Recorder(model, [monitor])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (KEY in recorder.record(0)) == expected
