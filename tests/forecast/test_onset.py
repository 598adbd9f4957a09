from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks.forecast.onset import EVENTS, Events, OnsetTracker, Thresholds, is_share
from grok_callbacks.forecast.sources import accuracy_key, logged_accuracy_names


def follow(train, validation, **thresholds):
    """Feed two curves, given as ``{step: value}``, in the order of steps."""
    tracker = OnsetTracker(Thresholds(**thresholds))
    found = []
    for step in sorted({*train, *validation}):
        if step in train:
            found += [(step, event) for event in tracker.update_train(step, train[step])]
        if step in validation:
            found += [(step, event) for event in tracker.update_validation(step, validation[step])]
    return tracker, found


CURVES = {
    "grokking": ({10: 0.5, 20: 1.0, 30: 1.0}, {10: 0.0, 30: 0.1, 200: 0.3, 300: 0.95, 400: 1.0}),
    "comprehension": ({10: 0.5, 20: 1.0, 30: 1.0}, {10: 0.4, 20: 0.8, 30: 0.95, 40: 0.96}),
    "memorisation": ({10: 0.5, 20: 1.0, 30: 1.0}, {10: 0.1, 30: 0.1, 400: 0.1}),
    "confusion": ({10: 0.2, 20: 0.3, 30: 0.2}, {10: 0.1, 30: 0.1, 400: 0.1}),
}


@pytest.mark.parametrize("outcome", CURVES)
def test_the_four_outcomes(outcome):
    tracker, _ = follow(*CURVES[outcome])
    assert tracker.outcome == outcome


def test_the_events_of_a_grokking_run():
    tracker, found = follow(*CURVES["grokking"])
    assert (tracker.memorized_step, tracker.onset_step, tracker.grokked_step, tracker.delay) == (20, 200, 300, 280)
    # Established by the second measurement, dated to the first.
    assert found == [(30, "memorized"), (300, "onset"), (400, "generalized")]


def test_generalising_without_memorising_is_comprehension():
    tracker, _ = follow({10: 0.8, 20: 0.8}, {10: 0.95, 20: 0.95})
    assert tracker.outcome == "comprehension"
    assert tracker.delay is None


@pytest.mark.parametrize(("grokked", "outcome"), [(199, "comprehension"), (200, "grokking")])
def test_twice_as_late_is_late(grokked, outcome):
    tracker, _ = follow({100: 1.0, 101: 1.0}, {grokked: 1.0, 500: 1.0})
    assert tracker.outcome == outcome
    assert follow({100: 1.0, 101: 1.0}, {grokked: 1.0, 500: 1.0}, delay_ratio=1.0)[0].outcome == "grokking"


def test_a_model_that_has_memorised_at_step_0():
    tracker, _ = follow({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0})
    assert tracker.outcome == "comprehension"
    assert follow({0: 1.0, 1: 1.0}, {5: 1.0, 6: 1.0})[0].outcome == "grokking"


@pytest.mark.parametrize("patience", [1, 2, 3, 5])
def test_an_event_lasts_as_long_as_it_must(patience):
    values = dict.fromkeys(range(10, 10 + patience), 1.0)
    tracker, found = follow(values, {}, patience=patience)
    assert tracker.memorized_step == 10
    assert found == [(9 + patience, "memorized")]
    assert follow(dict(list(values.items())[:-1]), {}, patience=patience)[0].memorized_step is None


def test_noise_around_a_level_does_not_fire():
    noisy = {step: 0.985 + 0.01 * (step % 2) for step in range(100)}
    assert follow(noisy, {})[0].memorized_step is None
    assert follow({**noisy, 100: 1.0, 101: 1.0}, {})[0].memorized_step == 99  # The last of the noise was beyond it, too.


def test_an_event_fires_once():
    tracker, found = follow({step: float(step % 10 > 4) for step in range(100)}, {})
    assert found == [(6, "memorized")]
    assert tracker.memorized_step == 5


def test_nan_is_beyond_no_level_and_ends_a_streak():
    nan = math.nan
    assert follow({1: nan, 2: nan}, {1: nan, 2: nan})[0].outcome == "confusion"
    assert follow({1: 1.0, 2: nan, 3: 1.0, 4: nan}, {})[0].memorized_step is None
    assert (
        follow({1: nan, 2: nan}, {1: nan, 2: nan}, mode="min", memorized=0.1, target=0.0, chance=1.0)[0].outcome == "confusion"
    )


def test_falling_metrics():
    levels = {"mode": "min", "memorized": 0.01, "target": 0.05, "chance": 4.0}
    tracker, _ = follow({10: 1.0, 20: 0.005, 30: 0.001}, {10: 5.0, 100: 3.0, 110: 2.0, 200: 0.3, 300: 0.1}, **levels)
    assert (tracker.memorized_step, tracker.onset_step, tracker.grokked_step) == (20, 100, 200)
    assert tracker.outcome == "grokking"


@pytest.mark.parametrize(
    ("thresholds", "onset", "generalized"),
    [
        (Thresholds(), 0.2, 0.9),
        (Thresholds(chance=0.5), 0.6, 0.9),
        (Thresholds(target=0.8, chance=0.1), 0.24, 0.72),
        (Thresholds(mode="min", target=0.0, chance=1.0), 0.8, 0.1),
        (Thresholds(onset=0.5, generalized=1.0), 0.5, 1.0),
    ],
)
def test_levels(thresholds, onset, generalized):
    assert thresholds.onset_level == pytest.approx(onset)
    assert thresholds.generalized_level == pytest.approx(generalized)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "up"}, {"patience": 0}, {"target": 0.1, "chance": 0.1}, {"target": 0.1, "chance": 0.5}, {"onset": 0.0},
        {"mode": "min", "target": 1.0, "chance": 0.5}, {"onset": 1.0}, {"generalized": 0.0}, {"generalized": 1.5},
        {"target": math.nan}, {"chance": math.nan}, {"memorized": math.nan}, {"onset": math.nan}, {"delay_ratio": math.nan},
        {"memorized": math.inf}, {"target": math.inf}, {"delay_ratio": -1.0}, {"patience": 1.5}, {"patience": math.nan},
        {"memorized": "0.9"}, {"target": None}, {"patience": "2"}, {"patience": True}, {"onset": [0.2]}, {"memorized": True},
    ],
)  # fmt: skip
def test_thresholds_that_cannot_be_reached(wrong):
    with pytest.raises(ValueError, match="`"):
        Thresholds(**wrong)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    values=st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=30),
    patience=st.integers(1, 4),
    stop=st.integers(0, 30),
)
def test_is_what_a_search_over_the_whole_curve_finds_and_can_be_interrupted_anywhere(values, patience, stop):
    def first_streak(level, begin=0):
        for start in range(begin, len(values) - patience + 1):
            if all(value >= level for value in values[start : start + patience]):
                return start
        return None

    def onset():
        below = next((step for step, value in enumerate(values) if not value >= 0.2), len(values))
        after, generalized = first_streak(0.2, below), first_streak(0.9)
        return min((step for step in (after, generalized) if step is not None), default=None)

    tracker = OnsetTracker(Thresholds(patience=patience))
    for step, value in enumerate(values):
        if step == stop:
            state = tracker.state_dict()
            tracker = OnsetTracker()
            tracker.load_state_dict(state)
        tracker.update_train(step, value)
        tracker.update_validation(step, value)
    assert tracker.memorized_step == first_streak(0.99)
    assert tracker.onset_step == onset()
    assert tracker.grokked_step == first_streak(0.9)


@pytest.mark.parametrize(
    "state",
    [
        {}, {"thresholds": {}, "crossings": {}}, {"thresholds": {"nothing": 1}, "crossings": {}}, {"thresholds": None},
        {"thresholds": {}, "crossings": {event: {"step": "1", "streak_start": None, "streak": 0} for event in EVENTS}},
        {"thresholds": {"patience": 0}, "crossings": {event: {"step": 1, "streak_start": 1, "streak": 0} for event in EVENTS}},
    ],
)  # fmt: skip
def test_refuses_what_is_no_state(state):
    with pytest.raises(ValueError, match="`"):
        OnsetTracker().load_state_dict(state)


def test_restarts_one_metric_and_keeps_the_other():
    tracker, _ = follow(*CURVES["grokking"])
    tracker.restart("validation")
    assert (tracker.memorized_step, tracker.onset_step, tracker.grokked_step) == (20, None, None)
    assert tracker.update_validation(500, 1.0) == []
    assert tracker.update_validation(600, 1.0) == ["onset", "generalized"]
    tracker.restart("train")
    assert (tracker.memorized_step, tracker.grokked_step) == (None, 500)


@pytest.mark.parametrize(
    ("train", "validation", "memorized", "generalized", "outcome"),
    [
        # Fitted before the first look, generalised long after it: later still than it was fitted.
        ({150: 1.0, 160: 1.0}, {150: 0.0, 400: 1.0, 410: 1.0}, "at or before step 150", "at step 400", "grokking"),
        ({150: 1.0, 160: 1.0}, {150: 0.0, 200: 1.0, 210: 1.0}, "at or before step 150", "at step 200", None),
        ({150: 1.0, 160: 1.0}, {150: 1.0, 160: 1.0}, "at or before step 150", "at or before step 150", None),
        ({150: 0.0, 160: 1.0, 170: 1.0}, {150: 1.0, 160: 1.0}, "at step 160", "at or before step 150", "comprehension"),
        ({150: 0.0, 160: 1.0, 170: 1.0}, {400: 1.0, 410: 1.0}, "at step 160", "at or before step 400", None),
        ({150: 0.0, 160: 1.0, 170: 1.0}, {150: 0.0, 170: 1.0, 180: 1.0}, "at step 160", "at step 170", "comprehension"),
        ({150: 0.0, 160: 1.0, 170: 1.0}, {150: 0.0, 330: 1.0, 340: 1.0}, "at step 160", "at step 330", "grokking"),
        ({150: 1.0, 160: 0.5, 170: 1.0, 180: 1.0}, {150: 0.0}, "at step 170", "not so far", "memorisation"),
        ({150: 0.5, 160: 0.5}, {150: 0.0}, "not so far", "not so far", "confusion"),
    ],
)
def test_a_run_that_is_looked_at_late(train, validation, memorized, generalized, outcome):
    """No kind of run is claimed that hangs on an order which was not seen."""
    tracker = OnsetTracker(start=150)
    for step, value in train.items():
        tracker.update_train(step, value)
    for step, value in validation.items():
        tracker.update_validation(step, value)
    again = OnsetTracker()
    again.load_state_dict(tracker.state_dict())
    for events in (tracker.events, again.events):
        assert (events.when("memorized"), events.when("generalized"), events.outcome) == (memorized, generalized, outcome)
        assert (events.delay is None) == ("before" in memorized or "not so far" in generalized or "before" in generalized)


def test_what_was_never_measured_is_unknown():
    tracker = OnsetTracker()
    assert tracker.outcome is None
    for step in (1, 2):
        tracker.update_train(step, 1.0)
    assert (tracker.phase, tracker.outcome) == ("memorised", None)
    tracker.update_validation(2, 0.0)
    assert tracker.outcome == "memorisation"
    tracker.restart("validation")
    assert tracker.outcome is None
    tracker = OnsetTracker()
    for step in (1, 2):
        tracker.update_validation(step, 1.0)
    assert (tracker.phase, tracker.outcome) == ("generalised", None)


@pytest.mark.parametrize("events", [
    Events({"memorized": 26, "onset": 130, "generalized": 290}, {"train": 0, "validation": 0}),
    Events({"memorized": 150, "onset": None, "generalized": None}, {"train": 150}),
    Events({"memorized": None, "onset": None, "generalized": None}),
])  # fmt: skip
def test_events_come_back_from_what_is_logged(events):
    assert Events.of_values(events.values()) == events


@pytest.mark.parametrize(
    ("value", "share"),
    [(0.0, True), (1.0, True), (0.5, True), (math.nan, True), (1.01, False), (97.0, False), (-0.1, False), (math.inf, False)],
)
def test_shares(value, share):
    assert is_share(value) == share


@pytest.mark.parametrize(
    ("logged", "found"),
    [
        ({"train_acc"}, "train_acc"), ({"train_acc", "train_acc_epoch", "train_acc_step"}, "train_acc_epoch"),
        ({"train/accuracy"}, "train/accuracy"), ({"accuracy/train", "val_acc"}, "accuracy/train"),
        ({"grok/accuracy/train"}, "grok/accuracy/train"), ({"acc", "train_loss"}, None), (set(), None),
    ],
)  # fmt: skip
def test_names_of_accuracies(logged, found):
    assert accuracy_key("train", logged) == found


def test_names_of_the_two_splits_do_not_overlap():
    assert not set(logged_accuracy_names("train")) & set(logged_accuracy_names("validation"))
    assert "val_acc/dataloader_idx_0" in logged_accuracy_names("validation")
    assert accuracy_key("validation", {"mine/accuracy/validation"}, prefix="mine") == "mine/accuracy/validation"


def fed(values):
    tracker, events = OnsetTracker(), {}
    for step, value in values:
        tracker.update_train(step, 0.0)
        for event in tracker.update_validation(step, value):
            events[event] = step
    return tracker, events


def test_the_luck_of_an_untrained_network_is_no_onset():
    tracker, _ = fed([(0, 0.4), (1, 0.4), (2, 0.4), (10, 0.1), (100, 0.1), (400, 0.3), (500, 0.4), (900, 0.95), (1000, 1.0)])
    assert (tracker.onset_step, tracker.grokked_step) == (400, 900)
    # From the first step on it is training.
    assert fed([(1, 0.4), (2, 0.4)])[0].onset_step == 1


def test_comprehension_from_a_lucky_start_has_its_onset_with_generalising():
    tracker, events = fed([(0, 0.4), (1, 0.5), (2, 0.7), (3, 0.95), (4, 1.0), (5, 1.0)])
    assert (tracker.onset_step, tracker.grokked_step) == (3, 3)
    assert list(events) == ["onset", "generalized"]
    assert tracker.outcome == "comprehension"


def test_the_luck_is_remembered_over_a_resume():
    first, _ = fed([(0, 0.4)])
    second = OnsetTracker()
    second.load_state_dict(first.state_dict())
    for step in (1, 2, 3):
        assert not second.update_validation(step, 0.4)
    assert second.onset_step is None
