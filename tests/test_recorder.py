from __future__ import annotations

import io
import math
import random
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import grok_callbacks.snapshot
from grok_callbacks import (
    AtValidation,
    Budget,
    EveryEpoch,
    EverySteps,
    GradientCoherenceMonitor,
    GrokkingDetector,
    Monitor,
    NormMonitor,
    Probe,
    Recorder,
    SpectralEntropyMonitor,
)
from grok_callbacks.recorder import Measurable
from tests._common import Counting, Logits, samples


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def data_probe(**kwargs):
    return Probe(train=samples(), validation=samples(seed=1), **kwargs)


def measured(recorder, steps):
    return [step for step in steps if recorder.record(step)]


def test_a_monitor_is_measurable():
    assert isinstance(Counting(), Measurable)


# What is due.


def test_records_when_due_and_only_then():
    recorder = Recorder(nn.Linear(2, 2), [Counting("a", schedule=EverySteps(3)), Counting("b", schedule=EverySteps(4))])
    values = {step: recorder.record(step) for step in range(9)}
    assert {step: sorted(value) for step, value in values.items() if value} == {
        0: ["grok/a", "grok/b"], 3: ["grok/a"], 4: ["grok/b"], 6: ["grok/a"], 8: ["grok/b"],
    }  # fmt: skip
    assert recorder.history["grok/a"].steps == [0, 3, 6]


def test_a_step_is_measured_once():
    recorder = Recorder(nn.Linear(2, 2), [Counting(schedule=EverySteps(1))])
    assert recorder.record(0)
    assert not recorder.record(0)
    assert not recorder.record(0, event="epoch")


def test_leaps_over_due_steps_are_made_up_for_once():
    recorder = Recorder(nn.Linear(2, 2), [Counting(schedule=EverySteps(10))])
    assert measured(recorder, [0, 7, 25, 26, 29, 30]) == [0, 25, 30]


def test_the_first_measurement_is_made_at_whatever_step_recording_begins():
    recorder = Recorder(nn.Linear(2, 2), [Counting(schedule=EverySteps(10)), Counting("epochs", schedule=EveryEpoch())])
    assert set(recorder.record(17)) == {"grok/count", "grok/epochs"}
    assert measured(recorder, range(18, 31)) == [20, 30]


def test_events():
    recorder = Recorder(
        nn.Linear(2, 2),
        [
            Counting("e", schedule=EveryEpoch(2)),
            Counting("v", schedule=AtValidation()),
            Counting("s", schedule=EverySteps(100)),
        ],
    )
    recorder.record(0)
    assert not recorder.record(5, event="epoch", epoch=0)
    assert list(recorder.record(9, event="validation", epoch=1)) == ["grok/v"]
    assert list(recorder.record(9, event="epoch", epoch=1)) == ["grok/e"]


# Sharing.


class Counter(nn.Module):
    """Counts its passes where giving its attributes back does not reach."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.made = SimpleNamespace(calls=0)

    def forward(self, x):
        self.made.calls += 1
        return self.net(x)


class Site(Monitor):
    def __init__(self, site, split="train", **kwargs):
        super().__init__(**kwargs)
        self.site, self.split = site, split

    def bind(self, view):
        view.request(view.select_sites(self.site), self.split)

    def measure(self, snapshot):
        return {f"{self.split}/{self.site}": snapshot.activations(self.site, self.split).double().mean()}


def test_eight_monitors_cost_one_pass_a_split_and_one_spectrum_a_matrix(monkeypatch):
    spectra = []
    original = grok_callbacks.snapshot.singular_values
    monkeypatch.setattr(grok_callbacks.snapshot, "singular_values", lambda m: spectra.append(m.shape) or original(m))
    model = Counter()
    monitors = [
        Site("net.0"), Site("net.1"), Site("net.2:input", "validation"), Site("net.1", "validation"), GrokkingDetector(),
        Logits(), SpectralEntropyMonitor(), SpectralEntropyMonitor(prefix="again"),
    ]  # fmt: skip
    recorder = Recorder(model, monitors, data_probe())
    recorder.record(0)
    for step in range(1, 4):
        model.made.calls, spectra[:] = 0, []
        recorder.record(step)
        assert model.made.calls == 2
        assert len(spectra) == 2


def test_probes_of_ones_own_are_looked_at_apart():
    model = Counter()
    recorder = Recorder(
        model, [Logits(probe=data_probe(size=5)), Logits(prefix="b"), Logits(prefix="c", probe=data_probe(size=7))]
    )
    values = recorder.record(0)
    # Without a probe of its own a monitor has the first that there is.
    assert [values[f"{prefix}/logits/size"] for prefix in ("grok", "b", "c")] == [5, 5, 7]
    model.made.calls = 0
    recorder.record(1)
    assert model.made.calls == 2


# In a loop of one's own.


def train(recorder=None, *, steps=30, accumulate=1):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = samples().tensors
    made = recorder(model) if recorder else None
    if made:
        made.record(0)
    losses = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for _ in range(accumulate):
            loss = F.cross_entropy(model(x + 0.1 * np.random.rand()), y)
            loss.backward()
            if made:
                made.record(step - 1)  # Amid accumulation.
            losses.append(loss.item())
        optimizer.step()
        if made:
            made.record(step)
    return model, losses, made


class Noisy(Monitor):
    """Takes every liberty that a monitor must not take with the program."""

    def bind(self, view):
        view.require_samples()

    def measure(self, snapshot):
        draws = random.random() + np.random.rand() + torch.rand(1).item()
        torch.manual_seed(99)
        model = snapshot.view.model
        model.train()
        snapshot.loss_of(model(snapshot.batch().inputs), snapshot.targets()).backward()
        gradient = model[0].weight.grad.norm()
        model.zero_grad()
        model.eval()
        return {"draws": draws, "gradient": gradient}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_the_same_bit_for_bit(accumulate):
    def make(model):
        return Recorder(
            model, [Counting(), Logits(), NormMonitor(), SpectralEntropyMonitor(), GrokkingDetector()], data_probe()
        )

    plain, losses, _ = train(accumulate=accumulate)
    watched, watched_losses, recorder = train(make, accumulate=accumulate)
    assert recorder.switched_off == []
    assert losses == watched_losses
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True))


def test_a_monitor_that_writes_buffers_is_caught_and_the_rest_is_undone():
    with pytest.raises(RuntimeError, match="Noisy wrote into the model's weights or buffers"):
        train(lambda model: Recorder(model, [Noisy()], data_probe()))

    class Gentle(Noisy):
        def measure(self, snapshot):
            snapshot.view.model[1].track_running_stats = False
            try:
                return super().measure(snapshot)
            finally:
                snapshot.view.model[1].track_running_stats = True

    plain, losses, _ = train(accumulate=2)
    watched, watched_losses, recorder = train(lambda m: Recorder(m, [Gentle(on_error="raise")], data_probe()), accumulate=2)
    assert len(recorder.history["grok/gradient"]) > 10
    assert losses == watched_losses
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "write",
    [
        lambda snapshot: snapshot.weights["0.weight"].mul_(1.0),
        lambda snapshot: snapshot.view.model[0].bias.data.zero_(),
        lambda snapshot: snapshot.weights["0.weight"].numpy().fill(0),
    ],
)
def test_a_monitor_that_writes_weights_is_caught(write):
    class Writer(Monitor):
        def measure(self, snapshot):
            write(snapshot)
            return {}

    with pytest.raises(RuntimeError, match="Writer wrote into the model's weights"):
        Recorder(mlp(), [Writer()]).record(0)


def test_a_random_measure_is_the_same_whatever_the_programs_generators_hold():
    class Random(Monitor):
        def measure(self, snapshot):
            return {"random": random.random() + np.random.rand() + torch.rand(1).item()}

    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        recorder = Recorder(mlp(), [Random()])
        values.append([recorder.record(step)["grok/random"] for step in range(4)])
    assert values[0] == values[1]
    assert len(set(values[0])) == 4


# When things go wrong.


class Failing(Monitor):
    def __init__(self, at=2, error=RuntimeError, **kwargs):
        super().__init__(**kwargs)
        self.at, self.error = at, error

    def measure(self, snapshot):
        if snapshot.step >= self.at:
            raise self.error("no more")
        return {"failing": 1.0}


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError, MemoryError, ZeroDivisionError])
def test_a_monitor_that_fails_is_switched_off_with_one_warning(error):
    recorder = Recorder(mlp(), [Failing(error=error), Counting()])
    recorder.record(0), recorder.record(1)
    with pytest.warns(UserWarning, match=r"Failing.* failed and is switched off.*no more") as caught:
        values = [recorder.record(step) for step in range(2, 8)]
    assert len(caught) == 1
    assert len(recorder.switched_off) == 1
    assert all(list(value) == ["grok/count"] for value in values)


def test_or_stops_the_run():
    recorder = Recorder(mlp(), [Failing(on_error="raise")])
    recorder.record(0), recorder.record(1)
    with pytest.raises(RuntimeError, match="no more"):
        recorder.record(2)


def test_ctrl_c_is_no_failure():
    recorder = Recorder(mlp(), [Failing(0, KeyboardInterrupt)])
    with pytest.raises(KeyboardInterrupt):
        recorder.record(0)


@pytest.mark.parametrize("returned", [None, 3.0, {"key": "text"}, {"key": torch.zeros(2)}, {"key": None}])
def test_what_is_no_measurement_switches_off(returned):
    class Odd(Monitor):
        def measure(self, snapshot):
            return returned

    with pytest.warns(UserWarning, match="Odd failed"):
        assert Recorder(mlp(), [Odd()]).record(0) == {}


def test_a_monitor_without_measure():
    with pytest.warns(UserWarning, match="Monitor must define `measure`"):
        Recorder(mlp(), [Monitor()]).record(0)


def test_values_that_are_not_finite_are_kept_and_warned_of_once():
    class Diverging(Monitor):
        def measure(self, snapshot):
            return {"a": float("nan") if snapshot.step else 0.0, "b": float("inf") if snapshot.step > 1 else 0.0}

    recorder = Recorder(mlp(), [Diverging(schedule=EverySteps(1))])
    recorder.record(0)
    with pytest.warns(UserWarning, match="Diverging.*grok/a is nan at step 1; said once") as caught:
        measured(recorder, [1, 2, 3])
    assert len(caught) == 1
    assert math.isnan(recorder.history["grok/a"].values[-1])
    assert recorder.history["grok/b"].values == [0.0, 0.0, float("inf"), float("inf")]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights(value):
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = value
    monitors = [NormMonitor(), SpectralEntropyMonitor(), GrokkingDetector(), Logits()]
    recorder = Recorder(model, monitors, data_probe())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = recorder.record(0) | recorder.record(1)
    assert recorder.switched_off == []
    assert len(caught) == sum(any(not math.isfinite(values[key]) for key in recorder.keys_of(m)) for m in monitors)
    assert not math.isfinite(values["grok/norm"])
    assert math.isnan(values["grok/spectral_entropy/0.weight"])
    assert math.isfinite(values["grok/spectral_entropy/2.weight"])


def test_zero_and_rank_one_matrices():
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.copy_(torch.outer(torch.arange(1.0, 4), torch.ones(5)))
    with pytest.warns(UserWarning, match="grok/spectral_entropy/0.weight is nan"):
        values = Recorder(model, [SpectralEntropyMonitor(), NormMonitor()]).record(0)
    assert values["grok/norm/0.weight"] == 0
    assert values["grok/effective_rank/2.weight"] == pytest.approx(1)


def test_keys_that_clash():
    with pytest.raises(ValueError, match=r"Counting.*and Counting.* both log 'grok/count'; give one of them another `prefix`"):
        Recorder(mlp(), [Counting(), Counting(budget=0.5)]).record(0)
    assert len(Recorder(mlp(), [Counting(), Counting(prefix="other")]).record(0)) == 2


def test_keys_that_come_to_clash_later_cost_the_second_monitor():
    class Moving(Counting):
        def measure(self, snapshot):
            return {"count" if snapshot.step > 2 else "own": 1.0}

    recorder = Recorder(mlp(), [Counting(), Moving()])
    with pytest.warns(UserWarning, match="both log 'grok/count'"):
        measured(recorder, range(5))
    assert recorder.switched_off == [Moving().label]
    assert recorder.history["grok/count"].values == [1, 2, 3, 4, 5]


def test_settings_that_cannot_work_with_the_model():
    with pytest.raises(ValueError, match=r"`parameters`: 'nothing' matches nothing.*0.weight"):
        Recorder(mlp(), [NormMonitor("nothing")]).record(0)
    with pytest.raises(ValueError, match=r"no train samples.*`train` of the Probe"):
        Recorder(mlp(), [Logits()]).record(0)
    with pytest.raises(ValueError, match="`unpack` of the Probe"):
        Recorder(mlp(), [Logits()], Probe(train=(1, 2, 3))).record(0)


def test_monitors_that_need_no_data_do_not_mind_data_that_cannot_be_read():
    assert Recorder(mlp(), [NormMonitor()], Probe(train=(1, 2, 3))).record(0)


def test_an_optional_monitor_that_does_not_apply_is_left_out():
    monitor = Logits()
    monitor.optional = True
    recorder = Recorder(mlp(), [monitor, Counting()])
    with pytest.warns(UserWarning, match="Logits is left out.*no train samples"):
        assert list(recorder.record(0)) == ["grok/count"]
    assert recorder.switched_off == ["Logits"]
    assert list(recorder.record(1)) == ["grok/count"]


def test_no_monitors():
    assert Recorder(mlp(), [], budget=0.5).record(0) == {}


def test_one_sample():
    probe = Probe(train=TensorDataset(torch.randn(1, 6), torch.tensor([1])))
    values = Recorder(mlp(), [GrokkingDetector(), Logits()], probe).record(0)
    assert values["grok/logits/size"] == 1
    assert values["grok/accuracy/train"] in (0, 1)


# Budget.


class Slow(Monitor):
    def __init__(self, seconds=0.02, **kwargs):
        super().__init__(**kwargs)
        self.pause = seconds

    def measure(self, snapshot):
        time.sleep(self.pause)
        return {"slow": 1.0}


@pytest.mark.parametrize("whose", ["monitor", "recorder"])
def test_a_budget_skips_but_the_first_measurement_always_happens(whose):
    monitor = Slow(schedule=EverySteps(1), budget=0.01 if whose == "monitor" else None)
    recorder = Recorder(mlp(), [monitor], budget=0.01 if whose == "recorder" else None)
    steps = measured(recorder, range(50))
    assert steps == [0]  # Fifty steps take no time to speak of.


def test_a_budget_allows_what_is_within_it():
    recorder = Recorder(mlp(), [Counting(schedule=EverySteps(1), budget=10.0), Slow(schedule=EverySteps(1), budget=1e-6)])
    for _ in range(5):
        time.sleep(0.01)
        values = recorder.record(_)
        assert "grok/count" in values
    assert recorder.history["grok/slow"].steps == [0]


class Clock:
    """Stands still but when told."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Taking(Monitor):
    """Takes a given time, by the clock."""

    def __init__(self, clock, seconds, **kwargs):
        super().__init__(schedule=EverySteps(1), **kwargs)
        self.clock, self.cost = clock, seconds

    def measure(self, snapshot):
        self.clock.now += self.cost
        return {"taken": self.cost}


def taken(monkeypatch, costs, *, common=None, own=None, second=1.0):
    """Steps at which monitors of such costs measured within twenty steps of a second."""
    clock = Clock()
    monkeypatch.setattr("grok_callbacks.recorder.time", clock)
    monitors = [Taking(clock, cost, budget=own, prefix=f"m{number}") for number, cost in enumerate(costs)]
    recorder = Recorder(mlp(), monitors, budget=common)
    for step in range(20):
        recorder.record(step)
        clock.now += second
    return [recorder.history[f"m{number}/taken"].steps for number in range(len(costs))]


def test_monitors_share_a_budget(monkeypatch):
    cheap, dear = taken(monkeypatch, [0.0625, 2.0], common=0.5)
    assert cheap == list(range(20))
    # Half of s seconds, less an eighth of that for the cheap one: 2 s for the dear one at 0.4375 s >= 2, 4 and so on.
    assert dear == [0, 5, 10, 14, 19]
    # In equal shares it would have half as many.
    assert taken(monkeypatch, [0.0625, 2.0], own=0.25)[1] == [0, 8, 16]
    # An object that they share is one budget, too.
    assert taken(monkeypatch, [0.0625, 2.0], own=Budget(0.5)) == [cheap, dear]


def test_the_first_measurement_is_not_charged(monkeypatch):
    class Warming(Taking):
        def measure(self, snapshot):
            self.cost = 0.01 if self.cost < 1 or snapshot.step else 100.0
            return super().measure(snapshot)

    clock = Clock()
    monkeypatch.setattr("grok_callbacks.recorder.time", clock)
    recorder = Recorder(mlp(), [Warming(clock, 1.0)], budget=1.0)
    for step in range(200):
        recorder.record(step)
        clock.now += 1.0
    # The second waits until it could cost as much as the first; from then on each takes what the last one took.
    assert recorder.history["grok/taken"].steps == [0, *range(100, 200)]


def test_time_spent_is_told():
    recorder = Recorder(mlp(), [Slow(0.02, schedule=EverySteps(1)), Counting()])
    recorder.record(0), recorder.record(1)
    seconds = list(recorder.seconds.values())
    assert seconds[0] >= 0.04
    assert seconds[1] < seconds[0]


@pytest.mark.parametrize("budget", [0, -0.5, float("nan")])
def test_a_budget_must_be_positive(budget):
    with pytest.raises(ValueError, match="`budget`"):
        Recorder(mlp(), [Counting()], budget=budget)
    with pytest.raises(ValueError, match="`budget`"):
        Counting(budget=budget)


# Metrics from elsewhere, and conclusions.


class Watching(Monitor):
    """Concludes something of another's measurements."""

    def measure(self, snapshot):
        return {}

    def analyse(self, history, step):
        series = history.get("val_acc")
        return {"conclusion": series.values[-1] * 2} if series else {}


def test_metrics_from_elsewhere_stand_in_the_history_and_are_analysed():
    recorder = Recorder(mlp(), [Watching(schedule=EverySteps(100))])
    assert recorder.record(0) == {}
    assert recorder.record(3, metrics={"val_acc": 0.25}) == {"grok/conclusion": 0.5}
    assert recorder.history["val_acc"].steps == [3]
    assert recorder.keys_of(recorder.monitors[0]) == ["grok/conclusion"]


def test_an_analysis_that_fails_is_switched_off():
    class Wrong(Watching):
        def analyse(self, history, step):
            raise KeyError("gone")

    recorder = Recorder(mlp(), [Wrong(), Counting(schedule=EverySteps(1))])
    with pytest.warns(UserWarning, match="Wrong failed.*gone") as caught:
        assert [list(recorder.record(step)) for step in range(3)] == [["grok/count"]] * 3
    assert len(caught) == 1


def test_an_analysis_that_returns_nothing_is_an_error():
    class Forgetful(Watching):
        def analyse(self, history, step):
            pass

    with pytest.warns(UserWarning, match="Forgetful failed.*NoneType"):
        Recorder(mlp(), [Forgetful()]).record(0)


# State.


def saved(recorder):
    file = io.BytesIO()
    torch.save(recorder.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def monitors():
    return [Counting(), NormMonitor(), GrokkingDetector(patience=1, memorized_threshold=0.1), Watching()]


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 11, 12, 17])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(stop):
    def run(recorder, steps):
        logged = {}
        for step in steps:
            with torch.no_grad():
                model[0].weight.fill_(step)
            values = recorder.record(step, metrics={"val_acc": step / 100} if step % 5 == 0 else None)
            if values:
                logged[step] = {key: value for key, value in values.items() if key != "grok/count"}
        return logged

    model = mlp()
    whole = Recorder(model, monitors(), data_probe())
    expected = run(whole, range(25))
    first = Recorder(model, monitors(), data_probe())
    run(first, range(stop + 1))
    second = Recorder(model, monitors(), data_probe())
    second.load_state_dict(saved(first))
    assert run(second, range(stop + 1, 25)) == {step: values for step, values in expected.items() if step > stop}
    assert {key: series for key, series in second.history.items() if key != "grok/count"} == {
        key: series for key, series in whole.history.items() if key != "grok/count"
    }
    assert second.history["grok/count"].steps == whole.history["grok/count"].steps
    assert second.monitors[2].memorized_step == whole.monitors[2].memorized_step is not None


def test_a_monitor_that_was_switched_off_stays_off():
    recorder = Recorder(mlp(), [Failing(at=0), Counting()])
    with pytest.warns(UserWarning, match="switched off"):
        recorder.record(0)
    second = Recorder(mlp(), [Failing(at=0), Counting()])
    second.load_state_dict(saved(recorder))
    second.record(1)
    assert second.switched_off == ["Failing(at=0)"]


def test_a_state_before_anything_was_measured():
    recorder = Recorder(mlp(), [Counting()])
    second = Recorder(mlp(), [Counting()])
    second.load_state_dict(saved(recorder))
    assert second.record(0)


def test_states_of_monitors_that_are_gone_or_new():
    recorder = Recorder(mlp(), [Counting("a")])
    recorder.record(0)
    second = Recorder(mlp(), [Counting("b", schedule=EverySteps(100))])
    second.load_state_dict(saved(recorder))
    assert list(second.record(7)) == ["grok/b"]


def test_refuses_states_that_are_none():
    recorder = Recorder(mlp(), [Counting()])
    for state in (None, [], 3, {"Counting": 3}, {"Counting": {"recorder": {}}}):
        with pytest.raises(ValueError, match="state"):
            recorder.load_state_dict(state)
    good = Recorder(mlp(), [Counting()])
    good.record(0)
    state = good.state_dict()
    state["Counting"]["recorder"]["measurements"] = "many"
    with pytest.raises(ValueError, match="measurements"):
        recorder.load_state_dict(state)
    with pytest.raises(ValueError, match="before the first measurement"):
        good.load_state_dict({})


def test_the_latest_values():
    recorder = Recorder(mlp(), [Counting(schedule=EverySteps(1))])
    assert recorder.latest == {}
    recorder.record(0), recorder.record(1)
    assert recorder.latest == {"grok/count": 2.0}


# Cost.


def test_a_step_at_which_nothing_is_due_looks_at_nothing():
    recorder = Recorder(mlp(), [NormMonitor(schedule=EverySteps(10**6))])
    recorder.record(0)
    recorder.model = recorder._slots = None
    assert recorder.record(5) == {}


def test_complex_parameters_are_left_out_and_said_to_be():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.filter = nn.Parameter(torch.ones(4, 2, dtype=torch.complex64))
            self.net = mlp()

        def forward(self, x):
            return self.net(torch.fft.irfft(torch.fft.rfft(x) * self.filter.mean(), n=6))

    model = Fourier()
    names = [name for name, parameter in model.named_parameters() if not parameter.is_complex()]
    monitors = [
        NormMonitor(on_error="raise"),
        SpectralEntropyMonitor(on_error="raise"),
        GradientCoherenceMonitor(on_error="raise"),
    ]
    with pytest.warns(UserWarning, match=r"complex parameters \['filter'\]") as caught:
        values = Recorder(model, monitors, data_probe()).record(0)
    assert len(caught) == 1
    squares = sum(float(model.get_parameter(name).detach().double().square().sum()) for name in names)
    assert values["grok/norm"] == pytest.approx(squares**0.5)
    assert math.isfinite(values["grok/gradient_coherence"])
    refused = pytest.raises(ValueError, match=r"`parameters`: \['filter'\] are complex")
    with pytest.warns(UserWarning, match="complex"), refused:
        Recorder(model, [NormMonitor("filter")], data_probe()).record(0)


def test_a_schedule_that_heeds_events_of_its_own_accord():
    schedule = EverySteps(100)
    object.__setattr__(schedule, "at", lambda event, epoch: event == "epoch")
    late, other = Counting("late", schedule=schedule), Counting("other", schedule=EverySteps(100))
    recorder = Recorder(nn.Linear(2, 2), [late, other])
    recorder.record(0)
    assert not recorder.record(5, event="validation")
    assert list(recorder.record(5, event="epoch")) == ["grok/late"]
    assert (late.steps, other.steps) == ([0, 5], [0])


def test_each_schedule_is_asked_once_about_an_event():
    asked = []

    class Asked(EverySteps):
        def at(self, event, epoch):
            asked.append((self.n, event, epoch))
            return event == "epoch"

    first, second = Counting("first", schedule=Asked(100)), Counting("second", schedule=Asked(101))
    recorder = Recorder(nn.Linear(2, 2), [first, second])
    recorder.record(0)
    recorder.record(5, event="epoch", epoch=3)
    assert asked == [(100, "epoch", 3), (101, "epoch", 3)]
    assert (first.steps, second.steps) == ([0, 5], [0, 5])


@pytest.mark.parametrize("replaced", [False, True], ids=["changed", "replaced"])
def test_a_schedule_that_comes_to_heed_events_later(replaced):
    monitor = Counting(schedule=EverySteps(100))
    recorder = Recorder(nn.Linear(2, 2), [monitor])
    recorder.record(0)
    assert not recorder.record(5, event="epoch")
    if replaced:
        monitor.schedule = EverySteps(100)
    object.__setattr__(monitor.schedule, "at", lambda event, epoch: event == "epoch")
    assert recorder.record(6, event="epoch")
    assert monitor.steps == [0, 6]
