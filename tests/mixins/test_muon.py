"""Muon for the hidden matrices, and everything else as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.mixins import MuonMixin, with_mixins
from grok_callbacks.mixins.muon import MuonWithRest
from tests.mixins._nets import BY_NAMESPACE, NAMESPACES, Mlp, Tokens, assert_close, assert_same, fit, loader, vectors, weights

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")


def by_hand(module, batches, hidden, *, accumulate=1, clip=None, muon_lr=None):
    """Two optimizers and two schedules, as one would write it."""
    matrices = [parameter for name, parameter in module.named_parameters() if name in hidden]
    others = [parameter for name, parameter in module.named_parameters() if name not in hidden]
    muon = torch.optim.Muon(matrices, lr=muon_lr or 0.05, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=0.05)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5) for optimizer in (muon, adam)]
    for index, (x, y) in enumerate(batches):
        (F.cross_entropy(module(x), y) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            for optimizer in (muon, adam):
                optimizer.step()
                optimizer.zero_grad()
            for schedule in schedules:
                schedule.step()


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize(("accumulate", "clip", "lr"), [(1, None, None), (2, 0.1, None), (1, None, 0.01)])
def test_equals_two_optimizers_by_hand(namespace, accumulate, clip, lr):
    torch.manual_seed(0)
    module = BY_NAMESPACE[namespace][0](dropout=0.0, optimizer="adamw")
    reference = copy.deepcopy(module)
    batches = loader(batch_size=4, shuffle=False)
    by_hand(reference, batches, {"net.0.weight", "net.4.weight"}, accumulate=accumulate, clip=clip, muon_lr=lr)
    with_mixins(module, MuonMixin(lr=lr))
    settings = {"max_epochs": 1, "accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    trainer = fit(module, batches, namespace=namespace, **settings)
    assert_close(weights(module), weights(reference), rtol=1e-4, atol=1e-5)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.5 ** (trainer.global_step // 3))


def test_hidden_matrices_by_default():
    assert list(MuonMixin().hidden_matrices(Mlp())) == ["net.0.weight", "net.4.weight"]
    assert list(MuonMixin().hidden_matrices(Tokens())) == ["hidden.weight"]
    tied = Tokens(symbols=8)
    tied.head.weight = tied.embedding.weight = nn.Parameter(torch.randn(8, 8))
    tied.embedding = nn.Embedding(8, 8)
    tied.head.weight = tied.embedding.weight
    assert list(MuonMixin().hidden_matrices(tied)) == ["hidden.weight"]
    frozen = Mlp()
    frozen.net[0].requires_grad_(False)
    assert list(MuonMixin().hidden_matrices(frozen)) == ["net.4.weight"]
    assert list(MuonMixin(parameters="net.5.weight").hidden_matrices(Mlp())) == ["net.5.weight"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("net.0.*", r"two-dimensional.*net\.0\.bias"),
        ("encoder.*", "matches nothing"),
    ],
)
def test_what_muon_can_not_take(parameters, message):
    with pytest.raises(MisconfigurationException, match=f"MuonMixin: .*{message}"):
        fit(with_mixins(Mlp(), MuonMixin(parameters=parameters)))


def test_no_hidden_matrix():
    class Shallow(Mlp):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

    with pytest.raises(MisconfigurationException, match=r"no hidden matrix.*net\.weight"):
        fit(with_mixins(Shallow(), MuonMixin()))


class Configured(Mlp):
    """Returns its optimizer in any of Lightning's forms, in groups."""

    form = "optimizer"

    def configure_optimizers(self):
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": 0.1, "lr": 0.02},
            {"params": [p for p in self.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.05)
        if self.form == "plateau":
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"}}
        if self.form == "sequential":
            warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 2)
            parts = [warmup, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]
            scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [2])
        else:
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
        config = {"scheduler": scheduler, "interval": "step"}
        return {
            "optimizer": optimizer,
            "list": [optimizer],
            "tuple": ([optimizer], [config]),
            "dict": {"optimizer": optimizer, "lr_scheduler": config},
            "dicts": [{"optimizer": optimizer, "lr_scheduler": config}],
            "sequential": ([optimizer], [config]),
        }[self.form]


@pytest.mark.parametrize("form", ["optimizer", "list", "tuple", "dict", "dicts", "plateau", "sequential"])
def test_groups_and_schedules_stay_those_of_the_user(form):
    modules = [Configured(), with_mixins(Configured(), MuonMixin())]
    rates = []
    for module in modules:
        module.form = form
        trainer = fit(module)
        groups = trainer.optimizers[0].param_groups
        rates.append([(group["lr"], group["betas"], group["weight_decay"], len(group["params"])) for group in groups])
    assert rates[0] == rates[1]
    composite = trainer.optimizers[0]
    assert isinstance(composite, MuonWithRest)
    for config in trainer.lr_scheduler_configs:
        assert config.scheduler.optimizer is composite
    (muon, none) = composite._groups_of_muon()
    assert none["params"] == []
    assert (muon["lr"], muon["weight_decay"]) == (composite.param_groups[0]["lr"], 0.1)
    assert len(muon["params"]) == 2


class Kept(Mlp):
    """Keeps its optimizer and a scheduler to itself, and sets learning rates through them."""

    def configure_optimizers(self):
        self.kept = torch.optim.AdamW(self.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.kept, 1, 0.5)
        return self.kept

    def on_train_batch_end(self, *_):
        self.schedule.step()


def test_an_optimizer_that_the_module_keeps_goes_on_setting_rates(tmp_path):
    steps = 0
    for epochs in (1, 2):
        path = tmp_path / "last.ckpt" if steps else None
        trainer = fit(with_mixins(Kept(), MuonMixin()), max_epochs=epochs, ckpt_path=path)
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05 * 0.5 ** (trainer.global_step - 1)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        steps = trainer.global_step
        assert trainer.optimizers[0].state_dict()["param_groups"][0]["lr"] == 0.05 * 0.5**steps


def test_resumes_exactly(tmp_path):
    def run(**settings):
        torch.manual_seed(0)
        module = with_mixins(Configured(dropout=0.0), MuonMixin())
        module.form = "dict"
        return module, fit(module, loader(shuffle=False), **settings)

    whole, _ = run(max_epochs=4)
    _, begun = run(max_epochs=2)
    begun.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_same(weights(resumed), weights(whole))


def test_optimizer_state_of_another_run_is_refused(tmp_path):
    fit(Mlp(), max_epochs=1).save_checkpoint(tmp_path / "plain.ckpt")
    fit(with_mixins(Mlp(), MuonMixin(parameters="net.4.weight")), max_epochs=1).save_checkpoint(tmp_path / "other.ckpt")
    for name in ("plain", "other"):
        with pytest.raises(MisconfigurationException, match="Load the weights alone"):
            fit(with_mixins(Mlp(), MuonMixin()), ckpt_path=tmp_path / f"{name}.ckpt")
        loaded = with_mixins(Mlp, MuonMixin()).load_from_checkpoint(tmp_path / f"{name}.ckpt")
        assert fit(loaded).global_step == 8


def composite():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    return net, MuonWithRest(torch.optim.Adam(net.parameters(), lr=0.01), [net[0].weight])


def step(net, optimizer):
    optimizer.zero_grad()
    x, y = vectors()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


def test_state_dict_round_trip_pickling_and_copies():
    net, optimizer = composite()
    step(net, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    assert {"momentum_buffer"} in [set(entry) for entry in state["state"].values()]
    assert {"step", "exp_avg", "exp_avg_sq"} in [set(entry) for entry in state["state"].values()]
    assert torch.load(_saved(state), weights_only=True)["param_groups"] == state["param_groups"]
    twins = [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    other, fresh = composite()
    other.load_state_dict(net.state_dict())
    fresh.load_state_dict(state)
    step(net, optimizer)
    for twin, twin_optimizer in [*twins, (other, fresh)]:
        step(twin, twin_optimizer)
        assert_same(dict(twin.named_parameters()), dict(net.named_parameters()))


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_group_added_while_training():
    net, optimizer = composite()
    late = nn.Linear(3, 3)
    optimizer.add_param_group({"params": list(late.parameters()), "lr": 0.1})
    before = late.weight.detach().clone()
    x, y = vectors()
    F.cross_entropy(late(net(x)), y).backward()
    optimizer.step()
    assert not torch.equal(late.weight, before)
    assert len(optimizer.state_dict()["param_groups"]) == 2


def test_closures_and_missing_gradients():
    net, optimizer = composite()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net[2](torch.ones(1, 4)).sum()
        loss.backward()
        return loss

    before = net[0].weight.detach().clone()
    assert optimizer.step(closure).isfinite()
    assert calls == [True]
    assert torch.equal(net[0].weight, before)


def test_two_on_different_matrices():
    torch.manual_seed(0)
    module = with_mixins(Mlp(dropout=0.0), MuonMixin(parameters="net.0.weight"), MuonMixin(lr=0.01, parameters="net.4.weight"))
    batches = loader(shuffle=False)
    trainer = fit(module, batches, max_epochs=2)
    states = trainer.optimizers[0].state
    assert "momentum_buffer" in states[module.net[0].weight]
    assert trainer.optimizers[0].state_dict()["state"].keys() == set(range(len(list(module.parameters()))))
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_rates_that_make_no_sense():
    class Zero(Mlp):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.0)

    with pytest.raises(MisconfigurationException, match="which is 0"):
        fit(with_mixins(Zero(), MuonMixin(lr=0.1)))
    for arguments in ({"lr": -1}, {"momentum": -0.1}, {"weight_decay": float("nan")}, {"ns_steps": 0}, {"adjust_lr_fn": "x"}):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
            MuonMixin(**arguments)


def test_lbfgs_is_refused():
    class Lbfgs(Mlp):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(MisconfigurationException, match="LBFGS"):
        fit(with_mixins(Lbfgs(), MuonMixin()))


def test_torch_without_muon(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(MisconfigurationException, match=r"torch\.optim\.Muon, from torch 2\.9 on"):
        MuonMixin()
