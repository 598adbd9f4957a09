"""The Hydra example, run as its user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests._common import events

SCRIPT = Path(__file__).parents[1] / "examples" / "hydra" / "train.py"

pytest.importorskip("hydra")


def run(folder, *overrides):
    command = [
        sys.executable, str(SCRIPT), "+trainer.max_steps=30", "+trainer.enable_progress_bar=false",
        f"hydra.run.dir={folder}/out", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("GROK_CALLBACKS", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return events(folder / "out" / "lightning_logs" / "version_0"), list((folder / "out").rglob("*.ckpt"))


def test_callbacks_from_the_configuration(tmp_path):
    written, checkpoints = run(tmp_path, "callbacks.norm.ord=1", "callbacks.spectral_entropy.schedule.per_decade=3")
    assert [step for step, _ in written["grok/norm"]] == [*range(12), 13, 14, 16, 18, 20, 22, 25, 28]
    assert [key for key in written if "spectral_entropy" in key] == ["grok/spectral_entropy/net.0.weight"]
    assert [step for step, _ in written["grok/spectral_entropy/net.0.weight"]] == [0, 1, 2, 5, 10, 22]
    assert {"grok/sparsity/net.1", "grok/accuracy/validation", "val/accuracy"} <= set(written)
    assert len(checkpoints) == 1


def test_without_callbacks(tmp_path):
    written, checkpoints = run(tmp_path, "callbacks=none")
    assert {"train/accuracy", "val/accuracy"} <= set(written)
    assert not [key for key in written if key.startswith("grok")]
    assert len(checkpoints) == 1
