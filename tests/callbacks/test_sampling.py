"""Which samples the monitors of a Trainer see, and that the training doesn't notice."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from grok_callbacks import EverySteps, Monitor, Probe, default_callbacks
from grok_callbacks.callbacks import monitor as monitor_module
from tests._common import Plain, Stream, fit, loader, same_weights, samples


class Seen(Monitor):
    """Remembers its probe."""

    def __init__(self, split="train", **kwargs):
        super().__init__(prefix=split, **kwargs)
        self.split = split
        self.inputs = {}

    def measure(self, snapshot):
        if snapshot.has(self.split):
            self.inputs[snapshot.step] = snapshot.batch(self.split).inputs
        return {"has": float(snapshot.has(self.split))}


def seen(module=None, train=None, validation=None, *, probe=None, **kwargs):
    """The last inputs that a monitor of each split saw."""
    monitors = [Seen(split, probe=probe) for split in ("train", "validation")]
    fit(monitors, module, train, validation, **kwargs)
    return [list(monitor.inputs.values())[-1] if monitor.inputs else None for monitor in monitors]


class Pool(Dataset):
    """Hands out its samples without replacement, whatever index it is asked for."""

    def __init__(self):
        self.data, self.pool = samples(), []

    def __len__(self):
        return 32

    def __getitem__(self, index):
        if not self.pool:
            self.pool = list(range(32))
        return self.data[self.pool.pop()]


def test_training_on_a_data_set_that_changes_as_it_is_indexed_stays_what_it_was():
    modules = []
    for callbacks in ([], default_callbacks("standard")):
        torch.manual_seed(0)
        modules.append(fit(callbacks, Plain(), DataLoader(Pool(), 5), max_steps=9)[0])
    assert modules[0].losses == modules[1].losses
    assert same_weights(*modules)


def test_hooks_that_augment_in_training_leave_the_validation_samples_alone():
    class Augmenting(Plain):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training or self.net.training:
                assert self.trainer.training == self.net.training != self.trainer.validating
                return batch[0] + 100, batch[1]
            return batch

    module = Augmenting()
    train, validation = seen(module, validation=loader(seed=1), num_sanity_val_steps=0)
    assert train.min() > 50
    assert validation.max() < 50
    assert module.training


@pytest.mark.parametrize("shuffle", [False, True])
def test_overfitting_on_a_batch_is_watched_on_that_batch(shuffle):
    with pytest.warns(match="overfit") if shuffle else contextlib.nullcontext():
        train, validation = seen(None, loader(32, shuffle=shuffle), loader(32, seed=1), overfit_batches=1)
    assert _rows(train) == _rows(samples(32).tensors[0][:8])
    assert _rows(validation) == _rows(samples(32, 1).tensors[0][:8])


def test_limits_where_the_order_stays_the_same_and_where_it_does_not():
    limits = {"limit_train_batches": 2, "limit_val_batches": 3}
    train, validation = seen(None, loader(32), loader(32, seed=1), **limits)
    assert (_rows(train), _rows(validation)) == (_rows(samples(32).tensors[0][:16]), _rows(samples(32, 1).tensors[0][:24]))
    train, _ = seen(None, loader(32, shuffle=True), loader(32, seed=1), **limits)
    assert len(train) == 32


def _rows(inputs):
    return sorted(map(tuple, inputs.tolist()))


class Halving:
    """A loader around a loader, which changes batches on their way."""

    def __init__(self, inner):
        self.inner, self.dataset = inner, inner.dataset

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        return ((x / 2, y) for x, y in self.inner)


def test_of_a_loader_around_a_loader_the_batches_are_seen_as_they_come():
    train, validation = seen(None, Halving(loader(32)), Halving(loader(16, seed=1)), max_steps=10)
    assert torch.equal(train, samples(32).tensors[0] / 2)
    assert torch.equal(validation, samples(16, 1).tensors[0] / 2)


def test_the_default_size_goes_by_the_batches():
    train, validation = seen(None, loader(100, batch_size=2), loader(100, seed=1, batch_size=4))
    assert (len(train), len(validation)) == (32, 64)
    train, _ = seen(None, loader(100, batch_size=2), probe=Probe(size=100))
    assert len(train) == 100


def test_of_iterable_data_too():
    stream = DataLoader(Stream(samples(100)), 2)
    train, _ = seen(None, stream, max_steps=40)
    assert torch.equal(train, samples(100).tensors[0][:32])


# Samples in checkpoints.


def streams(**kwargs):
    return {"train": DataLoader(Stream(samples(32)), 8), "validation": DataLoader(Stream(samples(32, 1)), 8), **kwargs}


def test_samples_of_several_probes_are_saved_once_and_no_more_of_them_than_are_looked_at():
    monitors = [Seen(probe=Probe(size=10)), Seen("validation", probe=Probe(size=10, seed=1))]
    fit(monitors, **streams(), max_steps=8)
    saved = monitors[0].state_dict()["samples"]
    assert [(one["probe"], one["split"]) for one in saved] == [
        (0, "train"), (0, "validation"), (1, "train"), (1, "validation"),
    ]  # fmt: skip
    for first, second in zip(saved[:2], saved[2:], strict=True):
        assert first["inputs"] is second["inputs"]
        # A slice would be saved with all that it was cut from.
        assert len(first["inputs"]) == 10
        assert first["inputs"].untyped_storage().nbytes() == first["inputs"].nbytes


def test_many_samples_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor_module, "_MOST_BYTES_OF_SAMPLES", 32 * 7 * 4 + 150)
    monitor = Seen(probe=Probe(size=30))
    fit([monitor], None, DataLoader(Stream(samples(32)), 8), max_steps=8)
    assert len(monitor.state_dict()["samples"]) == 1
    both = Seen(probe=Probe(size=30), schedule=EverySteps(1))
    _, made = fit([both], **streams(), max_steps=8)
    assert both.state_dict()["samples"] == []
    made.save_checkpoint(tmp_path / "x.ckpt")
    # Another fit of the same Trainer goes on with what it has.
    both.prepare_to_go_on(8)
    assert len(both._restored["samples"]) == 2
    # A run that is resumed takes others, and goes on when there are enough.
    resumed = Seen(probe=Probe(size=30), schedule=EverySteps(1))
    fit([resumed], **streams(), max_steps=16, ckpt_path=tmp_path / "x.ckpt")
    assert len(resumed.inputs[16]) == 30
    assert min(resumed.inputs) > 8


def test_that_samples_are_not_saved_is_said_once(monkeypatch):
    monkeypatch.setattr(monitor_module, "_MOST_BYTES_OF_SAMPLES", 100)
    monitor = Seen()
    said = []
    monitor.announce = said.append
    fit([monitor], **streams(), max_steps=8)
    monitor.state_dict()
    monitor.state_dict()
    assert len(said) == 1
    assert "not saved in checkpoints" in said[0]
    assert "`size` of the Probe" in said[0]
