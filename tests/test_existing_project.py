"""What the README promises to somebody who has a project: the example, and every Python snippet, really run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import torch

import grok_callbacks
from tests._common import Plain, events, loader, samples

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "existing_project"


def test_the_example_runs_with_its_configuration(tmp_path):
    command = [
        sys.executable, str(EXAMPLE / "train.py"), "fit", f"--config={EXAMPLE / 'monitors.yaml'}", "--trainer.max_epochs=3",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=5",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("GROK_CALLBACKS", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    written = events(tmp_path / "lightning_logs" / "version_0")
    assert [step for step, _ in written["grok/norm"]] == [*range(12), 13, 14, 16, 18]
    # Fewer steps a decade, and of the body alone, as its YAML says.
    spectral = [key for key in written if key.startswith("grok/spectral_entropy/")]
    assert sorted(spectral) == ["grok/spectral_entropy/body.0.weight", "grok/spectral_entropy/body.3.weight"]
    assert len(written[spectral[0]]) < len(written["grok/norm"])
    assert "grok/accuracy/validation" in written
    assert "grok_callbacks" not in (EXAMPLE / "train.py").read_text().split('"""', 2)[2]


def snippets():
    text = (ROOT / "README.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


class Data(lightning.pytorch.LightningDataModule):
    """The reader's own."""

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(8)


def train(model, batch):
    """The reader's own step."""
    loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)
            parameter.grad = None


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("number", range(len(snippets())))
def test_the_readmes_snippets_run_as_they_are(number, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = {"accelerator": "cpu", "max_steps": 6, "enable_progress_bar": False, "enable_model_summary": False}
    made = []

    class Trainer(lightning.pytorch.Trainer):
        def __init__(self, **kwargs):
            super().__init__(**{**settings, **kwargs})
            made.append(self)

    monkeypatch.setattr(lightning.pytorch, "Trainer", Trainer)
    names = {
        "model": Plain(logs=True), "datamodule": Data(), "train_set": samples(), "val_set": samples(8, 1), "loader": loader(),
        "train": train,
    }  # fmt: skip
    exec(compile(snippets()[number], f"README.md, snippet {number}", "exec"), names)
    if "recorder" in names:
        assert "grok/norm" in names["recorder"].history
    elif made:
        assert "grok/norm" in made[0].callback_metrics
    else:
        assert list(grok_callbacks.mixins_of(names["model"]))
