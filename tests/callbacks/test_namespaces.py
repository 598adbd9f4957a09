"""One class for the Trainers and the command lines of both namespaces."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys

import lightning.pytorch as lightning
import pytest
import pytorch_lightning
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException as LightningMisconfiguration
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_fabric.utilities.exceptions import MisconfigurationException as OtherMisconfiguration
from pytorch_lightning.cli import LightningCLI as OtherCLI
from pytorch_lightning.loggers import TensorBoardLogger as OtherLogger

from grok_callbacks import EverySteps, GrokkingDetector, NormMonitor, Probe, default_callbacks
from grok_callbacks._compat import Callback, MisconfigurationException
from tests._common import events, loader, trainer

NAMESPACES = [lightning, pytorch_lightning]
LOGGERS = {lightning: TensorBoardLogger, pytorch_lightning: OtherLogger}
CLIS = {lightning: LightningCLI, pytorch_lightning: OtherCLI}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])


def module_of(namespace):
    class Module(namespace.LightningModule):
        def __init__(self, width: int = 4):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module


def data_of(namespace):
    class Data(namespace.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(8)

    return Data


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.__name__)
def test_trainers(namespace, tmp_path):
    callbacks = default_callbacks("economy")
    assert all(isinstance(callback, namespace.Callback) for callback in callbacks)
    logger = LOGGERS[namespace](tmp_path)
    best = namespace.callbacks.ModelCheckpoint(tmp_path, monitor="grok/norm")
    stopping = namespace.callbacks.EarlyStopping("grok/norm", patience=99)
    made = trainer([*callbacks, best, stopping], namespace, logger=logger, enable_checkpointing=True, max_epochs=2)
    with contextlib.redirect_stdout(io.StringIO()):
        made.fit(module_of(namespace)(), loader(), loader(8))
    assert [step for step, _ in events(logger.log_dir)["grok/norm"]] == list(range(9))
    assert "val_acc" in callbacks[0].history
    state = torch.load(best.best_model_path, weights_only=True)["callbacks"]
    assert {callback.state_key for callback in callbacks} <= set(state)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.__name__)
def test_resuming(namespace, tmp_path):
    made = trainer(default_callbacks("economy"), namespace)
    module = module_of(namespace)()
    with contextlib.redirect_stdout(io.StringIO()):
        made.fit(module, loader(), loader(8))
        made.save_checkpoint(tmp_path / "x.ckpt")
        resumed = default_callbacks("economy")
        trainer(resumed, namespace, max_steps=12).fit(module, loader(), loader(8), ckpt_path=tmp_path / "x.ckpt")
    assert resumed[0].history["grok/norm"].steps == list(range(12))


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.__name__)
@pytest.mark.parametrize("exception", [LightningMisconfiguration, OtherMisconfiguration, ValueError, MisconfigurationException])
def test_exceptions_are_caught_by_either_namespace(namespace, exception):
    with pytest.raises(exception, match="matches nothing"):
        trainer([NormMonitor("nothing")], namespace).fit(module_of(namespace)(), loader())
    with pytest.raises(exception, match="`mode='min'`"):
        GrokkingDetector(mode="min")


CONFIG = {
    "seed_everything": 3,
    "trainer": {
        "accelerator": "cpu", "max_steps": 6, "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
        "enable_checkpointing": False,
        "callbacks": [
            {
                "class_path": "grok_callbacks.NormMonitor",
                "init_args": {
                    "parameters": ["net.*"], "ord": 1.0, "prefix": "mine",
                    "schedule": {"class_path": "grok_callbacks.EverySteps", "init_args": {"n": 2}},
                    "probe": {"class_path": "grok_callbacks.Probe", "init_args": {"size": 7, "seed": 3}},
                },
            },
            {"class_path": "grok_callbacks.callbacks.GrokkingDetector", "init_args": {"patience": 3, "budget": 0.5}},
            {
                "class_path": "grok_callbacks.WeightEntropyMonitor",
                "init_args": {"schedule": {"class_path": "grok_callbacks.AtValidation"}},
            },
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.__name__)
def test_command_lines(namespace, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    with contextlib.redirect_stdout(io.StringIO()):
        cli = CLIS[namespace](
            module_of(namespace), data_of(namespace), args=["fit", f"--config={path}"], save_config_callback=None
        )
    norm, detector, entropy = cli.trainer.callbacks[:3]
    assert norm.schedule == EverySteps(2)
    # Settings that are the defaults are no part of the label, though a command line gives them all.
    assert detector.label == "GrokkingDetector(patience=3, budget=0.5)"
    assert norm.probe.size == 7
    assert norm.history["mine/norm"].steps == [0, 2, 4, 6]
    assert detector.tracker.thresholds.patience == 3
    assert detector.budget.share == 0.5
    assert entropy.history["grok/weight_entropy/net.0.weight"].steps == [0, 4]


def test_a_probe_by_its_settings_alone(tmp_path):
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["trainer"]["callbacks"] = [{"class_path": "grok_callbacks.NormMonitor", "init_args": {"probe": {"size": 5}}}]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = LightningCLI(module_of(lightning), data_of(lightning), args=["fit", f"--config={path}"], save_config_callback=None)
    assert cli.trainer.callbacks[0].probe == Probe(size=5)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.__name__)
def test_command_lines_refuse_settings_that_do_not_exist(namespace, tmp_path, capsys):
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["trainer"]["callbacks"][0]["init_args"]["colour"] = "red"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        CLIS[namespace](module_of(namespace), data_of(namespace), args=["fit", f"--config={path}"])
    assert "colour" in capsys.readouterr().err


def test_callbacks_from_the_command_lines_arguments(tmp_path):
    arguments = [
        "fit", "--seed_everything=1", "--trainer.accelerator=cpu", "--trainer.max_steps=3", "--trainer.logger=false",
        "--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false", "--trainer.enable_model_summary=false",
        "--trainer.callbacks+=grok_callbacks.NormMonitor", "--trainer.callbacks.parameters=net.0.*",
    ]  # fmt: skip
    cli = LightningCLI(module_of(lightning), data_of(lightning), args=arguments, save_config_callback=None)
    assert set(cli.trainer.callbacks[0].history) == {"grok/norm", "grok/norm/net.0.weight", "grok/norm/net.0.bias"}


def test_works_where_pytorch_lightning_is_not_installed(monkeypatch):
    spec = importlib.util.spec_from_file_location("alone", sys.modules[Callback.__module__].__file__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.Callback.__bases__ == (lightning.Callback,)
    assert alone.MisconfigurationException.__bases__ == (LightningMisconfiguration, ValueError)


def test_the_base_has_both_bases():
    assert Callback.__mro__[1:3] == (lightning.Callback, pytorch_lightning.Callback)
    assert repr(Probe()) == "Probe(seed=0)"
