"""Scripts that know nothing of grok_callbacks, one for each kind of batch, run as they are with the variable set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grok_callbacks import default_callbacks
from tests._common import events

PROJECTS = Path(__file__).parent / "projects"
#: What the standard preset logs in a run that is too short for a forecast.
FAMILIES = {
    "accuracy", "circuit_complexity", "circuit_complexity_std", "effective_rank", "gradient_coherence", "lmn", "loss", "norm",
    "onset", "representation", "robustness", "sparsity", "spectral_entropy", "truncation", "weight_entropy",
}  # fmt: skip


def run(script, setting, folder, *arguments):
    """Start a script in an empty folder, as its user would."""
    environment = {**os.environ, "GROK_CALLBACKS": str(setting), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROJECTS / script), *arguments],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "is switched off" not in done.stderr
    return done


def curves(folder):
    """Every curve of the run's only version, and the families of ours."""
    (version,) = (folder / "lightning_logs").glob("version_*")
    written = events(version)
    return written, {key.split("/")[1] for key in written if key.startswith("grok/")}


def callbacks_in(words):
    return re.findall(r"\b[A-Z]\w*(?:Monitor|Detector|Forecast)\b", words)


def left_out(done):
    """The monitors that were attached and could not look at this project; all of the standard preset are attached."""
    (attached,) = re.findall(r": attached ([\w, ]+)", done.stderr)
    assert callbacks_in(attached) == [type(callback).__name__ for callback in default_callbacks("standard")]
    warned = [line.partition(" left out, ")[0] for line in done.stderr.splitlines() if " left out, " in line]
    return [name for words in warned for name in callbacks_in(words)]


def steps(curve):
    return [step for step, _ in curve]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuples")
    (folder / "grok.yaml").write_text(
        "preset: standard\noptions: {probe: {size: 48}}\nmixins: [{class_path: WeightNoiseMixin, init_args: {delta: 1e-3}}]\n"
    )
    return run("tuples.py", "grok.yaml", folder, "--devices=2"), folder


def test_tuples_on_two_processes(two_processes):
    done, folder = two_processes
    written, families = curves(folder)
    assert families == FAMILIES
    assert left_out(done) == []
    assert steps(written["grok/norm"]) == [*range(12), 13, 14, 16, 18, 20]
    assert "train_loss" in written
    # Each process attaches; the first one says so, once.
    assert done.stderr.count("attached GrokkingDetector") == 1
    assert done.stderr.count("training with WeightNoiseMixin(delta=0.001") == 1
    assert "callbacks used to create the checkpoint" not in done.stderr


def test_checkpoints_hold_the_states(two_processes):
    (path,) = two_processes[1].glob("lightning_logs/version_*/checkpoints/*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert sum("recorder" in state for state in checkpoint["callbacks"].values()) >= 9
    assert checkpoint["grok_callbacks_mixins"]["weight_noise"]["draws"] > 0


def test_dictionaries_of_a_causal_language_model(tmp_path):
    done = run("language_model.py", "standard", tmp_path)
    written, families = curves(tmp_path)
    assert families == FAMILIES
    assert left_out(done) == []
    assert steps(written["grok/loss/train"]) == [*range(12), 13, 14, 16]
    # The loss that was measured is the one that the module takes: of the next token, padding left out.
    first, last = written["grok/loss/train"][0][1], written["train_loss"][0][1]
    assert first == pytest.approx(last, rel=0.1)


def test_what_nobody_could_guess_by_dotted_paths(tmp_path):
    done = run("ratings.py", PROJECTS / "ratings.yaml", tmp_path)
    written, families = curves(tmp_path)
    # A single number for each sample is no class.
    assert families == FAMILIES - {"accuracy", "onset", "circuit_complexity", "circuit_complexity_std"}
    assert all(steps(curve) == [0, 5, 10, 15] for key, curve in written.items() if key.startswith("grok/norm"))
    # Two classes come with one logit each: said once, and the rest goes on.
    assert left_out(done) == ["CircuitComplexityMonitor"]
    assert done.stderr.count("is left out, since the probe does not fit") == 1
    assert "training with SpectralEntropyMixin(beta=0.01" in done.stderr
