from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

import grok_callbacks.snapshot
from grok_callbacks import ModelView, Probe, Snapshot


def view_of(model, *inputs, probe=None, targets=None, size=6):
    """A view with samples that fit."""
    probe = probe or Probe()
    x = inputs[0] if inputs else torch.randn(size, 4)
    y = targets if targets is not None else torch.randint(3, (len(x),))
    return ModelView(model, probe, {"train": probe.join([(x, y)]), "validation": probe.join([(-x, y)])})


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


class Counter(nn.Module):
    """Counts forward passes without showing it to anybody."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.seen = SimpleNamespace(sizes=[])

    def forward(self, x):
        self.seen.sizes.append(len(x))
        return self.model(x)


# Sites.


class Functional(nn.Module):
    def __init__(self, activation=F.relu, between=lambda h: h):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 3)
        self.activation, self.between = activation, between

    def forward(self, x):
        return self.second(self.between(self.activation(self.first(x))))


@pytest.mark.parametrize(
    ("activation", "between"),
    [
        (F.relu, lambda h: h), (torch.relu, lambda h: h), (torch.tanh, lambda h: h), (F.gelu, lambda h: h),
        (F.silu, lambda h: F.dropout(h, 0.5, training=False)), (torch.square, lambda h: h.reshape(len(h), -1)),
        (lambda h: h.relu(), lambda h: h), (lambda h: F.relu(h, inplace=True), lambda h: h),
        (lambda h: h.relu_(), lambda h: h.view(-1, 5).contiguous()),
    ],
)  # fmt: skip
def test_functional_activations_are_found_where_they_are_consumed(activation, between):
    view = view_of(Functional(activation, between))
    assert view.hidden_activations == ["second:input"]
    snapshot = Snapshot(view, 0)
    x = snapshot.batch().inputs
    expected = between(activation(view.model.first(x)))
    assert torch.equal(snapshot.activations("second:input"), expected)


def test_an_unknown_activation_falls_back_on_the_inputs_of_all_linear_modules_but_the_first():
    assert view_of(Functional(lambda h: h**2)).hidden_activations == ["second:input"]


def test_an_activation_that_several_modules_take_is_one_site():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.drop, self.left, self.right = nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            h = self.drop(F.relu(self.stem(x)))
            return self.left(h) + self.right(h)

    assert view_of(Forked()).hidden_activations == ["left:input"]


def test_modules_of_an_mlp():
    view = view_of(mlp())
    assert view.hidden_activations == ["1"]
    assert view.sites == ["0", "1", "2", "0:input", "1:input", "2:input"]


def test_a_convolutional_network():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 4, 2))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            h = F.max_pool2d(F.relu(self.features(x)), 2)
            return self.head(h.flatten(1))

    assert view_of(Net(), torch.randn(5, 1, 8, 8)).hidden_activations == ["features.1", "head:input"]


def test_a_transformer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=F.gelu)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens):
            return self.head(self.block(self.embed(tokens)))

    view = view_of(Net(), torch.randint(7, (5, 4)), targets=torch.randint(3, (5, 4)))
    assert view.hidden_activations == ["block.linear2:input"]
    assert {"embed", "block", "head", "head:input"} <= set(view.sites)
    assert Snapshot(view, 0).activations("block.linear2:input").shape == (5, 4, 16)
    assert torch.backends.mha.get_fastpath_enabled()

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, tokens):
            h = self.embed(tokens)
            h = h + self.attention(h, h, h, need_weights=False)[0]
            return self.head(h + self.down(F.gelu(self.up(h))))

    assert view_of(Own(), torch.randint(7, (5, 4)), targets=torch.randint(3, (5, 4))).hidden_activations == ["down:input"]


class Reused(nn.Module):
    def __init__(self, *, inplace=False):
        super().__init__()
        self.act = nn.ReLU(inplace=inplace)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)])
        self.never = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        return self.layers[2](self.act(self.layers[1](self.act(self.layers[0](x)))))


@pytest.mark.parametrize("inplace", [False, True])
def test_each_call_of_a_reused_module_is_a_site(inplace):
    view = view_of(Reused(inplace=inplace))
    assert view.hidden_activations == ["act@0", "act@1"]
    snapshot = Snapshot(view, 0)
    model, x = view.model, snapshot.batch().inputs
    first = model.layers[0](x).detach()
    assert torch.equal(snapshot.activations("act@0"), first.relu())
    assert torch.equal(snapshot.activations("act@1"), model.layers[1](first.relu()).relu())
    # What comes before an in-place activation is what its module put out.
    assert torch.equal(snapshot.activations("layers.0"), first)


def test_a_module_that_is_never_called_is_no_site():
    view = view_of(Reused())
    assert not any(site.startswith("never") for site in view.sites)
    with pytest.raises(ValueError, match=r"`layers`: 'never\.\*' matches nothing.*act@0"):
        view.select_sites("never.*")


def test_asking_for_what_is_not_there():
    snapshot = Snapshot(view_of(Reused()), 0)
    with pytest.raises(ValueError, match="no module 'nowhere'"):
        snapshot.activations("nowhere")
    with pytest.raises(ValueError, match=r"No single tensor passed at \['never.0'\]"):
        snapshot.activations("never.0")
    with pytest.raises(ValueError, match="No single tensor passed"):
        snapshot.forward(replace={"act@7": torch.zeros(1)})


def test_tuples_and_integers_are_no_sites():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.rnn = nn.LSTM(4, 4, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, tokens):
            return self.head(self.rnn(self.embed(tokens))[0][:, -1])

    sites = view_of(Net(), torch.randint(7, (5, 3))).sites
    assert "embed" in sites
    assert "embed:input" not in sites
    assert "rnn" not in sites


def test_a_model_that_cannot_be_called_names_the_arguments():
    with pytest.raises(ValueError, match=r"could not be called.*RuntimeError.*`forward`.*`unpack`"):
        _ = view_of(mlp(), torch.randn(4, 9)).sites
    with pytest.raises(ValueError, match=r"could not be called.*`forward`"):
        view_of(mlp(), torch.randn(4, 9)).require_logits()
    with pytest.raises(ValueError, match="don't fit"):
        view_of(mlp(), targets=torch.zeros(6, 2, dtype=torch.long)).require_logits()
    # Beyond the samples that it is tried on.
    with pytest.raises(ValueError, match=r"Targets from 0 to 9 can't be classes.*`forward` of the Probe"):
        view_of(mlp(), targets=torch.tensor([0, 0, 0, 1, 1, 9])).require_logits()


def test_errors_of_drawing_concern_those_who_need_samples():
    view = ModelView(mlp(), Probe(), {"train": ValueError("unreadable")})
    assert view.select_matrices(None) == ["0.weight", "2.weight"]
    assert not Snapshot(view, 0).has("train")
    assert not view.asked_for_samples
    with pytest.raises(ValueError, match="unreadable"):
        view.require_samples()
    with pytest.raises(ValueError, match=r"no validation samples.*`validation` of the Probe"):
        view.require_samples("validation")
    assert view.asked_for_samples


def test_looking_for_sites_leaves_no_hooks():
    view = view_of(Reused())
    _ = view.sites
    Snapshot(view, 0).activations("act@0")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in view.model.modules())


# One pass, one spectrum.


def test_one_pass_per_split_for_all_that_was_requested():
    model = Counter(mlp())
    view = view_of(model)
    view.request(["model.0", "model.1"])
    view.request(["model.1", "model.2:input"])
    view.request(["model.1"], "validation")
    snapshot = Snapshot(view, 0)
    for _ in range(3):
        snapshot.logits(), snapshot.targets(), snapshot.loss()
        snapshot.activations("model.0"), snapshot.activations("model.1"), snapshot.activations("model.2:input")
        snapshot.logits("validation"), snapshot.activations("model.1", "validation")
    assert model.seen.sizes == [6, 6]
    snapshot.activations("model.2")  # Not asked for beforehand: one more pass.
    snapshot.activations("model.2")
    snapshot.activations("model.0")
    assert len(model.seen.sizes) == 3


def test_one_spectrum_per_matrix(monkeypatch):
    calls = []
    original = grok_callbacks.snapshot.singular_values
    monkeypatch.setattr(grok_callbacks.snapshot, "singular_values", lambda m: calls.append(tuple(m.shape)) or original(m))
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 2))
    snapshot = Snapshot(ModelView(model, Probe()), 0)
    for _ in range(3):
        values = snapshot.spectrum("0.weight")
        snapshot.spectrum("2.weight")
    assert calls == [(3, 18), (2, 3)]
    assert torch.allclose(values, torch.linalg.svdvals(model[0].weight.detach().reshape(3, -1).double()))


# What passes.


def test_activations_and_logits_are_the_models_own():
    view = view_of(mlp())
    snapshot = Snapshot(view, 0)
    x = snapshot.batch().inputs
    assert torch.equal(snapshot.activations("1"), view.model[1](view.model[0](x)))
    assert torch.equal(snapshot.activations("2:input"), snapshot.activations("1"))
    assert torch.equal(snapshot.logits(), view.model(x))
    assert torch.equal(snapshot.logits("validation"), view.model(-x))
    assert not snapshot.logits().requires_grad
    assert snapshot.loss() == F.cross_entropy(view.model(x).double(), snapshot.targets())


def test_causal_language_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, input_ids):
            return {"logits": self.head(self.embed(input_ids))}

    tokens = torch.randint(9, (3, 5))
    probe = Probe()
    view = ModelView(Model(), probe, {"train": probe.join([{"input_ids": tokens, "labels": tokens}])})
    snapshot = Snapshot(view, 0)
    assert snapshot.logits().shape == (12, 9)  # The last position has nothing to predict.
    assert torch.equal(snapshot.targets(), tokens[:, 1:].flatten())
    logits = view.model(tokens)["logits"]
    assert torch.isclose(snapshot.loss(), F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()))


def test_a_model_that_writes_into_its_inputs_does_not_spoil_the_probe():
    class Writer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            x.mul_(2)
            return self.linear(x)

    view = view_of(Writer())
    first, second = Snapshot(view, 0), Snapshot(view, 1)
    assert torch.equal(first.logits(), second.logits())
    assert torch.equal(first.forward().logits, first.logits())


def test_eval_mode_and_precision():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 3)).bfloat16()
    view = view_of(model)
    with torch.autocast("cpu", torch.float16):
        first = Snapshot(view, 0).logits()
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, Snapshot(view, 1).logits())
    assert torch.equal(first, model.eval()(view.samples["train"].inputs.bfloat16()))


# Passes of one's own.


def test_other_inputs():
    view = view_of(mlp())
    x = torch.randn(2, 4)
    run = Snapshot(view, 0).forward(inputs=x, capture=["0"])
    assert torch.equal(run.logits, view.model(x))
    assert torch.equal(run.captured["0"], view.model[0](x))


@pytest.mark.parametrize("site", ["1", "2:input"])
def test_replaced_activations(site):
    view = view_of(mlp())
    replacement = torch.randn(6, 5)
    run = Snapshot(view, 0).forward(replace={site: replacement}, capture=[site, "0"])
    assert torch.equal(run.logits, view.model[2](replacement))
    assert torch.equal(run.captured[site], replacement)
    assert torch.equal(run.captured["0"], view.model[0](view.samples["train"].inputs))


def test_replacing_one_call_of_a_reused_module():
    view = view_of(Reused())
    zeros = torch.zeros(6, 4)
    logits = Snapshot(view, 0).forward(replace={"act@1": zeros}).logits
    assert torch.equal(logits, view.model.layers[2](zeros))


def test_substituted_weights():
    view = view_of(mlp())
    substitute = {"0.weight": torch.randn(5, 4), "2.bias": torch.zeros(3)}
    before = {name: (weight.clone(), weight._version) for name, weight in view.model.named_parameters()}
    snapshot = Snapshot(view, 0)
    logits = snapshot.forward(weights=substitute).logits
    assert torch.equal(logits, functional_call(view.model, substitute, (snapshot.batch().inputs,)))
    assert not torch.equal(logits, snapshot.logits())
    for name, weight in view.model.named_parameters():
        assert torch.equal(weight, before[name][0])
        assert weight._version == before[name][1]
    with pytest.raises(ValueError, match="no parameters"):
        snapshot.forward(weights={"nothing": torch.zeros(1)})


def test_substituted_weights_of_tied_and_compiled_modules():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    view = view_of(Tied(), torch.arange(5), targets=torch.arange(5))
    weight = torch.randn(5, 3)
    assert torch.allclose(Snapshot(view, 0).forward(weights={"embed.weight": weight}).logits, weight @ weight.T)

    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")
    view = view_of(model)
    zero = Snapshot(view, 0).forward(weights={"0.weight": torch.zeros(5, 4)}, capture=["0"])
    assert torch.equal(zero.captured["0"], model[0].bias.expand(6, 5))


def test_gradients_to_inputs_activations_and_weights():
    view = view_of(mlp())
    snapshot = Snapshot(view, 0)
    x = snapshot.batch().inputs.clone().requires_grad_()
    weight = view.model[2].weight.detach().clone().requires_grad_()
    run = snapshot.forward(inputs=x, weights={"2.weight": weight}, capture=["1"], grad=True)
    gradients = torch.autograd.grad(snapshot.loss_of(run.logits, snapshot.targets()), [x, weight, run.captured["1"]])
    view.model.zero_grad()
    y = x.detach().clone().requires_grad_()
    F.cross_entropy(view.model(y).double(), snapshot.targets()).backward()
    assert torch.allclose(gradients[0], y.grad)
    assert torch.allclose(gradients[1], view.model[2].weight.grad)
    upstream = torch.autograd.grad(snapshot.loss_of(view.model(y), snapshot.targets()), y)[0]
    active = (run.captured["1"] > 0).float()
    assert torch.allclose((gradients[2] * active) @ view.model[0].weight, upstream, atol=1e-7)


def test_gradients_within_inference_mode():
    view = view_of(mlp())
    with torch.inference_mode():
        snapshot = Snapshot(view, 0)
        run = snapshot.forward(grad=True)
        with torch.inference_mode(False), torch.enable_grad():
            loss = snapshot.loss_of(run.logits, snapshot.targets())
            assert torch.autograd.grad(loss, list(view.model.parameters()))


# Weights.


def test_weights_are_detached_shared_and_read_only_by_agreement():
    model = mlp()
    snapshot = Snapshot(ModelView(model, Probe()), 0)
    assert list(snapshot.weights) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(snapshot.weights) == 4
    assert snapshot.weights["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert not snapshot.weights["0.weight"].requires_grad
    with pytest.raises(KeyError):
        snapshot.weights["nothing"]


def test_samples_from_a_dataset_come_out_on_the_models_device_and_precision():
    model = mlp().double()
    probe = Probe(size=3, train=TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)))
    snapshot = Snapshot(ModelView(model, probe, {"train": probe.sample("train")}), 0)
    assert snapshot.batch().inputs.dtype == torch.float64
    assert snapshot.logits().shape == (3, 3)


def test_matrices_without_an_entry_are_none():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.flat = nn.Parameter(torch.zeros(2))
    view = ModelView(model, Probe())
    assert view.matrices == ["0.weight", "1.weight"]
    assert set(view.parameters) == {"empty", "flat", "0.weight", "0.bias", "1.weight", "1.bias"}
    with pytest.raises(ValueError, match="'empty' matches nothing"):
        view.select_matrices("empty")


def test_targets_that_are_all_to_be_ignored_leave_no_prediction():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    for targets, message in ((torch.full((4,), -100), "All targets of the train samples are -100"), (None, "have no targets")):
        probe = Probe(train=(x, targets) if targets is not None else x)
        view = ModelView(model, probe, {"train": probe.sample("train")})
        with pytest.raises(ValueError, match=message):
            view.require_loss()
    probe = Probe(train=(x, torch.tensor([-100, -100, -100, 1])))
    ModelView(model, probe, {"train": probe.sample("train")}).require_loss()
