"""The graft itself: what it changes, and what not."""

from __future__ import annotations

import abc
import copy
import importlib
import inspect
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import grok_callbacks.mixins
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.mixins import (
    CommutativityMixin,
    InputNoiseMixin,
    Mixin,
    MuonMixin,
    NormPenaltyMixin,
    SpectralEntropyMixin,
    WeightNoiseMixin,
    mixins_of,
    with_mixins,
)
from tests.mixins import _nets
from tests.mixins._nets import BY_NAMESPACE, NAMESPACES, Mlp, assert_same, different, fit, loader, vectors, weights


def flip(inputs):
    return inputs.flip(1)


OFF = {
    "spectral": SpectralEntropyMixin(beta=0.0),
    "weight noise": WeightNoiseMixin(delta=0.0),
    "input noise": InputNoiseMixin(0.0, 0.0),
    "commutativity": CommutativityMixin(weight=0.0, swap=flip),
    "norm": NormPenaltyMixin(weight=0.0),
}
ON = {
    "spectral": SpectralEntropyMixin(beta=0.1),
    "weight noise": WeightNoiseMixin(delta=0.05),
    "input noise": InputNoiseMixin(0.3, 0.1),
    "commutativity": CommutativityMixin(weight=0.5, swap=flip),
    "norm": NormPenaltyMixin(weight=0.01),
    "muon": MuonMixin(),
}


def seeded(cls, *mixins, **settings):
    torch.manual_seed(0)
    module = cls(**settings)
    return with_mixins(module, *mixins) if mixins else module


def random_states():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("names", [[name] for name in OFF] + [list(OFF)], ids=" ".join)
def test_zero_is_plain_training_bit_for_bit(namespace, names):
    settings = {"namespace": namespace, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    results = []
    for mixins in ([], [OFF[name] for name in names]):
        module = seeded(BY_NAMESPACE[namespace][0], *mixins)
        trainer = fit(module, **settings)
        results.append((trainer.losses, weights(module), random_states(), dict(trainer.callback_metrics)))
    plain, off = results
    assert plain[0] == off[0]
    assert_same(plain[1], off[1])
    assert torch.equal(plain[2][0], off[2][0])
    assert np.array_equal(plain[2][1], off[2][1])
    assert plain[2][2] == off[2][2]
    assert plain[3] == off[3]


@pytest.mark.parametrize("name", ON)
def test_at_work_each_changes_training_and_no_random_state(name):
    plain, module = seeded(Mlp), seeded(Mlp, ON[name])
    torch.manual_seed(1)
    fit(plain)
    states = random_states()
    torch.manual_seed(1)
    fit(module)
    assert different(weights(plain), weights(module))
    for before, after in zip(states, random_states(), strict=True):
        assert np.array_equal(before, after) if not isinstance(before, tuple) else before == after


@pytest.mark.parametrize("order", [list(ON), list(ON)[::-1], sorted(ON)])
def test_any_order_gives_the_same_run(order):
    module = seeded(Mlp, *(ON[name] for name in order))
    trainer = fit(module)
    reference = seeded(Mlp, *ON.values())
    assert fit(reference).losses == trainer.losses
    assert_same(weights(module), weights(reference))
    # And one after another is all at once.
    chained = seeded(Mlp)
    for name in order:
        assert with_mixins(chained, ON[name]) is chained
    fit(chained)
    assert_same(weights(module), weights(chained))


def test_composed_penalties_are_the_sum():
    module = seeded(Mlp, dropout=0.0)
    batch = vectors()
    plain = module.training_step(batch, 0)
    with_mixins(module, ON["spectral"], ON["norm"], NormPenaltyMixin(-0.5, parameters="*.bias"))
    expected = plain + ON["spectral"].penalty(module) + ON["norm"].penalty(module)
    expected = expected + NormPenaltyMixin(-0.5, parameters="*.bias").penalty(module)
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_two_of_a_kind_keep_their_settings_apart():
    module = with_mixins(Mlp(), WeightNoiseMixin(0.1), NormPenaltyMixin(0.1), WeightNoiseMixin(0.2), NormPenaltyMixin(0.3))
    mixins = mixins_of(module)
    assert list(mixins) == ["norm", "norm/1", "weight_noise", "weight_noise/1"]
    assert (mixins["norm"].weight, mixins["norm/1"].weight) == (0.1, 0.3)
    assert (mixins["weight_noise"].delta, mixins["weight_noise/1"].delta) == (0.1, 0.2)
    logged = fit(module).callback_metrics
    assert {"grok/penalty/norm", "grok/penalty/norm/1"} <= set(logged)


def test_the_given_object_is_copied():
    mixin = WeightNoiseMixin(0.1)
    first, second = with_mixins(Mlp(), mixin), with_mixins(Mlp(), mixin)
    fit(first)
    assert mixins_of(first)["weight_noise"].state_dict(first) == {"draws": 8}
    assert mixins_of(second)["weight_noise"].state_dict(second) == {"draws": 0}
    assert mixin.state_dict(first) == {"draws": 0}
    mixins_of(second)["weight_noise"].delta = 0.0
    assert mixin.delta == 0.1


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_class_stays_as_it_is_and_its_graft_has_the_same_constructor(namespace):
    cls = BY_NAMESPACE[namespace][0]
    before = dict(vars(cls))
    grafted = with_mixins(cls, ON["weight noise"])
    assert dict(vars(cls)) == before
    assert issubclass(grafted, cls)
    assert inspect.signature(grafted) == inspect.signature(cls)
    assert (grafted.__name__, grafted.__module__, grafted.__doc__) == (cls.__name__, cls.__module__, cls.__doc__)
    one, two = grafted(width=5), grafted()
    assert one.hparams == {"width": 5, "dropout": 0.2, "output": "tensor", "lr": 0.05, "optimizer": "sgd"}
    assert list(one.state_dict()) == list(cls().state_dict())
    fit(one, namespace=namespace)
    assert mixins_of(one)["weight_noise"].state_dict(one) == {"draws": 8}
    assert mixins_of(two)["weight_noise"].state_dict(two) == {"draws": 0}


def test_an_instance_and_a_class_train_alike():
    first = seeded(with_mixins(Mlp, ON["weight noise"], ON["spectral"]))
    second = seeded(Mlp, ON["weight noise"], ON["spectral"])
    third = seeded(with_mixins(with_mixins(Mlp, ON["spectral"]), ON["weight noise"]))
    fourth = seeded(with_mixins(Mlp, ON["spectral"]), ON["weight noise"])
    losses = []
    for module in (first, second, third, fourth):
        torch.manual_seed(1)
        losses.append(fit(module).losses)
    assert losses[0] == losses[1] == losses[2] == losses[3]


Grafted = with_mixins(Mlp, NormPenaltyMixin(0.1))


class Subclass(Grafted):
    """A user's subclass of a graft, with hooks of its own."""

    def training_step(self, batch, batch_idx):
        return 2 * super().training_step(batch, batch_idx)


def test_subclass_of_a_graft_and_grafts_onto_it():
    batch = vectors()
    base = seeded(Mlp, dropout=0.0)
    plain, penalty = base.training_step(batch, 0), NormPenaltyMixin(0.1).penalty(base)
    module = seeded(Subclass, dropout=0.0)
    torch.testing.assert_close(module.training_step(batch, 0), 2 * (plain + penalty))
    assert type(pickle.loads(pickle.dumps(module))) is Subclass
    # Grafted anew, everything is applied once, on the outside.
    for again in (seeded(with_mixins(Subclass, ON["spectral"]), dropout=0.0), with_mixins(module, ON["spectral"])):
        expected = 2 * plain + penalty + ON["spectral"].penalty(base)
        torch.testing.assert_close(again.training_step(batch, 0), expected)
        assert list(mixins_of(again)) == ["norm", "spectral_entropy"]


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("make", ["instance", "class"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_pickles_and_copies(namespace, make, duplicate):
    cls = BY_NAMESPACE[namespace][0]
    mixins = list(ON.values())
    module = seeded(with_mixins(cls, *mixins)) if make == "class" else seeded(cls, *mixins)
    fit(module, namespace=namespace, max_epochs=1)
    twin = duplicate(module)
    assert type(twin) is type(module)
    assert twin.hparams == module.hparams
    assert_same(weights(twin), weights(module))
    losses = []
    for each in (module, twin):
        torch.manual_seed(3)
        losses.append(fit(each, namespace=namespace, max_epochs=1).losses)
    assert losses[0] == losses[1]


def test_grafted_classes_pickle():
    make = pickle.loads(pickle.dumps(partial(Grafted, width=3)))
    assert make.func is Grafted
    data = pickle.dumps(Grafted)
    key = Grafted._grok_token
    from grok_callbacks.mixins import _graft

    kept = _graft._known.pop(key)  # As in another process, which has not seen this class.
    try:
        other = pickle.loads(data)
        assert other is not Grafted
        assert list(mixins_of(other(width=3))) == ["norm"]
    finally:
        _graft._known[key] = kept


class Cooperative(Mlp):
    """A class with its own way of pickling."""

    def __getstate__(self):
        return {**super().__getstate__(), "stamp": 1}


def test_own_pickling_is_respected():
    twin = pickle.loads(pickle.dumps(with_mixins(Cooperative(), ON["norm"])))
    assert twin.stamp == 1
    assert isinstance(twin, Cooperative)


registered = []


class Registered(Mlp, abc.ABC):
    """A metaclass, and a registry of subclasses that wants an argument."""

    def __init_subclass__(cls, *, entry, **kwargs):
        super().__init_subclass__(**kwargs)
        registered.append(entry)


def test_metaclasses_and_registries_of_the_user():
    grafted = with_mixins(Registered, ON["norm"])
    assert isinstance(grafted, abc.ABCMeta)
    assert registered == []

    class Child(grafted, entry="child"):
        pass

    assert registered == ["child"]
    assert list(mixins_of(Child())) == ["norm"]
    assert isinstance(pickle.loads(pickle.dumps(grafted())), Registered)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_checkpoints_interchange_in_both_directions(namespace, tmp_path):
    cls = BY_NAMESPACE[namespace][0]
    mixins = [mixin for name, mixin in ON.items() if name != "muon"]
    plain, grafted = seeded(cls), seeded(cls, *mixins)
    for name, module in (("plain", plain), ("grafted", grafted)):
        torch.manual_seed(1)
        fit(module, namespace=namespace, max_epochs=1).save_checkpoint(tmp_path / f"{name}.ckpt")
    saved = [torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("plain", "grafted")]
    assert list(saved[0]["state_dict"]) == list(saved[1]["state_dict"])
    assert saved[0]["hyper_parameters"] == saved[1]["hyper_parameters"]
    assert set(saved[1]) - set(saved[0]) == {"grok_callbacks_mixins"}
    # Whole: optimizer and schedule too.
    assert fit(cls(), namespace=namespace, ckpt_path=tmp_path / "grafted.ckpt").global_step == 8
    assert fit(with_mixins(cls(), *mixins), namespace=namespace, ckpt_path=tmp_path / "plain.ckpt").global_step == 8
    # By class.
    assert_same(weights(cls.load_from_checkpoint(tmp_path / "grafted.ckpt")), saved[1]["state_dict"])
    loaded = with_mixins(cls, *mixins).load_from_checkpoint(tmp_path / "grafted.ckpt")
    assert_same(weights(loaded), saved[1]["state_dict"])
    assert mixins_of(loaded)["weight_noise"].state_dict(loaded) == {"draws": 4}
    assert_same(weights(with_mixins(cls, *mixins).load_from_checkpoint(tmp_path / "plain.ckpt")), saved[0]["state_dict"])


@pytest.mark.parametrize("names", [[name] for name in ON] + [list(ON)], ids=" ".join)
def test_resumed_runs_equal_uninterrupted_ones(names, tmp_path):
    # Without what Lightning itself does not resume: the order of a shuffling loader, and dropout.
    batches = loader(shuffle=False)
    whole = seeded(Mlp, *(ON[name] for name in names), dropout=0.0)
    trainer = fit(whole, batches, max_epochs=4)
    first = seeded(Mlp, *(ON[name] for name in names), dropout=0.0)
    begun = fit(first, batches, max_epochs=2)
    begun.save_checkpoint(tmp_path / "half.ckpt")
    second = with_mixins(Mlp(dropout=0.0), *(ON[name] for name in names))
    resumed = fit(second, batches, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert begun.losses + resumed.losses == trainer.losses
    assert_same(weights(second), weights(whole))


def test_corrupted_state_is_refused(tmp_path):
    module = with_mixins(Mlp(), ON["weight noise"])
    with pytest.raises(MisconfigurationException, match="grok_callbacks_mixins"):
        module.on_load_checkpoint({"grok_callbacks_mixins": 3})
    for state in (3, {}, {"draws": "many"}, {"draws": -1}, {"draws": None}):
        with pytest.raises(MisconfigurationException, match="weight_noise"):
            module.on_load_checkpoint({"grok_callbacks_mixins": {"weight_noise": state}})


def test_hooks_of_the_user_are_called():
    calls = []

    class Hooked(Mlp):
        def on_fit_start(self):
            calls.append("fit")

        def on_save_checkpoint(self, checkpoint):
            calls.append("save")

        def on_load_checkpoint(self, checkpoint):
            calls.append("load")

        def backward(self, loss, *args, **kwargs):
            calls.append("backward")
            super().backward(loss, *args, **kwargs)

    module = with_mixins(Hooked(), *ON.values())
    trainer = fit(module, max_epochs=1, limit_train_batches=1)
    module.on_save_checkpoint({})
    module.on_load_checkpoint({})
    assert calls == ["fit", "backward", "save", "load"]
    assert trainer.global_step == 1


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("output", ["tensor", "dict", "none"])
def test_whatever_training_step_returns(namespace, output):
    module = seeded(BY_NAMESPACE[namespace][0], NormPenaltyMixin(0.1), WeightNoiseMixin(0.01), output=output)
    batch = vectors(8)
    given = module.training_step(batch, 0)
    assert (type(given) is dict and given["extra"] == 1) if output == "dict" else isinstance(given, torch.Tensor)
    with pytest.warns(UserWarning, match="returned `None`") if output == "none" else torch.no_grad():
        trainer = fit(module, namespace=namespace)
    assert len(trainer.losses) == 8
    assert trainer.losses.count(None) == (2 if output == "none" else 0)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_foreign_training_step_signature():
    class Bare(Mlp):
        def training_step(self, batch):
            assert len(batch) == 2
            return super().training_step(batch, 0)

    class Iterating(Mlp):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    assert fit(with_mixins(Bare(), ON["weight noise"], ON["input noise"])).global_step == 8
    assert fit(with_mixins(Iterating(), ON["weight noise"], NormPenaltyMixin(0.0))).global_step == 8
    with pytest.raises(MisconfigurationException, match=r"InputNoiseMixin.*unpack"):
        fit(with_mixins(Iterating(), ON["input noise"]))
    module = with_mixins(Mlp(), ON["input noise"])
    assert module.training_step(batch=vectors(), batch_idx=0).isfinite()


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", [name for name in ON if name not in ("input noise", "muon")])
def test_manual_optimisation_is_refused_or_works(namespace, name):
    cls = BY_NAMESPACE[namespace][2]
    pl = importlib.import_module(namespace)
    exception = importlib.import_module(f"{namespace}.utilities.exceptions").MisconfigurationException
    with pytest.raises(exception, match="manual optimisation"):
        fit(with_mixins(cls(), ON[name]), namespace=namespace)
    assert issubclass(cls, pl.LightningModule)
    assert fit(with_mixins(cls(), OFF[name]), namespace=namespace).global_step == 8
    plain, noisy = seeded(cls), seeded(cls, ON["input noise"], ON["muon"])
    for module in (plain, noisy):
        torch.manual_seed(0)
        assert fit(module, namespace=namespace).global_step == 8
    assert different(weights(plain), weights(noisy))


def test_what_is_missing_in_the_users_class_stays_missing():
    pl = importlib.import_module(NAMESPACES[0])

    class Empty(pl.LightningModule):
        pass

    class Half(Mlp):
        configure_optimizers = pl.LightningModule.configure_optimizers

    with pytest.raises(MisconfigurationException.__mro__[1], match="No `training_step"):
        fit(with_mixins(Empty(), ON["norm"]))
    with pytest.raises(MisconfigurationException.__mro__[1], match="No `configure_optimizers"):
        fit(with_mixins(Half(), ON["norm"]))


def test_bad_calls():
    with pytest.raises(MisconfigurationException, match="at least one"):
        with_mixins(Mlp())
    with pytest.raises(MisconfigurationException, match=r"Did you mean WeightNoiseMixin\(\.\.\.\)"):
        with_mixins(Mlp(), WeightNoiseMixin)
    with pytest.raises(MisconfigurationException, match="not a configured mixin"):
        with_mixins(Mlp(), 0.1)
    for bad in (nn.Linear(2, 2), nn.Linear, object()):
        with pytest.raises(MisconfigurationException, match="LightningModule"):
            with_mixins(bad, ON["norm"])


@pytest.mark.parametrize(
    "mixin", [SpectralEntropyMixin(parameters="nothing.*"), NormPenaltyMixin(1.0, parameters=["net.0.*", "x"])]
)
def test_names_that_match_nothing_are_an_error_at_the_start_of_the_fit(mixin):
    with pytest.raises(MisconfigurationException, match=r"Mixin: `parameters`: .* matches nothing.*net\.0\.weight"):
        fit(with_mixins(Mlp(), mixin))


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_flat_sharding_is_refused(strategy):
    module = with_mixins(Mlp(), ON["weight noise"])
    module._trainer = type("Trainer", (), {"strategy": type(strategy, (), {})()})()
    with pytest.raises(MisconfigurationException, match=f"can't be used with {strategy}.*FSDP2"):
        module.on_fit_start()
    other = with_mixins(Mlp(), ON["input noise"], ON["commutativity"])
    other._trainer = module._trainer
    other.on_fit_start()


def test_every_mixin_is_exported_and_configurable_from_plain_arguments():
    jsonargparse = pytest.importorskip("jsonargparse")
    kinds = [cls for name in grok_callbacks.mixins.__all__ if isinstance(cls := getattr(grok_callbacks.mixins, name), type)]
    assert {cls.kind for cls in kinds if cls is not Mixin} == {mixin.kind for mixin in ON.values()}
    assert all(issubclass(cls, Mixin) for cls in kinds)
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--mixins", type=list[Mixin])
    given = [
        {
            "class_path": "grok_callbacks.mixins.SpectralEntropyMixin",
            "init_args": {"beta": 0.2, "parameters": ["*", "!*.bias"]},
        },
        {"class_path": "grok_callbacks.mixins.InputNoiseMixin", "init_args": {"l1": 0.5, "l2": 0.4, "on": "embedding"}},
        {"class_path": "grok_callbacks.mixins.NormPenaltyMixin", "init_args": {"weight": -1e-9, "ord": 1, "power": 1}},
        {"class_path": "grok_callbacks.mixins.WeightNoiseMixin", "init_args": {"delta": 0.01}},
        {"class_path": "grok_callbacks.mixins.CommutativityMixin", "init_args": {"swap": "tests.mixins.test_graft.flip"}},
        {"class_path": "grok_callbacks.mixins.MuonMixin", "init_args": {"lr": 0.02}},
    ]
    mixins = parser.instantiate_classes(parser.parse_object({"mixins": given})).mixins
    assert [type(mixin).__name__ for mixin in mixins] == [item["class_path"].rsplit(".", 1)[1] for item in given]
    assert mixins[0].beta == 0.2
    assert mixins[4].swap is flip
    assert "beta=0.2" in repr(mixins[0])


def test_grafted_while_a_trainer_sets_up():
    pl = importlib.import_module(NAMESPACES[0])

    class Grafting(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            with_mixins(pl_module, *ON.values())

    late, early = seeded(Mlp), seeded(Mlp, *ON.values())
    losses = []
    for module, callbacks in ((late, [Grafting()]), (early, [])):
        torch.manual_seed(0)
        losses.append(fit(module, callbacks=callbacks).losses)
    assert losses[0] == losses[1]


def test_fabric_and_plain_loops():
    from lightning.fabric import Fabric

    module = seeded(Mlp, SpectralEntropyMixin(0.1), InputNoiseMixin(0.1, 0.1))
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    wrapped, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    loss = wrapped.training_step(vectors(), 0)
    fabric.backward(loss)
    optimizer.step()
    assert loss.isfinite()
    assert mixins_of(module)["input_noise"].state_dict(module)["draws"] == 1
    assert _nets.Mlp is type(module)._grok_base
