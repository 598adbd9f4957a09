"""What the environment variable attaches to Trainers that know nothing of it, and what it leaves alone."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning.pytorch as lightning
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from pytorch_lightning.demos.boring_classes import BoringModel as OtherModel

from grok_callbacks import (
    EverySteps,
    LogSpaced,
    Mixin,
    Monitor,
    NormMonitor,
    NormPenaltyMixin,
    SpectralEntropyMixin,
    SpectralEntropyMonitor,
    WeightNoiseMixin,
    mixins_of,
    with_mixins,
)
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.callbacks._zero_touch import ZeroTouch
from grok_callbacks.callbacks.presets import PRESETS, preset_monitors
from tests._common import Classifier, Counting, Plain, events, fit, loader, same_weights, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
]

BORING = {lightning: BoringModel, pytorch_lightning: OtherModel}
ECONOMY = ["GrokkingDetector", "NormMonitor", "SpectralEntropyMonitor", "WeightEntropyMonitor"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def economy(monkeypatch):
    monkeypatch.setenv("GROK_CALLBACKS", "economy")


@pytest.fixture
def configure(monkeypatch, tmp_path):
    """Have the variable name a file with this text."""

    def write(text):
        path = tmp_path / "grok.yaml"
        path.write_text(textwrap.dedent(text))
        monkeypatch.setenv("GROK_CALLBACKS", str(path))

    return write


def names(made):
    return [type(callback).__name__ for callback in made.callbacks]


def monitors(made):
    return [callback for callback in made.callbacks if isinstance(callback, Monitor)]


def only(made, cls):
    (found,) = [callback for callback in made.callbacks if isinstance(callback, cls)]
    return found


# Unset.


def test_unset_nothing_is_attached_and_nothing_loaded():
    code = """
    import json, os, sys, time
    os.environ.pop("GROK_CALLBACKS", None)
    from importlib.metadata import entry_points
    found = {}
    for group in ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory"):
        before = set(sys.modules)
        (point,) = entry_points(group=group, name="grok_callbacks")
        found[group] = [point.load()(), sorted(name.split(".")[0] for name in set(sys.modules) - before)]
    print(json.dumps(found))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    for callbacks, loaded in json.loads(done.stdout).values():
        assert callbacks == []
        # A module of our own, and what it takes to read entry points: nothing of torch, Lightning, matplotlib nor torchmetrics.
        heavy = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "matplotlib", "numpy", "tensorboard", "yaml"}
        assert heavy.isdisjoint(loaded)


@pytest.mark.parametrize("value", [None, "", " "])
def test_unset_or_empty_trainers_are_as_they_were(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("GROK_CALLBACKS", raising=False)
    else:
        monkeypatch.setenv("GROK_CALLBACKS", value)
    assert trainer().callbacks == []


# Presets.


@pytest.mark.parametrize("namespace", [lightning, pytorch_lightning], ids=lambda namespace: namespace.__name__)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_attached_to_every_trainer(monkeypatch, namespace, preset):
    monkeypatch.setenv("GROK_CALLBACKS", preset)
    for _ in range(2):
        made = trainer(namespace=namespace)
        module = BORING[namespace]()
        assert names(made) == ["ZeroTouch"]
        made.validate(module, verbose=False)
        assert [type(callback) for callback in monitors(made)] == preset_monitors(preset)
        assert all(monitor.optional for monitor in monitors(made))


@pytest.mark.usefixtures("economy")
def test_training_is_the_same_and_the_curves_are_in_the_event_file(monkeypatch, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    module, made = fit(module=Classifier(logs=True), validation=loader(8), logger=logger, max_steps=20)
    monkeypatch.delenv("GROK_CALLBACKS")
    torch.manual_seed(0)
    plain, without = fit(module=Classifier(logs=True), validation=loader(8), max_steps=20)
    assert without.callbacks == []
    assert module.losses == plain.losses
    assert same_weights(module, plain)
    written = events(logger.log_dir)
    assert [step for step, _ in written["grok/norm"]] == only(made, NormMonitor).history["grok/norm"].steps != []
    assert {"grok/accuracy/train", "grok/spectral_entropy/net.0.weight", "grok/weight_entropy/net.0.weight"} <= set(written)


@pytest.mark.usefixtures("economy")
def test_the_scripts_own_callbacks_stay_and_nothing_is_attached_twice():
    mine, other = NormMonitor(ord=1.0, prefix="mine"), Counting()
    _, made = fit([mine, other])
    assert names(made) == ["NormMonitor", "Counting", "ZeroTouch", *(name for name in ECONOMY if name != "NormMonitor")]
    assert made.callbacks[0] is mine
    assert set(mine.history) >= {"mine/norm", "grok/count", "grok/effective_rank/net.0.weight"}
    assert "grok/norm" not in mine.history
    assert not mine.optional


@pytest.mark.usefixtures("economy")
def test_a_subclass_of_the_scripts_stands_for_its_base():
    class Longer(NormMonitor):
        pass

    _, made = fit([Longer()])
    assert [name for name in names(made) if name != "ZeroTouch"] == ["Longer", *(n for n in ECONOMY if n != "NormMonitor")]


@pytest.mark.usefixtures("economy")
def test_a_callback_that_saves_under_the_same_name_keeps_its_name():
    Foreign = type("NormMonitor", (lightning.Callback,), {"state_dict": lambda self: {"theirs": 1}})
    _, made = fit([Foreign()])
    assert names(made).count("NormMonitor") == 1
    assert type(made.callbacks[0]) is Foreign


@pytest.mark.usefixtures("economy")
def test_callbacks_of_the_module_stay(tmp_path):
    class Configured(Plain):
        def configure_callbacks(self):
            return [NormMonitor(prefix="module"), ModelCheckpoint(tmp_path)]

    module = Configured()
    made = trainer(enable_checkpointing=True)
    made.fit(module, loader())
    expected = ["ZeroTouch", *(name for name in ECONOMY if name != "NormMonitor"), "NormMonitor", "ModelCheckpoint"]
    assert names(made) == expected
    made.fit_loop.epoch_loop.max_steps = 12
    made.fit(module, loader())
    assert names(made) == expected
    assert only(made, NormMonitor).history["module/norm"].steps[-1] == 11


@pytest.mark.usefixtures("economy")
def test_checkpoints_come_last_and_read_the_measurements(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="grok/norm")
    stopping = EarlyStopping("grok/norm", patience=99)
    _, made = fit([best, stopping], max_epochs=2, enable_checkpointing=True, validation=loader(8))
    assert names(made) == ["EarlyStopping", "ZeroTouch", *ECONOMY, "ModelCheckpoint"]
    state = torch.load(best.best_model_path, weights_only=True)["callbacks"]
    assert {callback.state_key for callback in monitors(made)} <= set(state)
    assert not any("ZeroTouch" in key for key in state)


@pytest.mark.usefixtures("economy")
def test_a_trainer_that_fits_again_and_others_that_share_its_list():
    shared = [Counting()]
    made = lightning.Trainer(
        callbacks=shared, accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    for _ in range(2):
        made.fit(Plain(), loader())
    assert names(made) == ["Counting", "ZeroTouch", *ECONOMY]
    # Lightning has appended to the script's own list.
    again = trainer(shared)
    again.fit(Plain(), loader())
    assert names(again) == ["Counting", "ZeroTouch", "ZeroTouch", *ECONOMY]
    assert only(again, NormMonitor) is not only(made, NormMonitor)
    assert only(again, NormMonitor).history["grok/norm"].steps == list(range(9))


@pytest.mark.usefixtures("economy")
@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": True, "max_steps": ..., "enable_checkpointing": ..., "logger": ...},
        {"barebones": True, "logger": ..., "enable_checkpointing": ..., "enable_progress_bar": ..., "enable_model_summary": ...}
        | {"log_every_n_steps": ...},
    ],
    ids=["fast_dev_run", "barebones"],
)
def test_trainers_of_a_special_kind(settings):
    _, made = fit(validation=loader(8), **settings)
    assert only(made, NormMonitor).history["grok/norm"].steps[0] == 0


@pytest.mark.usefixtures("economy")
def test_a_trainer_that_never_fits():
    class Predicting(Plain):
        test_step = Plain.validation_step

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

    made = trainer()
    made.validate(Predicting(), loader(8), verbose=False)
    made.test(Predicting(), loader(8), verbose=False)
    assert len(made.predict(Predicting(), loader(8))) == 1
    assert names(made) == ["ZeroTouch", *ECONOMY]
    assert len(only(made, NormMonitor).history) == 0


@pytest.mark.usefixtures("economy")
def test_a_resumed_run_measures_what_the_uninterrupted_one_does(tmp_path):
    _, whole = fit(max_steps=12, validation=loader(8))
    torch.manual_seed(0)
    module, first = fit(max_steps=8, validation=loader(8))
    first.save_checkpoint(tmp_path / "x.ckpt")
    _, resumed = fit(max_steps=12, validation=loader(8), ckpt_path=tmp_path / "x.ckpt")
    expected, found = only(whole, NormMonitor).history, only(resumed, NormMonitor).history
    assert {key: (series.steps, series.values) for key, series in found.items()} == {
        key: (series.steps, series.values) for key, series in expected.items()
    }
    # Evaluating a checkpoint elsewhere finds everybody whose state is in it: Lightning warns otherwise.
    trainer().validate(module, loader(8), ckpt_path=tmp_path / "x.ckpt", verbose=False)


@pytest.mark.usefixtures("economy")
def test_what_is_attached_travels_to_spawned_processes():
    made = trainer()
    copy = pickle.loads(pickle.dumps(made.callbacks[0]))
    again = trainer([copy])
    again.fit(Plain(), loader())
    assert names(again) == ["ZeroTouch", "ZeroTouch", *ECONOMY]


def test_a_preset_leaves_out_what_does_not_apply(monkeypatch):
    monkeypatch.setenv("GROK_CALLBACKS", "full")

    class Sum(lightning.LightningModule):
        """Nothing but a vector, and a forward that needs more than a batch gives."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(6))

        def forward(self, x, scale):
            return scale * x @ self.weight

        def training_step(self, batch, batch_idx):
            return self(batch[0], 2.0).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.warns(UserWarning, match=" left out, ") as caught:
        _, made = fit(module=Sum(), max_steps=2)
    said = [str(warning.message).partition(" left out, ") for warning in caught if " left out, " in str(warning.message)]
    # One for each reason, and each monitor in one of them.
    assert len(said) == len({reason for _, _, reason in said})
    assert any(reason.startswith("since the probe does not fit") and "`forward`" in reason for _, _, reason in said)
    named = [name for names, _, _ in said for name in names.rpartition(" ")[0].split(", ")]
    assert len(named) == len(set(named)) > len(said)
    assert only(made, NormMonitor).history["grok/norm"].steps == [0, 1, 2]


# Configurations.


def test_a_configuration_sets_everything(configure):
    configure("""
        preset: economy
        options:
          schedule: {class_path: LogSpaced, init_args: {per_decade: 3}}
          probe: {size: 7, unpack: tests.test_zero_touch.reversed_batch}
          budget: 4e-2
          prefix: mine
          on_error: raise
        callbacks:
          - class_path: grok_callbacks.NormMonitor
            init_args: {parameters: "net.*", ord: 1e+0, schedule: AtValidation, budget: null}
          - class_path: lightning.pytorch.callbacks.Timer
        """)
    _, made = fit(validation=loader(8))
    assert names(made)[1:] == ["GrokkingDetector", "SpectralEntropyMonitor", "WeightEntropyMonitor", "NormMonitor", "Timer"]
    norm, spectral = only(made, NormMonitor), only(made, SpectralEntropyMonitor)
    assert spectral.schedule == LogSpaced(3)
    assert repr(spectral.budget) == "Budget(0.04)"
    assert spectral.budget is made.callbacks[1].budget
    assert spectral.optional
    assert spectral.on_error == "raise"
    assert spectral.probe.size == 7
    assert spectral.probe.unpack is reversed_batch
    assert norm.probe is spectral.probe
    assert norm.budget is None
    assert not norm.optional
    assert norm.history["mine/norm"].steps == [0, 4, 8]
    assert made.callbacks[-1].start_time() is not None


def reversed_batch(batch):
    return batch[0], batch[1].flip(0)


def test_callbacks_alone(configure):
    configure("""
        callbacks: [NormMonitor, {class_path: NormMonitor, init_args: {prefix: other, ord: .inf}}, tests._common.Counting]
        """)
    _, made = fit()
    assert names(made) == ["ZeroTouch", "NormMonitor", "NormMonitor", "Counting"]
    assert made.callbacks[2].metric is not None
    assert {"grok/norm", "other/norm", "grok/count"} <= set(made.callbacks[1].history)
    # The script's own monitor stands for all of its class.
    _, made = fit([NormMonitor()])
    assert names(made) == ["NormMonitor", "ZeroTouch", "Counting"]


def test_a_listed_callback_that_cannot_work_is_an_error(configure):
    configure("callbacks: [{class_path: NormMonitor, init_args: {parameters: nothing}}]")
    with pytest.raises(MisconfigurationException, match="matches nothing"):
        fit()


def test_mixins_are_grafted_at_setup(configure, tmp_path):
    configure("""
        callbacks: [{class_path: NormMonitor, init_args: {schedule: {class_path: EverySteps, init_args: {n: 4}}}}]
        mixins:
          - class_path: SpectralEntropyMixin
            init_args: {beta: 1e-1}
          - class_path: grok_callbacks.WeightNoiseMixin
            init_args: {delta: 1e-2, seed: 3}
          - {class_path: NormPenaltyMixin, init_args: {weight: -1e-3}}
          - {class_path: NormPenaltyMixin, init_args: {weight: 1e-3, parameters: "*.bias"}}
        """)
    logger = TensorBoardLogger(tmp_path)
    module = Plain()
    made = trainer(logger=logger, log_every_n_steps=1)
    made.fit(module, loader())
    assert list(mixins_of(module)) == ["norm", "norm/1", "spectral_entropy", "weight_noise"]
    assert {"grok/penalty/spectral_entropy", "grok/penalty/norm/1", "grok/norm"} <= set(events(logger.log_dir))

    torch.manual_seed(0)
    mixins = SpectralEntropyMixin(0.1), WeightNoiseMixin(0.01, seed=3), NormPenaltyMixin(-1e-3)
    by_hand = with_mixins(Plain(), *mixins, NormPenaltyMixin(1e-3, parameters="*.bias"))
    fit([NormMonitor(schedule=EverySteps(4))], by_hand)
    assert same_weights(module, by_hand)
    assert list(mixins_of(by_hand)) == list(mixins_of(module))  # What was there is not grafted again,
    made.fit(module, loader())
    assert len(mixins_of(module)) == 4  # nor by a Trainer that fits again.


def test_a_mixin_of_the_scripts_stays(configure):
    configure("""
        mixins:
          - {class_path: WeightNoiseMixin, init_args: {delta: 1.0}}
          - {class_path: NormPenaltyMixin, init_args: {weight: 0.0}}
        """)
    module = with_mixins(Plain(), WeightNoiseMixin(0.0))
    fit(module=module, max_steps=1)
    assert {key: repr(mixin) for key, mixin in mixins_of(module).items()} == {
        "norm": repr(NormPenaltyMixin(0.0)),
        "weight_noise": repr(WeightNoiseMixin(0.0)),
    }


def test_a_module_that_is_only_evaluated_is_not_grafted(configure):
    configure("mixins: [{class_path: WeightNoiseMixin, init_args: {delta: 1.0}}]")
    module = Plain()
    trainer().validate(module, loader(8), verbose=False)
    assert type(module) is Plain
    assert "_grok_mixins" not in vars(module)


def test_words_that_old_yaml_takes_for_truth_values(configure):
    configure(
        "mixins: [{class_path: InputNoiseMixin, init_args: {l1: 1e-3, l2: 1E-3, on: embedding, layers: net.0, accuracy: off}}]"
    )
    noise = trainer().callbacks[0]._mixins[0]
    assert (noise.l1, noise.l2, noise.on) == (0.001, 0.001, "embedding")


class Custom(Mixin):
    kind = "custom"


class Broken:
    def __init__(self):
        raise RuntimeError("out of order")


MISTAKES = {
    "everything": "neither a preset \\(economy, standard, full\\) nor the path of a YAML file",
    "nowhere/grok.yaml": "No such file",
    ".": "Is a directory",
    "[economy": "no valid YAML",
    "economy": "the file must hold a mapping with some of the keys .* not a str",
    "": "the file must hold a mapping .* not a NoneType",
    "{}": "nothing to attach",
    "options: {prefix: x}": "nothing to attach",
    "presets: full": "unknown keys \\['presets'\\]; there are",
    "preset: 3": "`preset` must be one of",
    "preset: fulll": "`preset` must be one of .*'fulll'",
    "{preset: full, options: {size: 3}}": "`options` has unknown keys \\['size'\\]",
    "{preset: full, options: 3}": "options: must be a mapping, not a int",
    "{preset: full, options: []}": "options: must be a mapping, not a list",
    "{preset: full, options: false}": "options: must be a mapping, not a bool",
    "{preset: full, callbacks: {}}": "`callbacks` must be a list, not a dict",
    "{preset: full, mixins: ''}": "`mixins` must be a list, not a str",
    "preset: full\npreset: economy": "no valid YAML: the key preset stands twice",
    "{preset: full, options: {budget: 0.1, budget: 0.2}}": "the key budget stands twice",
    "{preset: full, options: {prefix: 5}}": "`prefix` must be a name",
    "{preset: full, options: {probe: {seed: x}}}": "`seed` must be a whole number",
    "{preset: full, options: {probe: {unpack: 5}}}": "`unpack` must be a function, got 5",
    "callbacks: [{class_path: NormMonitor, init_args: {ord: abc}}]": "NormMonitor: `ord` must be a positive number, got 'abc'",
    "callbacks: [{class_path: NormMonitor, init_args: {ord: 0}}]": "`ord` must be a positive number, got 0",
    "callbacks: [{class_path: NormMonitor, init_args: {parameters: 5}}]": "`parameters` must be a name or a glob, .*, got 5",
    "callbacks: [{class_path: RobustnessMonitor, init_args: {noise_sites: [a, 5]}}]": "`noise_sites` must be a name or a glob",
    "callbacks: [{class_path: NormMonitor, init_args: []}]": "`init_args` must be a mapping, not a list",
    "{preset: full, options: {probe: {colour: red}}}": "options: probe: .*unexpected keyword argument 'colour'",
    "{preset: full, options: {probe: {size: 0}}}": "options: probe: `size` must be a whole number",
    "{preset: full, options: {probe: 3}}": "`probe` must be a grok_callbacks.Probe",
    "{preset: full, options: {budget: much}}": "`budget` must be a positive share",
    "{preset: full, options: {budget: -1}}": "`budget` must be a positive share",
    "{preset: full, options: {schedule: Sometimes}}": "schedule: 'Sometimes' is no dotted path, and none of .*LogSpaced",
    "{preset: full, options: {on_error: ignore}}": "`on_error` must be 'warn' or 'raise'",
    "{preset: full, options: {probe: {unpack: no.such}}}": "unpack: 'no.such' cannot be imported: ModuleNotFoundError",
    "{preset: full, options: {probe: {unpack: math.nothing}}}": "unpack: 'math.nothing' cannot be imported",
    "{preset: full, options: {probe: {loss: math.pi}}}": "loss: 'math.pi' is neither a class nor a function",
    "callbacks: NormMonitor": "`callbacks` must be a list, not a str",
    "callbacks: [3]": "callbacks\\[0\\]: give a name, or a mapping",
    "callbacks: [{name: NormMonitor}]": "callbacks\\[0\\]: give a name, or a mapping",
    "callbacks: [{class_path: NormMonitor, args: 3}]": "callbacks\\[0\\] has unknown keys \\['args'\\]",
    "callbacks: [{class_path: NormMonitor, init_args: 3}]": "`init_args` must be a mapping",
    "callbacks: [{class_path: NormMonitor, init_args: {colour: red}}]": "callbacks\\[0\\]: NormMonitor: .*'colour'",
    "callbacks: [NormMonitor, GroupLawMonitor]": "callbacks\\[1\\]: GroupLawMonitor: .*'table'",
    "callbacks: [Normmonitor]": "'Normmonitor' is no dotted path, and none of .*NormMonitor",
    "callbacks: [WeightEntropyMixin]": "'WeightEntropyMixin' is no dotted path",
    "callbacks: [{class_path: WeightNoiseMixin, init_args: {delta: 1}}]": "is no callback; list it under `mixins`",
    "callbacks: [math.sqrt]": "math.sqrt",
    "callbacks: [tests.test_zero_touch.Broken]": "out of order",
    "mixins: [NormMonitor]": "mixins\\[0\\]: a NormMonitor is no mixin",
    "mixins: [{class_path: WeightNoiseMixin, init_args: {delta: -1}}]": "`delta` must be a finite number of at least 0",
    "mixins: {class_path: WeightNoiseMixin}": "`mixins` must be a list, not a dict",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_said_when_the_trainer_is_made(configure, monkeypatch, tmp_path, text):
    monkeypatch.chdir(tmp_path)
    if text in ("everything", "nowhere/grok.yaml", "."):
        monkeypatch.setenv("GROK_CALLBACKS", text)
    else:
        configure(text)
    with pytest.raises(MisconfigurationException, match=f"(?s)^GROK_CALLBACKS=.*{MISTAKES[text]}"):
        trainer()


def test_a_binary_file(configure, tmp_path):
    configure("")
    (tmp_path / "grok.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MisconfigurationException, match=r"GROK_CALLBACKS=.*can be read"):
        trainer()


def test_a_mixin_of_ones_own_by_its_path(configure):
    configure("mixins: [tests.test_zero_touch.Custom]")
    module, made = fit(max_steps=1)
    assert [type(mixin).__name__ for mixin in mixins_of(module).values()] == ["Custom"]
    assert isinstance(made.callbacks[0], ZeroTouch)


def test_it_says_what_it_does(configure, caplog):
    configure("{preset: economy, mixins: [{class_path: WeightNoiseMixin, init_args: {delta: 0.5}}]}")
    with caplog.at_level("INFO"), contextlib.redirect_stderr(io.StringIO()):
        made = trainer()
        for _ in range(2):
            made.fit(Plain(), loader())
    said = [record.message for record in caplog.records if record.message.startswith("GROK_CALLBACKS")]
    assert len(said) == 2
    assert "attached GrokkingDetector, NormMonitor" in said[0]
    assert "training with WeightNoiseMixin(delta=0.5" in said[0]
    assert "attached" not in said[1]


DOCS = (Path(__file__).parents[1] / "docs" / "zero_touch.md").read_text()
EXAMPLES = re.findall(r"^```yaml\n(# grok\.yaml.*?)^```", DOCS, flags=re.M | re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_pages_examples_work(configure, monkeypatch, tmp_path, number):
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project" / "batches.py").write_text("unpack = forward = loss = lambda *arguments: None\n")
    monkeypatch.syspath_prepend(tmp_path)
    configure(EXAMPLES[number])
    (attached,) = trainer().callbacks
    assert attached._callbacks or attached._mixins


def test_the_page_says_what_is_said(configure, caplog):
    (sentence,) = re.findall(r"^GROK_CALLBACKS=grok.yaml(: attached.*)$", DOCS, flags=re.M)
    configure("""
        callbacks: [GrokkingDetector, NormMonitor]
        mixins: [{class_path: WeightNoiseMixin, init_args: {delta: 0.01, parameters: mlp.*}}]
        """)
    with caplog.at_level("INFO"), pytest.raises(MisconfigurationException, match="matches nothing"):
        fit()
    assert any(record.message.endswith(sentence) for record in caplog.records)
