"""Every public callback, and mixins, from YAML alone in the command lines of both namespaces."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
import yaml
from torch import Tensor

import grok_callbacks
from grok_callbacks import EverySteps, mixins_of
from grok_callbacks.callbacks import __all__ as public_names
from tests._common import NUM_CLASSES
from tests.callbacks._all_monitors import ALL_MONITORS, ALONE, encode, swap
from tests.callbacks.test_namespaces import CLIS, NAMESPACES, data_of, module_of


def pairs() -> Tensor:
    """What the group's product was trained on."""
    return torch.combinations(torch.arange(NUM_CLASSES), with_replacement=True)


#: What these cannot do without, by class name, as YAML says it.
SETTINGS = {
    "CommutativityMonitor": {"swap": "tests.callbacks._all_monitors.swap"},
    "GroupLawMonitor": {
        "table": {"class_path": "grok_callbacks.tasks.group_table", "init_args": {"name": "add", "size": NUM_CLASSES}},
        "train_pairs": {"class_path": "tests.callbacks.test_command_lines.pairs"},
        "inputs": "tests.callbacks._all_monitors.encode",
    },
}

COMMON = {
    "schedule": {"class_path": "grok_callbacks.EverySteps", "init_args": {"n": 2}},
    "probe": {"class_path": "grok_callbacks.Probe", "init_args": {"size": 24}},
    "budget": 1e6,
    "on_error": "raise",
}

MIXINS = """
mixins:
  - class_path: WeightNoiseMixin
    init_args: {delta: 1e-3}
  - class_path: grok_callbacks.SpectralEntropyMixin
    init_args: {beta: 1e-2, parameters: net.*}
"""


@pytest.fixture(scope="module", params=NAMESPACES, ids=lambda namespace: namespace.__name__)
def cli(request, tmp_path_factory):
    """A finished run."""
    namespace, folder = request.param, tmp_path_factory.mktemp("cli")
    callbacks = [
        {"class_path": f"grok_callbacks.{name}", "init_args": {**COMMON, **SETTINGS.get(name, {})}} for name in ALL_MONITORS
    ]
    config = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu", "max_steps": 6, "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
            "enable_checkpointing": False, "callbacks": callbacks,
        },
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "grok.yaml").write_text(MIXINS)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("GROK_CALLBACKS", str(folder / "grok.yaml"))
        patch.setattr("sys.argv", ["program"])
        return CLIS[namespace](
            module_of(namespace), data_of(namespace), args=["fit", f"--config={folder / 'config.yaml'}"],
            save_config_callback=None,
        )  # fmt: skip


@pytest.mark.parametrize("name", ALL_MONITORS)
def test_every_callback_measures_as_it_was_told(cli, name):
    (callback,) = [callback for callback in cli.trainer.callbacks if type(callback).__name__ == name]
    assert callback.schedule == EverySteps(2)
    assert callback.probe.size == 24
    assert callback.budget is not None
    assert callback.on_error == "raise"
    recorder = callback._recorder
    assert callback.label not in recorder.switched_off
    steps = {step for key in recorder.keys_of(callback) for step in callback.history[key].steps}
    # A forecast is silent in so short a run.
    assert steps == ({0, 2, 4, 6} if name in ALONE else set())


def test_none_is_forgotten():
    exported = {name for name in public_names if isinstance(getattr(grok_callbacks, name), type)} - {"Monitor"}
    assert exported == set(ALL_MONITORS)


def test_functions_by_their_path(cli):
    callbacks = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    assert callbacks["CommutativityMonitor"].swap is swap
    assert callbacks["GroupLawMonitor"].inputs is encode
    assert callbacks["GroupLawMonitor"].table.tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_mixins_by_the_environment(cli):
    mixins = mixins_of(cli.model)
    assert list(mixins) == ["spectral_entropy", "weight_noise"]
    assert mixins["spectral_entropy"].beta == 0.01
    assert mixins["weight_noise"]._draws == 6
