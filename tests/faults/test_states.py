"""States that are foreign, damaged or malicious: refused with a clear message, never run, never half taken up."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import grok_callbacks
from grok_callbacks import EverySteps, GrokkingDetector, NormMonitor, Probe, Recorder, SpectralEntropyMonitor, default_callbacks
from grok_callbacks.history import History
from tests._common import Counting, Plain, fit, loader, samples, trainer

EVERY = EverySteps(1)


def monitors():
    return default_callbacks("full", probe=Probe(size=12, train=samples(), validation=samples(8, 1)), schedule=EVERY)


def recorder(callbacks):
    torch.manual_seed(0)
    return Recorder(Plain(), callbacks)


def quiet(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


def measured(state, steps=(3,)):
    """The history of a recorder that goes on from a state."""

    def go():
        going_on = recorder(monitors())
        going_on.load_state_dict(state)
        for step in steps:
            going_on.record(step)
        return going_on

    return quiet(go)


@pytest.fixture(scope="module")
def state():
    def go():
        made = recorder(monitors())
        for step in range(3):
            made.record(step)
        return made.state_dict()

    return quiet(go)


def leaves(value, path=()):
    """Paths of all that can be changed in a state."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))


def get(state, path):
    for key in path:
        state = state[key]
    return state


def put(state, path, value):
    """A state with one part replaced; the rest is shared."""
    key, *rest = path
    value = put(state[key], rest, value) if rest else value
    if isinstance(state, dict):
        return {**state, key: value}
    return type(state)(value if index == key else item for index, item in enumerate(state))


def same(one, other):
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.binary(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.tensor(float("nan")), object(), print]),
)  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=120)
@given(data=st.data())
def test_whatever_is_changed_is_noticed(state, data):
    label = data.draw(st.sampled_from(sorted(state)))
    path = data.draw(st.sampled_from(list(leaves(state[label]))))
    wrong = data.draw(WRONG)
    changed = put(state[label], path, wrong)
    (monitor,) = [monitor for monitor in monitors() if monitor.label == label]
    monitor.optional = False
    if same(changed, state[label]):
        monitor.load_state_dict(changed)
    else:
        with pytest.raises(ValueError, match=r"[Tt]he state (given to|of) " + re.escape(label)):
            monitor.load_state_dict(changed)
        assert monitor.state_dict() == {}


@settings(derandomize=True, deadline=None, max_examples=12)
@given(data=st.data())
def test_a_bit_that_is_flipped_in_a_tensor_is_noticed(state, data):
    active = [label for label in sorted(state) if state[label]["recorder"]["active"]]
    tensors = {
        label: [
            path
            for path in leaves(state[label])
            if isinstance(get(state[label], path), torch.Tensor) and get(state[label], path).numel()
        ]
        for label in active
    }
    label = data.draw(st.sampled_from([label for label in active if tensors[label]]))
    path = data.draw(st.sampled_from(tensors[label]))
    tensor = get(state[label], path).clone().contiguous()
    raw = tensor.reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (monitor,) = [monitor for monitor in monitors() if monitor.label == label]
    monitor.optional = False
    with pytest.raises(ValueError, match="checksum"):
        monitor.load_state_dict(put(state[label], path, tensor))


def test_an_unchanged_state_is_taken_up_after_any_way_of_saving(state, tmp_path):
    torch.save(state, tmp_path / "x.pt")
    fresh = measured({})
    for loaded in (
        torch.load(tmp_path / "x.pt", weights_only=True),
        pickle.loads(pickle.dumps(state)),
        {label: dict(reversed(part.items())) for label, part in copy.deepcopy(state).items()},
    ):
        going_on = measured(loaded)
        assert going_on.switched_off == fresh.switched_off
        assert going_on.history["grok/norm"].steps == [0, 1, 2, 3]


def test_a_presets_monitor_whose_state_is_refused_starts_afresh_and_the_others_go_on(state):
    label = next(label for label in state if label.startswith("SpectralEntropyMonitor"))
    changed = {**state, label: {**state[label], "own": {"nonsense": 1}}}
    going_on = recorder(monitors())
    with pytest.warns(UserWarning, match=f"checksum is wrong. {re.escape(label)} starts afresh") as caught:
        going_on.load_state_dict(changed)
    assert len(caught) == 1
    quiet(lambda: going_on.record(3))
    assert going_on.history["grok/norm"].steps == [0, 1, 2, 3]
    assert going_on.history["grok/spectral_entropy/net.0.weight"].steps == [3]
    assert label not in going_on.switched_off


@pytest.mark.parametrize("wrong", [5, "text", [], None, {"recorder": {}}, {"weights": torch.zeros(3)}], ids=str)
def test_what_is_no_state_at_all(wrong):
    monitor = NormMonitor()
    if wrong:
        with pytest.raises(ValueError, match="state given to NormMonitor is not that of a monitor"):
            monitor.load_state_dict(wrong)
    else:
        monitor.load_state_dict(wrong)  # Nothing was saved.
    assert monitor.state_dict() == {}


def test_another_class_another_setting_and_another_version(state):
    norm = next(label for label in state if label.startswith("NormMonitor"))
    with pytest.raises(ValueError, match="another monitor's, or damaged"):
        SpectralEntropyMonitor().load_state_dict(state[norm])
    with pytest.raises(ValueError, match="another monitor's, or damaged"):
        NormMonitor(ord=1).load_state_dict(state[norm])
    (own,) = [monitor for monitor in monitors() if monitor.label == norm]
    own.optional = False
    for version in ({**state[norm], "later": 1}, {key: value for key, value in state[norm].items() if key != "samples"}):
        with pytest.raises(ValueError, match="is not that of a monitor"):
            own.load_state_dict(version)


def test_a_state_of_another_model(tmp_path):
    """Its measurements are kept; what does not fit is told, and nothing is computed from it."""
    _, trainer = fit([NormMonitor(schedule=EVERY), GrokkingDetector(schedule=EVERY)], validation=loader(8), max_steps=3)
    state = copy.deepcopy({monitor.label: monitor.state_dict() for monitor in trainer.callbacks[:2]})
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3))
    going_on = Recorder(model, [NormMonitor(schedule=EVERY), GrokkingDetector(schedule=EVERY)], Probe(train=samples()))
    going_on.load_state_dict(state)
    values = going_on.record(4)
    exact = torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()]).norm().item()
    assert values["grok/norm"] == pytest.approx(exact, rel=1e-12)
    assert not going_on.switched_off


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    key=st.one_of(st.text(max_size=4), st.integers()),
    series=st.one_of(
        WRONG,
        st.fixed_dictionaries(
            {"steps": st.one_of(WRONG, st.just(torch.arange(2))), "values": st.one_of(WRONG, st.just(torch.rand(2)))}
        ),
    ),
)
def test_histories(key, series):
    """Taken up as they are, or refused."""
    try:
        history = History.from_state_dict({key: series})
    except ValueError:
        return
    assert isinstance(key, str)
    assert [len(curve) for curve in history.values()] in ([], [2], [3])
    assert all(isinstance(step, int) for curve in history.values() for step in curve.steps)


class Malicious:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.skipif("weights_only" not in inspect.signature(L.Trainer.fit).parameters, reason="this Lightning can't refuse")
def test_nothing_is_executed(tmp_path):
    sign = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malicious(sign)))
    assert sign.exists()  # So would the others be noticed.
    sign.unlink()

    monitor = Counting(schedule=EVERY)
    _, made = fit([monitor], max_steps=2)
    made.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    checkpoint["callbacks"][monitor.state_key]["own"] = {"steps": Malicious(sign)}
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        trainer([Counting(schedule=EVERY)]).fit(Plain(), loader(), ckpt_path=tmp_path / "bad.ckpt", weights_only=True)
    assert not sign.exists()


def test_the_package_has_nothing_that_would_execute_a_file():
    root = Path(grok_callbacks.__file__).parent
    forbidden = re.compile(
        r"pickle\.loads?\(|\beval\(\w|\bexec\(|yaml\.(unsafe_)?load\((?!text, _Loader\))|joblib|marshal|torch\.load\("
    )
    for file in root.rglob("*.py"):
        for line in file.read_text().splitlines():
            assert not forbidden.search(line) or "weights_only=True" in line, f"{file.name}: {line}"
