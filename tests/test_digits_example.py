"""The digits example in a few steps, on the digits and on MNIST's files; and the start of the paper's experiment."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from grok_callbacks import NormMonitor, Recorder, WeightEntropyMonitor
from grok_callbacks.tasks import MLPClassifier
from tests._common import events
from tests.tasks.test_idx import write

SCRIPT = Path(__file__).parents[1] / "examples" / "digits.py"


@pytest.mark.parametrize(
    "options", [[], ["--loss", "cross_entropy"], ["--norm-penalty", "-0.01"], ["--data", "--train-size", "9"]]
)
# Ratios within and between classes are not defined for one sample a class, which is what the small files hold.
@pytest.mark.filterwarnings("ignore:RepresentationMonitor.*said once")
def test_runs(tmp_path, monkeypatch, capsys, options):
    if "--data" in options:
        options = [options[0], str(write(tmp_path)), *options[1:]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["digits.py", "--steps", "3", *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    curves = events(tmp_path / "lightning_logs" / "digits" / "version_0")
    expected = ["grok/norm", "grok/sparsity/mlp.1", "grok/sparsity/mlp.3", "grok/weight_entropy/mlp.2.weight"]
    for key in [*expected, "grok/circuit_complexity/mlp.2", "grok/circuit_complexity_std/mlp.4"]:
        assert [step for step, _ in curves[key]] == [0, 1, 2, 3]
        assert all(math.isfinite(value) for _, value in curves[key])
    norms = [value for _, value in curves["grok/norm"]]
    assert (norms[-1] > norms[0]) == ("--norm-penalty" in options)


@pytest.mark.parametrize("seed", range(5))
def test_start_values_of_the_paper(seed):
    torch.manual_seed(seed)
    model = MLPClassifier(784, width=200, init_scale=8.0)
    values = Recorder(model, [NormMonitor(), WeightEntropyMonitor()]).record(step=0)
    assert values["grok/norm"] == pytest.approx(93.7, rel=0.005)
    assert values["grok/weight_entropy/mlp.2.weight"] == pytest.approx(12_100, rel=0.005)
    # Each weight is uniform on (-a, a) with a = 8 / sqrt(inputs), so its mean square is a^2 / 3; biases share their layer's a.
    squares = sum(64 / n * (n + 1) * m / 3 for n, m in ((784, 200), (200, 200), (200, 10)))
    assert values["grok/norm"] == pytest.approx(math.sqrt(squares), rel=0.005)
    bound = 8 / math.sqrt(200)
    entropy = 200 * 200 * (bound / 4 - bound / 2 * math.log(bound))
    assert values["grok/weight_entropy/mlp.2.weight"] == pytest.approx(entropy, rel=0.005)
