from __future__ import annotations

import itertools
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks import AtValidation, EveryEpoch, EverySteps, LogSpaced

SCHEDULES = [
    EverySteps(1),
    EverySteps(7),
    LogSpaced(),
    LogSpaced(1),
    LogSpaced(10),
    EveryEpoch(),
    EveryEpoch(3),
    AtValidation(),
]


def steps_of(schedule, end):
    step, steps = -1, []
    while (step := schedule.next_step(step)) is not None and step <= end:
        steps.append(step)
    return steps


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(after=st.integers(-1, 10**9))
def test_is_a_pure_increasing_function(schedule, after):
    point = schedule.next_step(after)
    assert point == schedule.next_step(after)
    assert point is None or point > after


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_every_run_begins_with_a_measurement_at_step_0(schedule):
    assert schedule.next_step(-1) == 0


@pytest.mark.parametrize("per_decade", [1, 3, 10, 20, 47])
def test_log_spaced_is_the_rounded_grid(per_decade):
    end = 10**5
    grid = {round(10 ** (k / per_decade)) for k in range(6 * per_decade)}
    assert steps_of(LogSpaced(per_decade), end) == sorted({0, 1, *(point for point in grid if point <= end)})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(start=st.integers(0, 10**7), per_decade=st.integers(1, 30))
def test_log_spaced_gives_the_same_grid_from_wherever_it_is_asked(start, per_decade):
    """A run that is resumed between two points goes on with the points of the uninterrupted run."""
    schedule = LogSpaced(per_decade)
    point = schedule.next_step(start)
    assert schedule.next_step(point - 1) == point
    assert all(schedule.next_step(step) == point for step in {start, (start + point - 1) // 2, point - 1} if step >= start)


def test_default_measures_at_least_ten_times_in_every_decade():
    steps = steps_of(LogSpaced(), 10**7)
    for decade in range(1, 7):
        assert sum(10**decade <= step < 10 ** (decade + 1) for step in steps) >= 10
    assert steps[:10] == list(range(10))  # The first decade has no more steps than that.


def test_log_spaced_points_are_evenly_spaced_on_the_log_axis():
    steps = [step for step in steps_of(LogSpaced(20), 10**8) if step >= 1000]
    ratios = [later / earlier for earlier, later in itertools.pairwise(steps)]
    assert max(abs(math.log10(ratio) - 1 / 20) for ratio in ratios) < 1e-3


def test_log_spaced_stays_cheap_on_long_runs():
    assert len(steps_of(LogSpaced(20), 10**9)) <= 1 + 20 * 9 + 1


def test_every_steps():
    assert steps_of(EverySteps(4), 13) == [0, 4, 8, 12]
    assert steps_of(EverySteps(1), 3) == [0, 1, 2, 3]


def test_every_epoch_counts_from_the_first_epoch_and_only_epochs():
    schedule = EveryEpoch(3)
    assert [epoch for epoch in range(9) if schedule.at("epoch", epoch)] == [2, 5, 8]
    assert not any(schedule.at("validation", epoch) for epoch in range(9))
    assert steps_of(schedule, 10**6) == [0]


def test_at_validation_and_nothing_else():
    assert AtValidation().at("validation", 5)
    assert not AtValidation().at("epoch", 5)
    assert steps_of(AtValidation(), 10**6) == [0]


@pytest.mark.parametrize("schedule", [EverySteps(2), LogSpaced()])
def test_step_schedules_ignore_events(schedule):
    assert not schedule.at("epoch", 0)
    assert not schedule.at("validation", 0)


@pytest.mark.parametrize("make", [EverySteps, LogSpaced, EveryEpoch])
@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "3", None, float("nan")])
def test_refuses_what_is_no_positive_whole_number(make, bad):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        make(bad)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_pickles_and_compares(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
