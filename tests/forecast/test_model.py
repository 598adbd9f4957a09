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


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"format": 2}', made().to_json().replace("norm.since", "norm.sins"), made().to_json()[:-20],
     made().to_json().replace('"train"', '"trains"'), made().to_json().replace('"patience": 2', '"patients": 2'),
     made(wait_quantiles=(0.0, 1.0)).to_json()],
)  # fmt: skip
def test_damaged_text(text):
    with pytest.raises(ValueError, match="no forecast model"):
        ForecastModel.from_json(text)


def test_no_such_mode():
    with pytest.raises(ValueError, match="`mode` must be"):
        ForecastModel.load("all")
