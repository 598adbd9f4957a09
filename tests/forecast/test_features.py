from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks import History
from grok_callbacks.forecast import FEATURES, MODES, extract, measured_keys, phrase

STEPS = [0, 5, 10, 20, 40, 50, 80, 100, 120, 200, 300, 400, 800]


def curve(at):
    """A history of everything that is read; ``at(key, step)`` is the value."""
    history = History()
    for step in STEPS:
        for key in measured_keys("labels"):
            for layer in ("a", "b") if key.endswith("/") else ("",):
                history.add(step, {key + layer: at(key + layer, step)})
    return history


def lively(key, step):
    return 0.3 + 0.2 * math.sin(len(key) + step / 70)


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value == second[name] or (math.isnan(value) and math.isnan(second[name])), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [100, 120, 137, 400, 800])
def test_nothing_is_read_from_the_future(mode, step):
    history = curve(lively)
    same(extract(history, step, 50, mode), extract(history.until(step), step, 50, mode))


@pytest.mark.parametrize("mode", MODES)
def test_all_features_of_the_mode_and_no_others(mode):
    features = extract(curve(lively), 400, 50, mode)
    allowed = [name for name, feature in FEATURES.items() if MODES.index(feature.mode) <= MODES.index(mode)]
    assert list(features) == allowed
    unknown = {name for name, value in features.items() if math.isnan(value)}
    # With answers to validation inputs, the representation is that of validation inputs.
    assert unknown == {"train_representation.level", "train_representation.since"} & set(allowed)


def test_labels_of_validation_samples_play_no_part_without_leave():
    history, other = (
        curve(lively),
        curve(lambda key, step: 7.0 if "validation" in key or "class_distance" in key else lively(key, step)),
    )
    for mode in ("train", "inputs"):
        same(extract(history, 400, 50, mode), extract(other, 400, 50, mode))
    assert extract(history, 400, 50, "labels") != extract(other, 400, 50, "labels")


def test_the_representation_counts_as_training_data_where_there_are_no_validation_inputs():
    history = History()
    for step in (0, 100, 200):
        history.add(step, {"grok/representation/entropy": 0.9 - step / 1000})
    assert extract(history, 200, 100, "train")["train_representation.since"] == pytest.approx(-0.1)
    assert math.isnan(extract(history, 200, 100, "inputs")["validation_representation.level"])
    history.add(200, {"grok/representation/prediction_entropy": 1.0})
    assert math.isnan(extract(history, 200, 100, "train")["train_representation.since"])
    assert extract(history, 200, 100, "inputs")["validation_representation.level"] == pytest.approx(0.7)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(1e-3, 1e3))
def test_ratios_have_no_scale(factor):
    history, scaled = curve(lively), curve(lambda key, step: lively(key, step) * (factor if key.startswith("grok/norm") else 1))
    first, second = extract(history, 400, 50, "train"), extract(scaled, 400, 50, "train")
    for name in first:
        if name.startswith("norm"):
            assert first[name] == pytest.approx(second[name], abs=1e-9)


def test_views_by_hand():
    history = History()
    for step, norm in [(0, 8.0), (100, 16.0), (200, 32.0), (400, 4.0)]:
        history.add(step, {"grok/norm": norm, "grok/loss/train": norm, "grok/sparsity/x": norm / 100})
    features = extract(history, 400, 100, "train")
    assert features["time"] == pytest.approx(math.log(4))
    assert features["norm.since"] == pytest.approx(math.log(4 / 16))
    # Half-way between 100 and 400 on the logarithmic axis is 200.
    assert features["norm.recent"] == pytest.approx(math.log(4 / 32))
    assert features["norm.peak"] == pytest.approx(math.log(4 / 32))
    assert features["loss.start"] == pytest.approx(math.log(4 / 8))
    assert features["sparsity.level"] == pytest.approx(0.04)


def test_layers_are_reduced_without_their_names():
    first, second = History(), History()
    for step, (a, b) in {0: (1.0, 4.0), 100: (2.0, 4.0), 200: (8.0, 4.0)}.items():
        first.add(
            step, {"grok/circuit_complexity/mlp.0": a, "grok/circuit_complexity/mlp.2": b, "grok/norm/x": a, "grok/norm/y": b}
        )
        second.add(
            step, {"grok/circuit_complexity/head": b, "grok/circuit_complexity/body": a, "grok/norm/u": b, "grok/norm/v": a}
        )
    features = extract(first, 200, 100, "train")
    same(features, extract(second, 200, 100, "train"))
    assert features["circuit_complexity.since"] == pytest.approx((math.log(4) + 0) / 2)
    assert features["lowest_complexity.level"] == pytest.approx(math.log(4))
    assert features["norm_spread.start"] == pytest.approx(math.log(8) / 2)


@pytest.mark.parametrize("mode", MODES)
def test_no_measure_is_missed(mode):
    features = extract(History(), 400, 50, mode)
    assert features.pop("time") == pytest.approx(math.log(8))
    assert all(math.isnan(value) for value in features.values())
    for left_out in measured_keys(mode):
        history = curve(lively)
        extract(history.of(key for key in history if not key.startswith(left_out)), 400, 50, mode)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e300, 1e-300])
@pytest.mark.parametrize("mode", MODES)
def test_values_of_any_kind_give_numbers_or_nan(mode, value):
    for history in (curve(lambda *_: value), curve(lambda key, step: value if step == 400 else lively(key, step))):
        assert all(math.isnan(number) or abs(number) < 1e301 for number in extract(history, 400, 50, mode).values())


def test_a_loss_of_zero_is_small_and_not_unknown():
    history = curve(lambda key, step: 0.0 if step > 100 else 1.0)
    assert extract(history, 800, 50, "train")["loss.since"] == -20.0


def test_memorised_at_once_and_asked_at_once():
    features = extract(curve(lively), 0, 0, "labels")
    assert features["time"] == 0
    extract(curve(lively), 50, 50, "labels")


def test_refusals():
    with pytest.raises(ValueError, match="`step` 10 lies before"):
        extract(History(), 10, 20)
    with pytest.raises(ValueError, match="`mode` must be"):
        extract(History(), 30, 20, "all")
    with pytest.raises(ValueError, match="`mode` must be"):
        measured_keys("all")


def test_another_prefix():
    history = History()
    for step in (0, 100, 200):
        history.add(step, {"run/norm": 1.0 + step})
    assert extract(history, 200, 100, "train", prefix="run")["norm.since"] == pytest.approx(math.log(201 / 101))
    assert math.isnan(extract(history, 200, 100, "train")["norm.since"])


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("value", [-1.3, -0.2, 0.0, 0.2, 3.0])
def test_every_feature_has_words(name, value):
    words = phrase(name, value)
    assert "%%" not in words
    assert words[0].islower() or words[0].isdigit()


def test_words_say_the_direction():
    assert phrase("norm.since", math.log(0.5)) == "the weight norm has fallen 2-fold since memorising"
    assert phrase("churn.level", 0.25) == "the share of changed answers to validation inputs is 0.25"
    assert "risen 22%" in phrase("lmn.since", 0.2)
