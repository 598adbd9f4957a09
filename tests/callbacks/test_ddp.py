"""Two real processes."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests._common import events
from tests.callbacks._ddp import report, run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    """Each rank's results."""
    environment = {**os.environ, "TEST_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.callbacks._ddp", str(folder)],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    files = [folder / f"result{rank}.json" for rank in (0, 1)]
    assert all(file.exists() for file in files), done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What this process alone finds."""
    with contextlib.redirect_stdout(io.StringIO()):
        return report(*run(tmp_path_factory.mktemp("one")))


def comparable(history):
    """NaN is not equal to itself."""
    return {
        key: [steps, ["nan" if math.isnan(value) else value for value in values]] for key, (steps, values) in history.items()
    }


CASES = [
    "all", "per rank", "iterable", "budget", "resumed", "before 0", "before 1", "between 0", "between 1", "after 0", "after 1",
    "analysis 0", "analysis 1", "warned", "hopeless",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_both_ranks_know_the_same(two, case):
    first, second = two[0][case], two[1][case]
    assert comparable(first["history"]) == comparable(second["history"])
    assert first["metrics"] == second["metrics"]
    assert first["switched_off"] == second["switched_off"]
    assert first["steps"] == second["steps"]
    assert first["probe"] == second["probe"]


def test_measures_what_one_process_measures(two, one):
    """At step 0, where the weights are the same; later each rank sees another half of the data."""
    history, alone = two[0]["all"]["history"], one["history"]
    grok = [key for key in alone if key.startswith("grok/") and "onset" not in key]
    assert set(grok) <= set(history)
    assert len(grok) > 20
    for key in grok:
        if key not in ("grok/sum", "grok/ranks") and alone[key][0][0] == 0:
            assert history[key][1][0] == pytest.approx(alone[key][1][0], rel=1e-5, nan_ok=True), key
    assert two[0]["all"]["probe"] == one["probe"]
    assert two[0]["all"]["switched_off"] == []


def test_ranks_sum_and_gather(two):
    history = two[0]["all"]["history"]
    assert set(history["grok/sum"][1]) == {3.0}
    assert set(history["grok/ranks"][1]) == {2.0}


def test_rank_0_holds_where_ranks_differ(two):
    assert set(two[1]["per rank"]["history"]) == {"grok/rank", "grok/key0"}
    assert set(two[1]["per rank"]["history"]["grok/rank"][1]) == {0.0}


def test_iterable_data_give_one_probe(two):
    case = two[1]["iterable"]
    assert case["history"]["grok/logits/size"][1] == [12.0] * len(case["history"]["grok/logits/size"][1])
    assert case["history"]["grok/logits/size"][0][-1] == 5


@pytest.mark.parametrize("part", ["before", "between", "after"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_monitor_that_fails_on_one_rank_is_switched_off_on_both(two, part, rank):
    for seen_from in (0, 1):
        case = two[seen_from][f"{part} {rank}"]
        assert len(case["switched_off"]) == 1
        assert case["switched_off"][0].startswith("Summing")
        assert case["history"]["grok/sum"][0] == [0, 1]
        assert case["history"]["grok/count"][0] == [0, 1, 2, 3, 4]
        assert case["history"]["last/logits/mean"][0] == [0, 1, 2, 3, 4]
        (message,) = [text for text in case["warnings"] if "switched off" in text]
        assert (f"rank {rank} failed {part}" if seen_from == rank else "failed on another rank") in message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_conclusion_that_fails_on_one_rank_is_switched_off_on_both(two, rank):
    for case in (two[0][f"analysis {rank}"], two[1][f"analysis {rank}"]):
        assert len(case["switched_off"]) == 1
        assert case["history"]["grok/conclusion"][0] == [0, 1]
        assert case["history"]["grok/count"][0] == [0, 1, 2, 3, 4]


def test_a_forecast_is_the_same_on_both_ranks_and_said_by_one(two):
    first, second = two[0]["warned"], two[1]["warned"]
    assert first["history"]["grok/forecast/probability"][0][-1] == first["steps"] == 14
    assert len(first["said"]) == 1
    assert first["said"] == second["said"], "the function is called on both"
    assert len(first["printed"]) == 1
    assert second["printed"] == []
    assert not first["should_stop"]


def test_both_ranks_give_a_hopeless_run_up_at_once(two):
    first, second = two[0]["hopeless"], two[1]["hopeless"]
    assert first["steps"] == second["steps"] < 14
    assert first["should_stop"]
    assert second["should_stop"]
    assert [len(case["printed"]) for case in (first, second)] == [1, 0]


def test_rank_0_decides_on_the_budget(two):
    assert two[1]["budget"]["history"]["grok/count"][0] == [0]
    assert two[1]["budget"]["history"]["grok/free"][0] == [0, 1, 2, 3, 4]


def test_a_resumed_run_is_the_uninterrupted_one(two):
    history, whole = two[1]["resumed"]["history"], two[1]["all"]["history"]
    measured = [{key: case[key][0] for key in case if key.startswith("grok/")} for case in (history, whole)]
    assert measured[0] == measured[1]


def test_the_event_file_holds_each_measurement_once(two, folder):
    written = events(folder / "all")
    for key, (steps, values) in two[0]["all"]["history"].items():
        if key.startswith("grok/"):
            assert [step for step, _ in written[key]] == steps
            assert [value for _, value in written[key]] == pytest.approx(values, rel=1e-6, nan_ok=True)
    assert len(list((folder / "all").glob("events*"))) == 1


def test_what_stops_a_run_stops_both_ranks(two):
    first, second = (result["failures"] for result in two)
    assert "KeyError" in first["unreadable"]
    assert first["unreadable"] == second["unreadable"]
    assert "MisconfigurationException" in first["unreadable"]
    assert first["raise"] == "PeerError: The measurement failed on another rank."
    assert second["raise"] == "RuntimeError: rank 1 failed before"
