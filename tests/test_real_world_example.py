"""How the reproduction on real images reads its runs, against scipy, regression and curves made by hand."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

SCRIPT = Path(__file__).parents[1] / "examples" / "reproduce_real_world.py"
GENERATOR = np.random.default_rng(0)


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="reproduce_real_world"))


@pytest.mark.parametrize("rounded", [False, True])
def test_spearman(script, rounded):
    x, y = GENERATOR.normal(size=(2, 30))
    if rounded:  # Ties.
        x, y = x.round(), y.round()
    assert script.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert script.spearman(x, -np.exp(x)) == pytest.approx(-1)


def test_spearman_of_what_does_not_vary_or_is_no_number(script):
    x = np.arange(5.0)
    assert math.isnan(script.spearman(x, np.ones(5)))
    assert math.isnan(script.spearman(x, np.array([1, 2, math.nan, 3, 4])))


def test_partial_spearman_is_the_correlation_of_residuals(script):
    given = GENERATOR.normal(size=40)
    x, y = given + GENERATOR.normal(size=40), given - GENERATOR.normal(size=40)
    design = np.stack([np.ones(40), stats.rankdata(given)], 1)
    residuals = [
        ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0] for ranks in (stats.rankdata(x), stats.rankdata(y))
    ]
    assert script.partial_spearman(x, y, given) == pytest.approx(np.corrcoef(*residuals)[0, 1], abs=1e-12)
    assert math.isnan(script.partial_spearman(x, y, x))


class TestMarks:
    STEPS = np.arange(0, 2100, 100)

    def marked(self, script, train, test):
        return tuple(script.marks(self.STEPS, np.array(train), np.array(test)))

    def test_grokking(self, script):
        # Memorised for one measurement at 2, lastingly from 4; test accuracy past 95% of its plateau once at 9, then from 12.
        train = [0.1, 0.5, 0.99, 0.9] + [1.0] * 17
        test = [0.1] * 9 + [0.9, 0.5, 0.5] + [0.9] * 9
        assert self.marked(script, train, test) == (4, 12)

    def test_too_little_to_call_it_grokking(self, script):
        assert self.marked(script, [0.1] + [1.0] * 20, [0.85] * 10 + [0.94] * 11) == (1, None)
        assert self.marked(script, [0.1] + [1.0] * 20, [0.85] * 10 + [0.96] * 11) == (1, 10)

    def test_never_memorised(self, script):
        assert self.marked(script, [0.98] * 21, [0.9] * 21) == (None, None)


def test_half_way(script):
    steps = np.arange(0, 1100, 100)
    falling = np.array([9, 8, 8, 7, 4.9, 4, 3, 2, 2, 2, 2.0])
    assert script.half_way(steps, falling, memorised=1) == 400  # from 8 to 2, past 5 at index 4
    assert script.half_way(steps, -falling, memorised=1) == 400
    assert script.half_way(steps, falling, memorised=4) == 600
    assert math.isnan(script.half_way(steps, np.ones(11), memorised=1))


def test_measured_steps(script):
    steps = script.steps_to_measure(6000)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 6000)
    assert 100 <= len(steps) <= 140


def made_by_hand(rises, seed):
    """A run in which everything falls, or rises, with a little noise."""
    steps = list(range(0, 2100, 100))
    drift = np.linspace(1, 2, 21) if rises else np.linspace(2, 1, 21)
    series = {"train_accuracy": [0.1] + [1.0] * 20, "test_accuracy": [0.1] * 10 + [0.9] * 11}
    return steps, series, (drift + 0.001 * np.random.default_rng(seed).normal(size=21)).tolist()


def test_verdict_tells_what_goes_with_the_norm_from_what_goes_with_generalisation(script, tmp_path):
    norm_rises = {"mse": False, "growing_norm": True, "random_labels": False, "reward_only": True}
    other_rises = {"mse": True, "growing_norm": True, "random_labels": False, "reward_only": False}
    for name, rises in norm_rises.items():
        for seed in range(2):
            steps, series, norm = made_by_hand(rises, seed)
            *_, other = made_by_hand(other_rises[name], seed + 10)
            series |= dict.fromkeys(script.MEASURES, norm)
            series["grok/sparsity/mlp.1"] = other
            result = {"variant": name, "seed": seed, "steps": steps, "series": series, "seconds": 1.0}
            (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(result))
    runs = script.load(tmp_path)
    assert script.verdict(runs, "grok/norm") == "the norm"
    assert script.verdict(runs, "grok/sparsity/mlp.1") == "generalisation"
    script.report(tmp_path, tmp_path / "docs")
    text = (tmp_path / "docs" / "real_world.md").read_text()
    assert "| `growing_norm` | 2 | 100 (100 to 100) |" in text
    assert "nan" not in text


def test_runs_are_resumed_and_reported_before_they_have_memorised(tmp_path, monkeypatch, capsys):
    def call(*options):
        monkeypatch.setattr(sys, "argv", ["reproduce_real_world.py", "--output", str(tmp_path), *options])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    options = ["--steps", "3", "--seeds", "0", "--reward", "0.01", "--variants", "mse", "growing_norm"]
    call(*options)
    results = {name: json.loads((tmp_path / f"{name}-0.json").read_text()) for name in ("mse", "growing_norm")}
    for name, result in results.items():
        assert result["steps"] == [0, 1, 2, 3]
        norm = result["series"]["grok/norm"]
        assert norm[0] == pytest.approx(94, rel=0.02)
        assert (norm[-1] > norm[0]) == (name == "growing_norm")
        assert all(len(values) == 4 for values in result["series"].values())
    (tmp_path / "mse-0.json").write_text(json.dumps(results["mse"] | {"kept": True}))
    call(*options)
    assert json.loads((tmp_path / "mse-0.json").read_text())["kept"]
    call("--report", str(tmp_path / "docs"))
    assert "0 of 1" in (tmp_path / "docs" / "real_world.md").read_text()
