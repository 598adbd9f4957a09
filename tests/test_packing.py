"""States as bytes: they come back as they were, are never executed, and are as new as what they were made of."""

from __future__ import annotations

import copy
import io
import math
import pickle
import weakref

import lightning.pytorch as L
import pytest
import torch
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.aggregation import CatMetric

from grok_callbacks import EverySteps, NormMonitor, Recorder, default_callbacks
from grok_callbacks._packing import Packed, pack, unpack
from grok_callbacks.callbacks._state import MetricState, checksum, metric_state
from tests._common import Counting, Plain, fit, loader
from tests.faults.test_states import Malicious, same

VALUES = [
    {}, {"a": [1, 2.5, None, True, "text"], "b": {"c": torch.arange(3)}}, torch.tensor(math.nan), torch.zeros(0, 4),
    torch.ones(2, dtype=torch.bfloat16), [torch.tensor([True]), torch.tensor([1 + 2j])], {"deep": [{"er": (1,)}]},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_comes_back_as_it_was(value):
    packed = pack(value)
    assert packed.dtype == torch.uint8
    assert packed.ndim == 1
    assert same(unpack(packed), value)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert same(unpack(torch.load(file, weights_only=True)), value)


def test_the_same_value_gives_the_same_bytes():
    assert torch.equal(pack({"a": torch.arange(5)}), pack({"a": torch.arange(5)}))


def test_nothing_is_executed(tmp_path):
    sign = tmp_path / "executed"
    with pytest.raises(ValueError, match=r"can't be read: .*Weights only"):
        unpack(pack({"history": Malicious(sign)}))
    assert not sign.exists()


@pytest.mark.parametrize("wrong", [None, b"bytes", [1], torch.zeros(4), torch.zeros(4, dtype=torch.uint8), pack(1)[:-30]])
def test_refuses_what_it_has_not_made(wrong):
    with pytest.raises(ValueError, match=r"no tensor of bytes|can't be read"):
        unpack(wrong)


def test_packs_anew_when_the_version_changes():
    calls = []
    packed = Packed()

    def make():
        calls.append(1)
        return len(calls)

    assert [unpack(packed.of(version, make)) for version in (1, 1, 2, 2, 1, None, None, 1)] == [1, 1, 2, 2, 3, 4, 4, 5]


def test_what_is_given_may_be_written_to():
    packed = Packed()
    for _ in range(3):
        given = packed.of(1, lambda: "value")
        assert unpack(given) == "value"
        given.zero_()


def test_what_is_large_is_not_kept():
    packed = Packed()
    large = torch.zeros(2**20 + 1, dtype=torch.float32)
    assert torch.equal(unpack(packed.of(1, lambda: large)), large)
    assert packed._packed is None
    assert unpack(packed.of(1, lambda: "anew")) == "anew"


def test_made_in_inference_mode_it_is_a_tensor_like_others():
    packed = Packed()
    with torch.inference_mode():
        packed.of(1, lambda: "value")
    assert not packed.of(1, lambda: "value").is_inference()


def test_unpacks_where_torch_maps_files_into_memory():
    packed = pack("value")
    with torch.utils.serialization.config.patch("load.mmap", True):
        assert unpack(packed) == "value"


def list_of_two():
    metric = CatMetric()
    metric.update(torch.tensor([1.0, 2.0]))
    return metric


class TwoLists(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("first", [])
        self.add_state("second", [])

    def update(self, value):
        self.first.append(value)

    def compute(self):
        return 0.0


def two_lists():
    metric = TwoLists()
    metric.update(torch.tensor([1.0, 2.0]))
    return metric


CHANGES = {
    "update": (MeanMetric, lambda metric: metric.update(torch.tensor(5.0))),
    "one more in a list": (list_of_two, lambda metric: metric.update(torch.tensor(3.0))),
    "reset of a list": (list_of_two, lambda metric: metric.reset()),
    "reset and update": (list_of_two, lambda metric: (metric.reset(), metric.update(torch.tensor([1.0, 2.5])))),
    "written in place": (SumMetric, lambda metric: metric.sum_value.add_(1)),
    "replaced": (SumMetric, lambda metric: setattr(metric, "sum_value", torch.tensor(9.0))),
    "one of a collection": (
        lambda: MetricCollection({"a": SumMetric(), "b": MeanMetric()}, compute_groups=False),
        lambda metric: metric["b"].update(torch.tensor(2.0)),
    ),
    "a collection's new member": (
        lambda: MetricCollection({"a": SumMetric()}, compute_groups=False),
        lambda metric: metric.add_metrics({"b": MeanMetric()}),
    ),
    "the same tensor in another place": (
        two_lists,
        lambda metric: metric.second.append(metric.first.pop()),
    ),
    "a list replaced by its only tensor": (
        two_lists,
        lambda metric: setattr(metric, "first", metric.first[0]),
    ),
    "members by other names": (
        lambda: MetricCollection({"a": SumMetric()}, compute_groups=False),
        lambda metric: metric._modules.update({"b": metric._modules.pop("a")}),
    ),
    "the count alone": (SumMetric, lambda metric: metric.update(torch.tensor(0.0))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_metrics_state_is_as_new_as_the_metric(name):
    make, change = CHANGES[name]
    metric, state = make(), MetricState()
    first = state.of(metric)
    kept = state._packed._packed
    assert same(unpack(first), metric_state(metric))
    assert torch.equal(state.of(metric), first)
    assert state._packed._packed is kept, "nothing has changed"
    change(metric)
    assert same(unpack(state.of(metric)), metric_state(metric))
    assert not torch.equal(state.of(metric), first)


def test_tensors_of_inference_mode_count_no_changes():
    metric, state = SumMetric(), MetricState()
    with torch.inference_mode():
        metric.sum_value = torch.tensor(1.0)
        assert unpack(state.of(metric))["states"]["sum_value"] == 1
        metric.sum_value.add_(1)
        assert unpack(state.of(metric))["states"]["sum_value"] == 2


@pytest.mark.parametrize("value", [3, 2.5, ["a"], [(1, 2)], None])
def test_what_is_no_tensor_is_packed_all_the_same(value):
    metric, state = SumMetric(), MetricState()
    metric.sum_value = value
    assert unpack(state.of(metric))["states"]["sum_value"] == value


def test_an_old_state_is_not_kept_alive():
    metric, state = list_of_two(), MetricState()
    state.of(metric)
    old = weakref.ref(metric.value[0])
    metric.reset()
    assert old() is None


def test_another_metric_in_its_place():
    state = MetricState()
    assert unpack(state.of(SumMetric()))["states"].keys() != unpack(state.of(MeanMetric()))["states"].keys()


class Look(L.Callback):
    """After every step, what a state says and what there is."""

    def __init__(self):
        self.pairs = []
        self.anew = []

    def on_train_batch_end(self, trainer, *args):
        monitors = trainer.callbacks[:-1]
        for monitor in monitors:
            state = parts(monitor)
            history = monitor.history.of(monitor._recorder.keys_of(monitor)).state_dict()
            there = {"history": history, "metric": metric_state(monitor.metric)}
            self.pairs.append(copy.deepcopy(({name: unpack(part) for name, part in state.items()}, there)))
            kept = kept_by(monitor)
            parts(monitor)
            self.anew += [one is not other for one, other in zip(kept, kept_by(monitor), strict=True)]


def parts(monitor):
    state = monitor.state_dict()
    return {"history": state["recorder"]["history"], "metric": state["metric"]}


def kept_by(monitor):
    return monitor._recorder._slot_of(monitor).packed._packed, monitor._metric_state._packed._packed


@pytest.mark.filterwarnings("ignore:CommutativityMonitor.* left out", "ignore:The generalisation bound")
def test_every_state_of_a_run_is_that_of_its_step():
    look = Look()
    fit([*default_callbacks("full", schedule=EverySteps(3)), look], Plain(logs=True), validation=loader(8), max_steps=8)
    assert len(look.pairs) == 8 * len(default_callbacks("full"))
    assert all(same(said, there) for said, there in look.pairs)
    assert not any(look.anew), "what has not changed is not packed again"
    lengths = [len(there["history"]["grok/norm"]["steps"]) for _, there in look.pairs if "grok/norm" in there["history"]]
    assert lengths == [1, 1, 2, 2, 2, 3, 3, 3]


def test_a_monitor_that_was_copied_packs_for_itself():
    monitor = NormMonitor()
    fit([monitor], validation=loader(8), max_steps=2)
    before = parts(monitor)
    for twin in (pickle.loads(pickle.dumps(monitor)), copy.deepcopy(monitor)):
        assert same(parts(twin), before)
        assert twin._metric_state is not monitor._metric_state


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_that_goes_on_from_one_saved_at_every_step(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def made():
        return [Counting(), NormMonitor(schedule=EverySteps(2))]

    whole = made()
    fit([*whole, Save()], validation=loader(8), max_steps=7)
    for step in range(1, 7):
        resumed = made()
        fit(resumed, validation=loader(8), max_steps=7, ckpt_path=tmp_path / f"{step}.ckpt")
        for one, other in zip(whole, resumed, strict=True):
            # In the middle of an epoch Lightning itself does not go on exactly.
            assert dict(one.history.until(step)) == dict(other.history.until(step))
            assert {key: series.steps for key, series in one.history.items()} == {
                key: series.steps for key, series in other.history.items()
            }


def test_points_from_elsewhere_on_a_monitors_own_series_are_saved():
    monitor = Counting("own", schedule=EverySteps(10))
    recorder = Recorder(Plain(), [monitor])
    recorder.record(0)
    monitor.state_dict()
    recorder.record(3, metrics={"grok/own": 7.0})
    assert unpack(monitor.state_dict()["recorder"]["history"])["grok/own"]["steps"].tolist() == [0, 3]
    recorder.history.add(3, {"grok/own": 8.0})
    assert unpack(monitor.state_dict()["recorder"]["history"])["grok/own"]["values"].tolist() == [1.0, 8.0]


class Late(Counting):
    """Takes up another's key at its second measurement."""

    def measure(self, snapshot):
        super().measure(snapshot)
        return {"late": 1.0} if len(self.steps) == 1 else {"late": 1.0, "new": 1.0, "count": 1.0}


def test_a_key_that_clashes_late_leaves_a_state_that_can_be_saved():
    late = Late("late", schedule=EverySteps(1))
    recorder = Recorder(Plain(), [Counting(schedule=EverySteps(1)), late])
    recorder.record(0)
    with pytest.warns(UserWarning, match="both log 'grok/count'"):
        recorder.record(1)
    assert set(unpack(late.state_dict()["recorder"]["history"])) == {"grok/late"}
    assert set(recorder.latest) == {"grok/count", "grok/late"}


def test_the_checksum_takes_conjugates_as_what_they_are():
    value = torch.tensor([1 + 2j, 3 - 1j])
    assert checksum(value.conj()) == checksum(value.conj().resolve_conj()) != checksum(value)


# The value of each, and of those beside it: none may be taken for another.
UNLIKE = [
    1, 1.0, True, "1", b"1", None, [1], (1, 1), [[1]], [1, [1]], {"a": 1}, {"a": [1]}, {1: "a"}, {}, [], "", torch.tensor(1),
    torch.tensor(1.0), torch.tensor([1]), torch.tensor([[1]]), torch.tensor([1, 0]), ["a", "b"], ["a b"], ["a\nstr 'b'"],
    {"a": {"b": 1}}, {"a": {}, "b": 1},
]  # fmt: skip


def test_the_checksum_tells_apart():
    sums = [checksum(value) for value in UNLIKE]
    assert len(set(sums)) == len(UNLIKE)
    assert sums == [checksum(copy.deepcopy(value)) for value in UNLIKE]
    assert checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1})
