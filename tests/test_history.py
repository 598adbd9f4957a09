from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks import History, Series

POINTS = st.lists(st.tuples(st.integers(0, 50), st.floats(allow_nan=False)), max_size=40)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(points=POINTS)
def test_a_series_is_a_sorted_dictionary(points):
    series, reference = Series(), {}
    for step, value in points:
        series.put(step, value)
        reference[step] = value
    assert list(zip(series.steps, series.values, strict=True)) == sorted(reference.items())
    for step in range(-1, 52):
        earlier = [(key, value) for key, value in sorted(reference.items()) if key <= step]
        assert series.until(step) == Series([key for key, _ in earlier], [value for _, value in earlier])
        assert series.at(step) == earlier[-1][1] if earlier else math.isnan(series.at(step))
        assert series.after(step) == [(key, value) for key, value in sorted(reference.items()) if key > step]


def test_keys_keep_the_order_in_which_they_came():
    history = History()
    history.add(3, {"b": 1, "a": torch.tensor(2)})
    history.add(4, {"c": True, "a": 0.5})
    assert list(history) == ["b", "a", "c"]
    assert len(history) == 3
    assert history["a"].values == [2.0, 0.5]
    assert all(isinstance(value, float) for series in history.values() for value in series.values)


def test_merging_replaces_points_at_the_same_step():
    first, second = History(), History()
    first.add(1, {"a": 1.0})
    first.add(2, {"a": 2.0})
    second.add(2, {"a": 20.0, "b": 5.0})
    first.merge(second)
    assert first["a"] == Series([1, 2], [1.0, 20.0])
    assert first["b"] == Series([2], [5.0])


def test_until_holds_nothing_later_and_is_a_copy():
    history = History()
    for step in (1, 5, 9):
        history.add(step, {"a": step})
    history.add(7, {"late": 0})
    cut = history.until(5)
    assert dict(cut) == {"a": Series([1, 5], [1.0, 5.0])}
    cut.add(6, {"a": 6})
    assert history["a"].steps == [1, 5, 9]


def test_of_keeps_the_named_series():
    history = History()
    history.add(1, {"a": 1, "b": 2})
    assert dict(history.of(["b"])) == {"b": Series([1], [2.0])}


def test_state_survives_a_safe_load():
    history = History()
    history.add(0, {"a": float("nan"), "b": float("inf")})
    history.add(10**12, {"a": 0.1})
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    restored = History.from_state_dict(torch.load(file, weights_only=True))
    assert restored["a"].steps == [0, 10**12]
    assert math.isnan(restored["a"].values[0])
    assert restored["a"].values[1] == 0.1  # To the last bit.
    assert restored["b"].values == [float("inf")]
    assert dict(History.from_state_dict(History().state_dict())) == {}


@pytest.mark.parametrize(
    "state",
    [
        None, 3, [], {"a": None}, {"a": {}}, {"a": {"steps": torch.tensor([1])}}, {"a": {"steps": [1], "values": [1.0]}},
        {"a": {"steps": torch.tensor([1, 2]), "values": torch.tensor([1.0])}},
        {"a": {"steps": torch.tensor(1), "values": torch.tensor(1.0)}},
    ],
)  # fmt: skip
def test_refuses_what_is_no_history(state):
    with pytest.raises(ValueError, match="is no history"):
        History.from_state_dict(state)
