from __future__ import annotations

import json
import math
import pickle
import random

import pytest

from grok_callbacks import History
from grok_callbacks.forecast import FEATURES, MODES, ForecastModel, extract
from grok_callbacks.forecast.model import Term


def made(**changes):
    settings = {
        "mode": "train",
        "terms": {"norm.since": Term(-0.5, 0.5, -2.0, 0.5), "time": Term(1.0, 1.0, 0.25, -0.25)},
        "log_odds": -1.0,
        "log_wait": 0.0,
        "wait_quantiles": (-1.0, 0.0, 1.0),
        "threshold": 0.8,
        "hopeless": 0.05,
        "hopeless_after": 5.0,
        "wait": 50,
        "patience": 2,
        "calibrated_on": "Nothing.",
    }
    return ForecastModel(**settings | changes)


def test_prediction_by_hand():
    prediction = made().predict({"norm.since": -1.0, "time": 2.0}, step=100)
    # Standardised: -1 and 1.
    log_odds = -1.0 + 2.0 + 0.25
    assert prediction.probability == pytest.approx(1 / (1 + math.exp(-log_odds)))
    assert prediction.contributions == pytest.approx({"norm.since": 2.0, "time": 0.25})
    assert list(prediction.contributions) == ["norm.since", "time"]
    wait = -0.5 - 0.25
    for found, quantile in zip((prediction.lower, prediction.median, prediction.upper), (-1, 0, 1), strict=True):
        assert found == pytest.approx(100 * (1 + math.exp(wait + quantile)))
    assert prediction.missing == ()


@pytest.mark.parametrize("unknown", [{}, {"norm.since": math.nan}, {"norm.since": math.inf}])
def test_what_is_unknown_is_neutral(unknown):
    prediction = made().predict({"time": 2.0, **unknown}, step=100)
    assert prediction.missing == ("norm.since",)
    assert prediction.contributions == pytest.approx({"time": 0.25})
    assert prediction.probability == pytest.approx(made().predict({"time": 2.0, "norm.since": -0.5}, 100).probability)


def test_far_out_features_have_a_limit():
    near, far = (made().predict({"norm.since": value, "time": 1.0}, 10) for value in (-2.0, -1e9))
    assert near.probability == far.probability
    assert near.upper == far.upper


@pytest.mark.parametrize("mode", MODES)
def test_shipped_models(mode):
    model = ForecastModel.load(mode)
    assert model.mode == mode
    assert ForecastModel.load(mode) is model
    assert 0 < model.hopeless < model.threshold < 1
    assert model.wait_quantiles[0] < model.wait_quantiles[1] < model.wait_quantiles[2]
    assert "runs" in model.calibrated_on
    assert all(MODES.index(FEATURES[name].mode) <= MODES.index(mode) for name in model.terms)
    assert ForecastModel.from_json(model.to_json()).to_json() == model.to_json()
    assert pickle.loads(pickle.dumps(model)) == model


@pytest.mark.parametrize("mode", MODES)
def test_shipped_models_take_anything(mode):
    model, draw = ForecastModel.load(mode), random.Random(0)
    for _ in range(50):
        features = {name: draw.choice([math.nan, 0.0, draw.gauss(0, 5), 1e30, -1e30]) for name in FEATURES}
        prediction = model.predict(features, step=draw.randrange(10**6))
        assert 0 < prediction.probability < 1
        assert 0 < prediction.lower <= prediction.median <= prediction.upper < math.inf
        log_odds = model.log_odds + sum(prediction.contributions.values())
        assert prediction.probability == pytest.approx(1 / (1 + math.exp(-log_odds)), rel=1e-6)


def test_called_with_a_history_it_extracts_the_features():
    history = History()
    for step in (0, 100, 200, 300):
        history.add(step, {"grok/norm": 100.0 - step / 10})
    model = ForecastModel.load("train")
    assert model(history, 300, 100) == model.predict(extract(history, 300, 100, "train"), 300)
    assert model(history.until(200), 200, 100) == model(history, 200, 100)


def test_text_is_plain_and_round():
    text = made(log_odds=0.123456789).to_json()
    assert json.loads(text)["log_odds"] == 0.123457
    assert json.loads(text)["terms"]["time"] == {"mean": 1.0, "scale": 1.0, "log_odds": 0.25, "log_wait": -0.25}


def test_far_out_models_have_a_limit():
    prediction = made(log_wait=1e9, log_odds=-1e9).predict({"norm.since": -1.0, "time": 2.0}, step=10**6)
    assert prediction.probability == 0.0
    assert 10**6 < prediction.lower <= prediction.upper < math.inf


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"), ("[]", "an object, got a list"), ("null", "an object"), ("{}", "lacks .*'format'"),
        ('{"format": 1}', "lacks .*'calibrated_on'"), (made().to_json()[:-20], "column"), ("[" * 100_000, "recursion"),
        (made().to_json().replace("norm.since", "norm.sins"), "`terms` .*'norm.sins'.* not know"),
        (made().to_json().replace("norm.since", "validation_loss.since"), "`terms` .*mode 'train' does not read"),
        (made().to_json().replace('"train"', '"trains"'), "`mode`"), (made().to_json().replace('"train"', "[]"), "`mode`"),
        (made().to_json().replace('"patience": 2', '"patients": 2'), r"lacks \['patience'\]"),
        (made().to_json().replace('"patience": 2', '"patience": 2, "more": 1'), r"no place for \['more'\]"),
        (made().to_json().replace('"scale": 0.5', '"scales": 0.5'), r"`terms\['norm.since'\]` lacks \['scale'\]"),
    ],
)  # fmt: skip
def test_damaged_text(text, said):
    assert_refused(text, said)


def assert_refused(text, said):
    with pytest.raises(ValueError, match=f"`text` is no forecast model of this version: .*{said}"):
        ForecastModel.from_json(text)


def leaves(value, *path):
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, *path, key)
    else:
        yield path


def changed(path, value):
    """The shipped model's text with one value replaced."""
    data = json.loads(ForecastModel.load("labels").to_json())
    *way, last = path
    place = data
    for key in way:
        place = place[key]
    place[last] = value
    return json.dumps(data)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, [], {}, True, 1e308, -1e308, 10**400, "1"], ids=repr)
def test_every_value_of_a_file_is_checked(value):
    paths = list(leaves(json.loads(ForecastModel.load("labels").to_json())))
    assert len(paths) > 100
    for path in paths:
        if path != ("calibrated_on",) or not isinstance(value, str):
            # The innermost name, where it is one.
            assert_refused(changed(path, value), f"`{next(key for key in reversed(path) if isinstance(key, str))}")


@pytest.mark.parametrize("whole", ["terms", "wait_quantiles"])
@pytest.mark.parametrize("value", [None, 1, "text", [], {"time": 1}, [[1]], [0.0, 1.0]], ids=repr)
def test_every_list_of_a_file_is_checked(whole, value):
    assert_refused(changed((whole,), value), f"`{whole}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", -0.1), ("threshold", 1.1), ("hopeless", -0.1), ("hopeless", 1.1), ("hopeless_after", -1.0),
        ("wait", -1), ("wait", 2.5), ("patience", 0), ("patience", 2.5), ("wait_quantiles", [0.0, -1.0, 1.0]),
    ],
)  # fmt: skip
def test_values_out_of_their_range(name, value):
    assert_refused(changed((name,), value), f"`{name}`")
    with pytest.raises(ValueError, match=f"`{name}`"):
        made(**{name: tuple(value) if isinstance(value, list) else value})


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_no_feature_is_divided_by_nothing(scale):
    assert_refused(changed(("terms", "time", "scale"), scale), r"`terms\['time'\]`, `scale` must be positive")


@pytest.mark.parametrize(
    "terms", [None, [], {"time": (1.0, 1.0, 1.0, 1.0)}, {"nothing": Term(0, 1, 1, 1)}, {1: Term(0, 1, 1, 1)}]
)
def test_terms_that_are_none(terms):
    with pytest.raises(ValueError, match="`terms`"):
        made(terms=terms)


def test_no_such_mode():
    with pytest.raises(ValueError, match="`mode` must be"):
        ForecastModel.load("all")
