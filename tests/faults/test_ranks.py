"""One of two ranks dies or fails: the other ends as under Lightning alone, or goes on; nobody waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults._ranks", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=folder,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "outcome.json").read_text())


def test_two_ranks_finish(outcome):
    for rank in outcome["nobody dies"]:
        assert rank == {"end": "finished", "losses": 6, "steps": list(range(7)), "said": []}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["step", "measurement"])
def test_when_a_rank_dies_the_other_ends_as_under_lightning_alone(outcome, where, rank):
    plain, ours = outcome[f"plain dies {rank}"], outcome[f"{where} dies {rank}"]
    assert plain[rank]["end"] == ours[rank]["end"] == "killed"
    assert plain[1 - rank]["end"] not in ("hung", "killed", "finished")
    assert ours[1 - rank]["end"] == plain[1 - rank]["end"]
    assert ours[1 - rank]["losses"] in (3, 4)
    assert not ours[1 - rank]["said"], "a death is no failure of a monitor"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_measurement_that_fails_on_one_rank_is_given_up_on_both(outcome, rank):
    for number, seen in enumerate(outcome[f"measurement fails {rank}"]):
        assert (seen["end"], seen["losses"], seen["steps"]) == ("finished", 6, list(range(7)))
        (said,) = seen["said"]
        assert said.startswith("Summing")
        assert ("ZeroDivisionError: on one rank" if number == rank else "failed on another rank") in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_presets_monitor_that_cannot_look_on_one_rank_is_left_out_on_both(outcome, rank):
    for seen in outcome[f"bind fails {rank}"]:
        assert (seen["end"], seen["losses"], seen["steps"]) == ("finished", 6, list(range(7)))
        (said,) = seen["said"]
        assert said.startswith("Choosy")
        assert "is left out" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_monitor_that_refuses_the_model_on_one_rank_stops_both(outcome, rank):
    seen = outcome[f"bind refuses {rank}"]
    assert seen[rank]["end"] == "MisconfigurationException"
    assert seen[1 - rank]["end"] == "PeerError"
    assert [one["losses"] for one in seen] == [0, 0]
