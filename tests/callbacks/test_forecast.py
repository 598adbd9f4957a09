"""The forecast as a callback, with models made by hand, whose answers can be worked out apart."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle

import lightning.pytorch as L
import pytest
import pytorch_lightning
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from grok_callbacks import (
    EverySteps,
    GrokkingDetector,
    GrokkingForecast,
    Monitor,
    NormMonitor,
    Probe,
    Recorder,
    RepresentationMonitor,
    default_callbacks,
)
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.callbacks.forecast import Forecast
from grok_callbacks.forecast import MODES, ForecastModel
from grok_callbacks.forecast.model import Term
from grok_callbacks.forecast.words import in_percent
from grok_callbacks.tasks import one_hot_recipe
from tests._common import Plain, events, fit, loader, samples, trainer
from tests.callbacks.test_namespaces import CLIS, NAMESPACES, data_of, module_of

pytestmark = pytest.mark.filterwarnings("ignore:.*goes without what.*would measure", "ignore:.*; said once")

EVERY = 50


def model(mode="train", **changes):
    """Goes by the norm since memorising, and by the time."""
    settings = {
        "mode": mode,
        "terms": {"time": Term(1.0, 2.0, 0.4, -0.3), "norm.since": Term(0.5, 0.5, -2.0, 0.7)},
        "log_odds": -1.0, "log_wait": 0.2, "wait_quantiles": (-1.0, 0.1, 1.5),
        "threshold": 0.9, "hopeless": 0.2, "hopeless_after": 4.0, "wait": EVERY, "patience": 2, "calibrated_on": "A hand.",
    }  # fmt: skip
    return ForecastModel(**{**settings, **changes})


class Norms(NormMonitor):
    """A curve that was made up: one value, and from a step on another."""

    def __init__(self, value=1.0, change_at=4 * EVERY, until=None, every=EVERY, **kwargs):
        super().__init__(schedule=EverySteps(every), **kwargs)
        self.value, self.change_at, self.until = value, change_at, until

    def measure(self, snapshot):
        is_changed = snapshot.step >= self.change_at and (self.until is None or snapshot.step < self.until)
        return {"norm": self.value if is_changed else 1.0}


class Events(GrokkingDetector):
    """Accuracies that were made up: each event has its step."""

    def __init__(self, memorized=2 * EVERY, onset=math.inf, generalized=math.inf, every=EVERY, **kwargs):
        super().__init__(schedule=EverySteps(every), chance=0.0, **kwargs)
        self.at = memorized, onset, generalized

    def measure(self, snapshot):
        memorized, onset, generalized = (snapshot.step >= step for step in self.at)
        return {"accuracy/train": float(memorized), "accuracy/validation": 0.5 * onset + 0.5 * generalized}


def forecaster(every=EVERY, **kwargs):
    return GrokkingForecast(schedule=EverySteps(every), **{"model": model(), **kwargs})


def recorder_of(monitors):
    return Recorder(nn.Linear(6, 3), monitors, Probe(train=samples(8), validation=samples(8, seed=1)))


def follow(monitors, steps=20 * EVERY):
    """Measure in a loop; the values by step."""
    recorder = recorder_of(monitors)
    logged = {step: recorder.record(step) for step in range(0, steps + 1, EVERY)}
    assert not recorder.switched_off
    return logged


def forecasts(logged):
    """What is the forecast's own, by step."""
    found = {
        step: {key.removeprefix("grok/forecast/"): v for key, v in values.items() if "/forecast/" in key}
        for step, values in logged.items()
    }
    return {step: values for step, values in found.items() if values}


def worked_out(step, memorized, norm):
    """The model's formulas on paper."""
    time = (math.log(step / memorized) - 1.0) / 2.0
    change = max(-3.0, min(3.0, (math.log(norm) - 0.5) / 0.5))
    odds = -1.0 + 0.4 * time - 2.0 * change
    wait = 0.2 - 0.3 * time + 0.7 * change
    ends = [step + step * math.exp(wait + quantile) for quantile in (-1.0, 0.1, 1.5)]
    return {"probability": 1 / (1 + math.exp(-odds)), **dict(zip(("lower", "eta_steps", "upper"), ends, strict=True))}


# What it logs.


@pytest.mark.parametrize("norm", [0.8, 1.3])
@pytest.mark.parametrize("order", [1, -1])
def test_logs_the_forecast_from_memorising_to_the_onset(norm, order):
    forecast = forecaster()
    monitors = [Norms(norm), Events(onset=600, generalized=800), forecast]
    found = forecasts(follow(monitors[::order]))
    # 100 is established at 150, which is as soon as the model begins; 600 at 650.
    assert list(found) == list(range(150, 601, 50))
    for step, values in found.items():
        assert values == pytest.approx(worked_out(step, 100, norm if step >= 200 else 1.0)), step
    assert forecast.forecast is None


@pytest.mark.parametrize(
    "at", [{"memorized": math.inf}, {"memorized": 100, "onset": 100, "generalized": 100}, {"memorized": math.inf, "onset": 50}]
)
def test_is_silent_without_memorising_and_where_generalising_comes_with_it(at):
    said = []
    forecast = forecaster(on_warning=said.append, threshold=1e-9, stop_hopeless=True)
    assert not forecasts(follow([Norms(0.1), Events(**at), forecast]))
    assert (said, forecast.warning, forecast.should_stop) == ([], None, False)
    assert not any([forecast.texts(), forecast.status(), forecast.figures()])


def test_waits_as_long_as_its_model():
    assert min(forecasts(follow([Norms(), Events(), forecaster(model=model(wait=300))]))) == 400


def test_comes_at_its_own_measurements_only():
    """Others may measure in between, and metrics may come in."""
    recorder = recorder_of([Norms(every=10), Events(every=10), forecaster(every=100)])
    logged = {step: recorder.record(step, metrics={"lr": 0.0}) for step in range(0, 401, 10)}
    assert list(forecasts(logged)) == [200, 300, 400]


class Broken(Norms):
    def measure(self, snapshot):
        return {"norm": math.nan if snapshot.step in (300, 350, 400) else 0.8}


def test_what_is_not_a_number_is_a_gap():
    with pytest.warns(UserWarning, match="grok/norm is nan at step 300"):
        logged = follow([Broken(), Events(), forecaster(model=model(terms={"norm.since": Term(0, 1, 1, 1)}))])
    found = forecasts(logged)
    assert all(math.isfinite(value) for values in found.values() for value in values.values())
    # What was measured in the last fifth of the steps still holds.
    assert list(found) == [150, 200, 250, 300, *range(450, 1001, 50)]


class Nothing(Monitor):
    def measure(self, snapshot):
        return {}


def test_with_nothing_to_go_by_says_nothing():
    """Another person's monitor may have measured something of use."""
    assert not forecasts(follow([Nothing(), Events(), forecaster(threshold=1e-9)]))


# The warning.


def odds_of(probability):
    return math.log(probability / (1 - probability))


def test_warns_once_of_what_lasts():
    said = []
    forecast = forecaster(on_warning=said.append)
    logged = forecasts(follow([Norms(0.3), Events(), forecast]))
    above = [step for step, values in logged.items() if values["probability"] >= 0.9]
    assert above[:2] == [200, 250], "the norm falls at 200"
    assert len(above) > 10
    (warning,) = said
    assert warning is forecast.warning
    expected = worked_out(250, 100, 0.3)
    assert (warning.step, warning.probability, warning.median, warning.lower, warning.upper) == pytest.approx(
        (250, *(expected[name] for name in ("probability", "eta_steps", "lower", "upper")))
    )
    assert warning.text.startswith("Likely to generalise: more than 99%, around step 290 (260 to 420); ")
    assert "weight norm has fallen" in warning.text
    assert len(warning.reasons) == 1, "time is no reason"
    with pytest.raises(AttributeError):
        warning.step = 3


def test_does_not_warn_of_a_single_measurement():
    forecast = forecaster(threshold=0.98)
    logged = forecasts(follow([Norms(0.3, until=250), Events(), forecast]))
    assert logged[200]["probability"] > 0.98 > logged[250]["probability"]
    assert forecast.warning is None


def test_does_not_warn_after_the_onset():
    forecast = forecaster()
    follow([Norms(0.3, change_at=400), Events(onset=350), forecast])
    assert forecast.warning is None


def test_the_threshold_may_be_another():
    probability = worked_out(200, 100, 0.8)["probability"]
    for threshold, warned in ((probability - 1e-9, True), (probability + 1e-9, False)):
        forecast = forecaster(threshold=threshold)
        follow([Norms(0.8), Events(), forecast], steps=250)
        assert (forecast.warning is not None) == warned


def test_a_function_that_fails_costs_a_warning_and_no_run():
    def fail(forecast):
        raise KeyError(f"at {forecast.step}")

    forecast = forecaster(on_warning=fail)
    with pytest.warns(UserWarning, match="`on_warning` failed: KeyError: 'at 250'") as caught:
        logged = follow([Norms(0.3), Events(), forecast])
    assert sum("on_warning" in str(one.message) and "failed" in str(one.message) for one in caught) == 1
    assert max(forecasts(logged)) == 1000
    with pytest.raises(KeyError, match="at 250"):
        follow([Norms(0.3), Events(), forecaster(on_warning=fail, on_error="raise")])


@pytest.mark.parametrize(
    ("step", "probability", "expected", "text"),
    [
        (1230, 0.934, (3391.2, 2603.0, 4922.0), "Likely to generalise: 93%, around step 3,400 (2,600 to 4,900)."),
        (89, 0.5, (120.4, 89.3, 1e6), "Likely to generalise: 50%, around step 120 (89 to 1,000,000)."),
        (3449, 0.4, (4000, 3449.5, 9e3), "May generalise: 40%, around step 4,000 (3,449 to 9,000)."),
        (7, 0.9999, (7.2, 7.01, 9.9), "Likely to generalise: more than 99%, around step 7 (7 to 10)."),
    ],
)
def test_words(step, probability, expected, text):
    assert Forecast(step, probability, *expected).text == text


def test_words_of_several_reasons():
    reasons = Forecast(9, 0.9, 20.0, 10.0, 30.0, ("a", "b", "c"))
    assert reasons.text.endswith("; a, b and c.")
    assert in_percent(0.0) == "less than 1%"


def test_one_reason_for_each_measure_the_strongest_first():
    terms = {
        "norm.since": Term(0, 1, -1.0, 0), "norm.recent": Term(0, 1, -2.0, 0), "loss.since": Term(0, 1, 0.5, 0),
        "time": Term(0, 1, 3.0, 0),
    }  # fmt: skip

    class Losses(Events):
        def measure(self, snapshot):
            return {**super().measure(snapshot), "loss/train": 2.0 if snapshot.step < 200 else 1.0}

    forecast = forecaster(model=model(terms=terms))
    follow([Norms(0.3), Losses(), forecast], steps=250)
    assert len(forecast.forecast.reasons) == len(forecast.forecast.doubts) == 1
    assert "weight norm has fallen" in forecast.forecast.reasons[0]
    assert "loss has fallen" in forecast.forecast.doubts[0]


# Ending runs.


def test_ends_hopeless_runs():
    forecast = forecaster(stop_hopeless=True)
    logged = forecasts(follow([Norms(3.0), Events(), forecast], steps=450))
    assert logged[250]["probability"] < 0.2
    # The model gives no run up before four times the steps of memorising: 400 is the first, 450 the second of two.
    assert forecast.should_stop
    assert forecast.hopeless.step == 450
    assert "Stopped as hopeless at step 450" in forecast.texts()["forecast"]
    earlier = forecaster(stop_hopeless=True)
    follow([Norms(3.0), Events(), earlier], steps=400)
    assert not earlier.should_stop


def test_a_run_that_had_memorised_when_it_began_is_not_given_up():
    """Nobody knows how long memorising took."""
    forecast = forecaster(stop_hopeless=True)
    logged = forecasts(follow([Norms(3.0), Events(memorized=0), forecast]))
    assert max(logged) > 450
    assert not forecast.should_stop


@pytest.mark.parametrize(
    ("norm", "onset", "settings"),
    [(3.0, math.inf, {}), (1.0, math.inf, {"stop_hopeless": True}), (3.0, 350, {"stop_hopeless": True})],
)
def test_ends_no_others(norm, onset, settings):
    forecast = forecaster(**settings)
    follow([Norms(norm), Events(onset=onset), forecast])
    assert not forecast.should_stop


def test_ends_after_generalisation():
    forecast = forecaster(stop_after_generalization=True)
    monitors = [Norms(), Events(onset=500, generalized=700), forecast]
    recorder = recorder_of(monitors)
    stopped = next(step for step in range(0, 2000, EVERY) if [recorder.record(step), forecast.should_stop][1])
    assert stopped == 750


# Where the events come from.


def test_finds_the_events_itself_where_there_is_no_detector():
    """A fitted model and useless validation data."""
    network = nn.Linear(6, 3)
    with torch.no_grad():
        network.weight.copy_(10 * torch.eye(3, 6))
    network.bias.data.zero_()
    x, y = samples(16).tensors
    probe = Probe(train=(x, y), validation=(x, (y + 1) % 3))
    forecast = forecaster()
    recorder = Recorder(network, [Norms(), forecast], probe)
    logged = {step: recorder.record(step) for step in range(0, 301, EVERY)}
    assert logged[0]["grok/accuracy/train"] == 1.0
    assert logged[0]["grok/accuracy/validation"] == 0.0
    # Memorised at step 0.
    assert list(forecasts(logged)) == list(range(50, 301, 50))
    assert forecast.forecast is not None


def test_reads_logged_accuracies_where_there_is_no_detector():
    forecast = forecaster()
    recorder = Recorder(nn.Linear(6, 3), [Norms(), forecast], Probe(train=samples(8)))
    logged = {
        step: recorder.record(step, metrics={"train_acc": float(step >= 200), "val_acc": 0.6 * (step >= 500)})
        for step in range(0, 701, EVERY)
    }
    assert list(forecasts(logged)) == list(range(250, 501, 50))


def test_goes_by_the_detector_with_its_prefix():
    detectors = [Events(memorized=500, prefix="other"), Events(memorized=300)]
    assert min(forecasts(follow([Norms(), *detectors, forecaster()]))) == 350
    assert min(forecasts(follow([Norms(), detectors[0], forecaster()]))) == 550


def test_a_detector_that_fails_takes_the_forecast_along():
    class Failing(Events):
        def measure(self, snapshot):
            if snapshot.step == 300:
                raise RuntimeError("no labels")
            return super().measure(snapshot)

    forecast = forecaster()
    recorder = recorder_of([Norms(), Failing(), forecast])
    with (
        pytest.warns(UserWarning, match="no labels"),
        pytest.warns(UserWarning, match="which tells when the run memorises, is switched off"),
    ):
        logged = {step: recorder.record(step) for step in range(0, 501, EVERY)}
    assert max(forecasts(logged)) == 250


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.__name__)
def test_needs_something_to_go_by(namespace):
    def start(*callbacks, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()):
            trainer(callbacks, namespace, **kwargs).fit(module_of(namespace)(), loader())

    with pytest.raises(MisconfigurationException, match=r"reads what other monitors measure.*Add .*TruncationMonitor"):
        start(GrokkingForecast(), GrokkingDetector())
    with pytest.raises(MisconfigurationException, match="none of these with the prefix 'mine'"):
        start(GrokkingForecast(prefix="mine"), NormMonitor())
    only_when = model(terms={"norm.since": Term(0, 1, 0.0, 1.0), "lmn.since": Term(0, 1, 1.0, 1.0)})
    with pytest.raises(MisconfigurationException, match=r"reads what other.*Add LinearMappingNumberMonitor, as many"):
        start(GrokkingForecast(model=only_when), NormMonitor())
    unreadable = Probe(unpack=lambda batch: batch[7])
    with pytest.raises(MisconfigurationException, match=r"cannot tell when the run memorises.*Or add a GrokkingDetector"):
        start(GrokkingForecast(probe=unreadable, model=model()), NormMonitor())
    start(
        GrokkingForecast(probe=unreadable, model=model()), NormMonitor(), GrokkingDetector("train_acc", "val_acc"), max_steps=1
    )


@pytest.mark.filterwarnings("default:.*goes without what.*would measure")
def test_says_once_what_is_missing():
    several = model(terms={f"{name}.since": Term(0, 1, 1.0, 0) for name in ("norm", "lmn", "loss", "circuit_complexity")})
    with pytest.warns(UserWarning, match=r"without what LinearMappingNumberMonitor, CircuitComplexityMonitor would") as caught:
        follow([Norms(), Events(), forecaster(model=several)])
    assert len(caught) == 1


@pytest.mark.filterwarnings("error:.*goes without what.*would measure")
def test_the_standard_preset_has_all_that_it_reads():
    monitors = default_callbacks("standard")
    forecast = next(one for one in monitors if isinstance(one, GrokkingForecast))
    forecast.optional = False
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    data = Probe(train=samples(16), validation=samples(16, seed=1))
    recorder = Recorder(network, monitors, data)
    for step in range(0, 200, 20):
        recorder.record(step, metrics={"train_acc": 1.0, "val_acc": 0.1})
    assert not recorder.switched_off
    for mode in MODES:
        # Nothing that the shipped models use is missing from what the preset measures.
        missing = ForecastModel.load(mode)(recorder.history, 180, 1).missing
        # With validation data the representation is that of validation samples.
        assert [name for name in missing if not name.startswith("train_representation")] == []


# Modes.


class Measured(RepresentationMonitor):
    def __init__(self, *keys):
        super().__init__(schedule=EverySteps(EVERY))
        self.keys = keys

    def bind(self, view):
        pass

    def measure(self, snapshot):
        return dict.fromkeys(self.keys, 1.0)


ANSWERS, LOSS = "representation/prediction_entropy", "loss/validation"


@pytest.mark.parametrize(
    ("mode", "measured", "expected"),
    [
        (None, [ANSWERS, LOSS], "labels"), (None, [LOSS], "labels"), (None, [ANSWERS], "inputs"), (None, [], "train"),
        ("train", [ANSWERS, LOSS], "train"), ("inputs", [], "inputs"), ("inputs", [ANSWERS, LOSS], "inputs"),
    ],
)  # fmt: skip
def test_modes(monkeypatch, mode, measured, expected):
    shipped = {each: model(each, log_odds=float(number)) for number, each in enumerate(MODES)}
    monkeypatch.setattr(ForecastModel, "load", shipped.__getitem__)
    monitors = [Norms(0.5), Events(), Measured(*measured)]
    forecast = GrokkingForecast(mode, schedule=EverySteps(EVERY))
    follow([*monitors, forecast])
    probabilities = {each: one(forecast.history, 1000, 100).probability for each, one in shipped.items()}
    assert len(set(probabilities.values())) == len(MODES)
    assert forecast.forecast.probability == probabilities[expected]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "label"}, "`mode`"), ({"threshold": 0.0}, "`threshold`"), ({"threshold": 93}, "`threshold`"),
        ({"threshold": "0.9"}, "`threshold`"), ({"threshold": float("nan")}, "`threshold`"), ({"model": "{}"}, "`model`"),
        ({"on_warning": 3}, "`on_warning`"), ({"mode": "inputs", "model": model()}, "`mode` is 'inputs', but"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(kwargs, message):
    with pytest.raises(MisconfigurationException, match=message):
        GrokkingForecast(**kwargs)


# Resuming.


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 5, 6, 8, 14, 15, 18])
@pytest.mark.parametrize("alone", [False, True])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path, stop, alone):
    """Alone: with no detector, by metrics that it reads itself."""
    said, steps = [], [EVERY * number for number in range(21)]

    def make():
        detectors = [] if alone else [Events(onset=700, generalized=900)]
        return [Norms(0.3), *detectors, forecaster(on_warning=said.append)]

    def measure(monitors, steps, state=None):
        recorder = recorder_of(monitors)
        if state is not None:
            recorder.load_state_dict(state)
        logged = {}
        for step in steps:
            metrics = {"train_acc": float(step >= 100), "val_acc": 0.5 * (step >= 700) + 0.5 * (step >= 900)}
            logged[step] = recorder.record(step, metrics=metrics)
        return forecasts(logged), recorder.state_dict()

    whole = make()
    logged, _ = measure(whole, steps)
    assert [forecast.step for forecast in said] == [250]
    first, second = make(), make()
    before, state = measure(first, steps[:stop])
    torch.save(state, tmp_path / "state")
    after, _ = measure(second, steps[stop:], torch.load(tmp_path / "state", weights_only=True))
    assert before | after == logged
    assert [forecast.step for forecast in said] == [250, 250], "once in each run"
    assert second[-1].warning == whole[-1].warning
    assert dict(second[-1].texts()) == dict(whole[-1].texts())
    assert second[-1].own_state() == whole[-1].own_state()


def test_a_run_that_was_given_up_and_is_resumed_is_not_given_up_again():
    monitors = [
        Norms(3.0, every=1, change_at=4),
        Events(memorized=2, every=1),
        forecaster(1, model=model(wait=1), stop_hopeless=True),
    ]
    module, made = fit(monitors, max_steps=30)
    assert made.global_step == 9
    assert monitors[-1].hopeless.step == 9
    made.fit_loop.epoch_loop.max_steps = 30
    made.should_stop = False
    with contextlib.redirect_stdout(io.StringIO()):
        made.fit(module, loader())
    assert made.global_step == 30


# In a Trainer.


def watched(**kwargs):
    """Memorised at step 2, onset at 40, generalised at 50, of 60."""
    return [
        Norms(0.3, change_at=4, every=1), Events(2, 40, 50, every=1), forecaster(1, model=model(wait=2), **kwargs),
    ]  # fmt: skip


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.__name__)
def test_in_a_trainer(namespace, tmp_path, capsys):
    loggers = {L: TensorBoardLogger, pytorch_lightning: pytorch_lightning.loggers.TensorBoardLogger}
    logger = loggers[namespace](tmp_path)
    monitors = watched()
    trainer(monitors, namespace, max_steps=60, logger=logger).fit(module_of(namespace)(), loader())
    said = [line for line in capsys.readouterr().out.splitlines() if "to generalise" in line]
    assert said == [monitors[-1].warning.text]
    written = events(logger.log_dir)
    forecast = {key: points for key, points in written.items() if "forecast" in key}
    assert set(forecast) == {f"grok/forecast/{name}" for name in ("probability", "eta_steps", "lower", "upper")}
    for key, points in forecast.items():
        assert [step for step, _ in points] == list(range(5, 41))
        for step, value in points:
            # A norm of 0.3 and of 1 are 25% apart in no window after step 5.
            if step > 5:
                assert value == pytest.approx(worked_out(step, 2, 0.3)[key.rpartition("/")[2]], rel=1e-5)


def test_in_words_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    monitors = watched()
    shown = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *args):
            shown.append(dict(monitors[-1].status()))

    fit([*monitors, Watch()], max_steps=60, logger=logger)
    assert shown[2] == {}
    assert shown[20]["forecast"].startswith("more than 99% by ~")
    assert shown[-1] == {}
    accumulator = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0})
    accumulator.Reload()
    (tag,) = [tag for tag in accumulator.Tags()["tensors"] if "forecast" in tag]
    texts = [event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(tag)]
    assert texts[0].startswith("**")
    assert "For it:" in texts[5]
    assert "Warned at step" in texts[-1]
    assert texts[-1].endswith("Onset of generalisation at step 40.\n\nGeneralised at step 50.")
    assert "grok/forecast/course" in accumulator.Tags()["images"]


def test_the_figure_shows_the_course():
    monitors = watched()
    fit(monitors, max_steps=60)
    (figure,) = monitors[-1].figures().values()
    above, below = figure.axes
    curve = above.lines[0]
    assert list(curve.get_xdata()) == list(range(5, 41))
    assert list(curve.get_ydata()) == monitors[-1].history["grok/forecast/probability"].values
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert labels == ["forecast", "threshold", f"warned at {monitors[-1].warning.step}", "onset at 40", "generalised at 50"]
    assert (below.get_xscale(), below.get_yscale()) == ("log", "log")
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize(
    ("settings", "norm", "end"),
    [({"stop_hopeless": True}, 3.0, 9), ({"stop_after_generalization": True}, 0.3, 51), ({}, 3.0, 60)],
)
def test_ends_the_fit(settings, norm, end):
    monitors = [Norms(norm, change_at=4, every=1), Events(2, 40, 50, every=1), forecaster(1, model=model(wait=2), **settings)]
    if norm > 1:
        monitors[1] = Events(2, every=1)
    _, made = fit(monitors, max_steps=60)
    assert made.global_step == end
    assert monitors[-1].should_stop == (end < 60)


@pytest.mark.parametrize("stop", [8, 45])
def test_a_resumed_fit(tmp_path, stop):
    def run(folder, monitors, max_steps, **kwargs):
        logger = TensorBoardLogger(folder, name="", version="")
        torch.manual_seed(1)
        return fit(monitors, Plain(), max_steps=max_steps, logger=logger, **kwargs)[1]

    whole, parts = watched(), watched()
    run(tmp_path / "whole", whole, 60)
    run(tmp_path / "parts", watched(), stop).save_checkpoint(tmp_path / "x.ckpt")
    run(tmp_path / "parts", parts, 60, ckpt_path=tmp_path / "x.ckpt")
    ours = [
        {key: points for key, points in events(tmp_path / part).items() if "forecast" in key} for part in ("whole", "parts")
    ]
    assert ours[0] == ours[1]
    assert ours[0]
    assert parts[-1].warning == whole[-1].warning


def test_pickles_without_the_model():
    monitors = [Norms(), Events(), forecaster()]
    recorder = recorder_of(monitors)
    for step in range(0, 301, EVERY):
        recorder.record(step)
    assert monitors[-1].forecast is not None
    recorder.model.unpicklable = lambda: None
    assert pickle.loads(pickle.dumps(monitors[-1])).state_key == copy.deepcopy(monitors[-1]).state_key


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    monitors = watched()
    fit(monitors, max_steps=20)
    twin = copied(monitors[-1])
    assert twin.session is None
    assert twin.label == monitors[-1].label
    assert twin._restored["own"]["forecasts"]["warning"]["step"] == monitors[-1].warning.step
    assert copied(forecaster()).model == model()
    others = watched()
    fit([*others[:-1], twin], max_steps=20)
    assert twin.history["grok/forecast/probability"].steps == list(range(5, 21))
    assert twin.warning == monitors[-1].warning, "a run from the start forgets the other"


# From configurations.

WARNINGS = []


def remember(forecast):
    WARNINGS.append(forecast)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.__name__)
def test_command_lines(namespace, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])
    init_args = {"mode": "inputs", "threshold": 0.3, "on_warning": f"{__name__}.remember", "stop_hopeless": True}
    callbacks = [
        {"class_path": "grok_callbacks.GrokkingForecast", "init_args": init_args},
        {"class_path": "grok_callbacks.TruncationMonitor"},
        {"class_path": "grok_callbacks.GrokkingForecast", "init_args": {"prefix": "other"}},
        {"class_path": "grok_callbacks.TruncationMonitor", "init_args": {"prefix": "other"}},
    ]
    settings = {
        "accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
        "enable_checkpointing": False, "callbacks": callbacks,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 3, "trainer": settings}))
    with contextlib.redirect_stdout(io.StringIO()):
        cli = CLIS[namespace](
            module_of(namespace), data_of(namespace), args=["fit", f"--config={tmp_path / 'config.yaml'}"],
            save_config_callback=None,
        )  # fmt: skip
    given, other = (one for one in cli.trainer.callbacks if isinstance(one, GrokkingForecast))
    assert (given.mode, given.threshold, given.stop_hopeless, given.on_warning.__name__) == ("inputs", 0.3, True, "remember")
    assert other.on_warning is None


# A network that groks.


def learn(weight_decay, steps=560, **settings):
    """The demo's network in a loop of its own, watched by the standard preset on its default schedule."""
    module, data, _ = one_hot_recipe(weight_decay=weight_decay, **settings)
    train, validation = data.train_set, data.val_set
    probe = Probe(train=(train.inputs, train.targets), validation=(validation.inputs, validation.targets))
    monitors = default_callbacks("standard")
    recorder = Recorder(module, monitors, probe)
    optimizer = module.configure_optimizers()
    for step in range(steps + 1):
        recorder.record(step)
        optimizer.zero_grad()
        module.compute_loss(module(train.inputs), train.targets).backward()
        optimizer.step()
    chosen = {type(monitor): monitor for monitor in monitors}
    return chosen[GrokkingForecast], chosen[GrokkingDetector]


def test_a_network_that_groks_is_announced():
    forecast, detector = learn(1.0)
    assert detector.outcome == "grokking"
    assert detector.memorized_step + EVERY <= forecast.warning.step < detector.grokked_step
    assert forecast.warning.lower <= detector.grokked_step <= forecast.warning.upper
    assert forecast.history["grok/forecast/probability"].steps[-1] <= detector.onset_step


def test_a_network_that_only_memorises_is_not():
    forecast, detector = learn(0.0)
    assert detector.outcome == "memorisation"
    assert forecast.warning is None
    assert len(forecast.history["grok/forecast/probability"]) > 10


def test_random_labels_are_not():
    forecast, detector = learn(1.0, task="random")
    assert detector.outcome == "memorisation"
    assert forecast.warning is None
    assert max(forecast.history["grok/forecast/probability"].values) < ForecastModel.load("labels").threshold
