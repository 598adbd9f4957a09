"""Sparsity of a network's hidden activations, found without naming them, against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grok_callbacks import ActivationSparsityMonitor, Probe, Recorder
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks._packing import unpack
from tests._common import fit

INPUTS = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
PROBE = Probe(train=(INPUTS, torch.arange(20) % 3))


def measured(model, monitor=None, probe=PROBE):
    values = Recorder(model, [monitor or ActivationSparsityMonitor()], probe).record(step=0)
    return {key.removeprefix("grok/sparsity/"): value for key, value in values.items()}


def share_below(threshold, activations):
    values = activations.double().flatten().tolist()
    return sum(value < threshold for value in values) / len(values)


def network(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), activation(), nn.Dropout(0.5), nn.Linear(8, 5), activation(), nn.Linear(5, 3))


class Functional(nn.Module):
    """Activations as functions, with dropout and reshaping on the way to who takes them."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.activation = activation
        self.first, self.drop, self.second, self.last = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        self.hidden = self.activation(self.first(x))
        x = self.second(F.dropout(self.hidden, 0.5, self.training).reshape(-1, 8))
        return self.last(self.activation(x))


class TestWhatIsFound:
    @pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU])
    def test_modules(self, activation):
        model = network(activation).eval()
        values = measured(model)
        assert set(values) == {"1", "4"}
        for site in values:
            assert values[site] == share_below(0.1, model[: int(site) + 1](INPUTS))

    @pytest.mark.parametrize("activation", [F.relu, torch.relu, F.gelu, F.silu, torch.tanh])
    def test_functions(self, activation):
        model = Functional(activation).eval()
        values = measured(model)
        assert set(values) == {"second:input", "last:input"}
        model(INPUTS)
        assert values["second:input"] == share_below(0.1, model.hidden)

    def test_inplace_activations_are_seen_as_they_leave(self):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
        assert measured(model)["1"] == share_below(0.1, model[0](INPUTS).relu())

    def test_a_module_called_twice_has_a_key_for_each_call(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 3), nn.ReLU()

            def forward(self, x):
                return self.b(self.act(self.a(self.act(self.a(x)))))

        model = Twice()
        first = model.act(model.a(INPUTS))
        expected = {"act@0": share_below(0.1, first), "act@1": share_below(0.1, model.act(model.a(first)))}
        assert measured(model) == expected

    def test_a_module_never_called_is_not_measured(self):
        model = network(nn.ReLU)
        model[0].spare = nn.ReLU()
        assert set(measured(model)) == {"1", "4"}
        with pytest.raises(ValueError, match=r"`layers`: '0.spare' matches nothing"):
            measured(model, ActivationSparsityMonitor(layers="0.spare"))

    def test_named_layers(self):
        model = network(nn.ReLU)
        values = measured(model, ActivationSparsityMonitor(layers=["3", "4"]))
        assert set(values) == {"3", "4"}
        assert values["3"] == share_below(0.1, model[:4].eval()(INPUTS))

    def test_convolutions(self):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
        images = torch.rand(5, 1, 8, 8)
        values = measured(model, probe=Probe(train=(images, torch.zeros(5, dtype=torch.long))))
        assert values == {"1": share_below(0.1, model[:2](images))}


class TestThreshold:
    @pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.3])
    def test_absolute(self, threshold):
        model = network(nn.GELU).eval()
        assert measured(model, ActivationSparsityMonitor(threshold))["4"] == share_below(threshold, model[:5](INPUTS))

    def test_relative_does_not_depend_on_scale(self):
        model = network(nn.ReLU).eval()
        activations = model[:2](INPUTS).double()
        expected = share_below(0.5 * activations.square().mean().sqrt().item(), activations)
        monitor = ActivationSparsityMonitor(0.5, relative=True)
        assert measured(model, monitor)["1"] == expected
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1e-3)
        assert measured(model, ActivationSparsityMonitor(0.5, relative=True))["1"] == expected
        assert measured(model, ActivationSparsityMonitor(0.5))["1"] == 1
        # Two numbers a layer, however many activations there are.
        states = unpack(monitor.state_dict()["metric"])
        assert all(value.numel() == 1 for member in states.values() for value in member["states"].values())

    def test_silent_layer(self):
        model = network(nn.ReLU)
        nn.init.constant_(model[0].bias, -100.0)
        for relative in (False, True):
            assert measured(model, ActivationSparsityMonitor(relative=relative))["1"] == 1

    @pytest.mark.parametrize("threshold", [math.nan, math.inf])
    def test_not_a_number(self, threshold):
        with pytest.raises(MisconfigurationException, match="`threshold`"):
            ActivationSparsityMonitor(threshold)


class TestInATrainer:
    def test_every_measurement_is_logged(self):
        monitor = ActivationSparsityMonitor()
        _, trainer = fit([monitor])
        assert 0 < trainer.callback_metrics["grok/sparsity/net.1"] < 1
        assert monitor.history["grok/sparsity/net.1"].steps[0] == 0

    def test_wrong_glob(self):
        with pytest.raises(MisconfigurationException, match=r"`layers`: 'net.relu' matches nothing"):
            fit([ActivationSparsityMonitor(layers="net.relu")])

    def test_no_hidden_activation(self):
        with pytest.raises(ValueError, match="no hidden activation"):
            measured(nn.Sequential(nn.Linear(6, 3)))

    @pytest.mark.parametrize("relative", [False, True])
    def test_nan_weights_are_said_once(self, relative):
        model = network(nn.ReLU)
        nn.init.constant_(model[0].weight, math.nan)
        recorder = Recorder(model, [ActivationSparsityMonitor(relative=relative)], PROBE)
        with pytest.warns(UserWarning, match="nan at step 0; said once"):
            assert math.isnan(recorder.record(step=0)["grok/sparsity/1"])
        assert math.isnan(recorder.record(step=1)["grok/sparsity/1"])

    def test_one_sample(self):
        model = network(nn.ReLU).eval()
        values = measured(model, probe=Probe(train=(INPUTS[:1], torch.tensor([0]))))
        assert values["1"] == share_below(0.1, model[:2](INPUTS[:1]))
