"""Rate-distortion complexity inside real networks."""

from __future__ import annotations

import bz2
import math

import pytest
import torch
from torch import nn

from grok_callbacks import ComplexityMonitor, Probe, Recorder
from grok_callbacks.functional import generalization_bound, rate_distortion
from tests.metrics._ddp import run_on_two_ranks


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    return model, (torch.randn(50, 6), torch.randint(4, (50,)))


def measure(model, batch, size=50, validation=None, **settings):
    monitor = ComplexityMonitor(on_error="raise", **settings)
    recorder = Recorder(model, [monitor], Probe(train=batch, validation=validation, size=size))
    return recorder.record(step=0), monitor


def test_values_are_those_of_the_function_and_of_its_coarse_model():
    model, (x, y) = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    values, _ = measure(model, (x, y), size=60, validation=(x[:20], y[:20]))

    def loss(weights):
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)).double(), y)

    big, small = rate_distortion(dict(model.named_parameters()), loss, (1.0, 0.1))
    assert values["grok/complexity/bits"] == big.bits
    assert values["grok/complexity/bits_0.1"] == small.bits
    coarse = big.coarse_weights()
    logits = torch.func.functional_call(model, coarse, (x,)).detach()
    assert values["grok/complexity/train_loss"] == pytest.approx(float(loss(coarse).detach()), rel=1e-9)
    validation_loss = nn.functional.cross_entropy(logits[:20].double(), y[:20])
    assert values["grok/complexity/validation_loss"] == pytest.approx(float(validation_loss), rel=1e-6)
    data_bits = float(nn.functional.cross_entropy(logits.double(), y, reduction="sum")) / math.log(2)
    # Fewer samples than the probe was to hold: all there are, so nothing is an estimate.
    assert values["grok/complexity/total_bits"] == pytest.approx(big.bits + data_bits, rel=1e-6)
    risk = float((logits.argmax(1) != y).double().mean())
    assert values["grok/complexity/bound"] == pytest.approx(float(generalization_bound(risk, big.bits, 50)), rel=1e-9)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_part_of_the_training_set_gives_estimates():
    model, (x, y) = network()
    values, _ = measure(model, (x, y), size=50, num_train_samples=500)
    assert "grok/complexity/total_bits_estimate" in values
    assert "grok/complexity/bound_estimate" in values
    assert "grok/complexity/bound" not in values


def test_naive_size_is_that_of_bzip2():
    model, batch = network()
    values, _ = measure(model, batch)
    raw = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    assert values["grok/complexity/naive_bits"] == pytest.approx(8 * len(bz2.compress(raw)), rel=0.02)
    assert values["grok/complexity/bits"] < values["grok/complexity/naive_bits"]


def test_regression_has_no_bound():
    torch.manual_seed(0)
    values, _ = measure(nn.Linear(3, 2), (torch.randn(20, 3), torch.randn(20, 2)), epsilon=0.1)
    assert "grok/complexity/bits" in values
    assert not [key for key in values if "bound" in key]


def test_figure_needs_several_epsilons():
    model, batch = network()
    assert set(measure(model, batch)[1].figures()) == {"complexity/rate_distortion"}
    assert measure(model, batch, epsilon=1.0)[1].figures() == {}


def test_nan_weights_give_nan_and_one_warning():
    model, batch = network()
    nn.init.constant_(model[0].weight, math.nan)
    monitor = ComplexityMonitor()
    recorder = Recorder(model, [monitor], Probe(train=batch))
    with pytest.warns(UserWarning, match="is nan"):
        values = recorder.record(step=0)
    assert math.isnan(values["grok/complexity/bits"])
    assert recorder.switched_off == []


def test_bad_settings_name_the_argument():
    model, batch = network()
    with pytest.raises(ValueError, match="`epsilon` must be positive"):
        measure(model, batch, epsilon=0.0)
    with pytest.raises(ValueError, match="train"):
        Recorder(model, [ComplexityMonitor()], Probe()).record(step=0)


def measure_on_rank(rank):
    model, batch = network()
    return measure(model, batch)[0]


def test_ranks_split_the_losses_and_agree():
    first, second = run_on_two_ranks(measure_on_rank)
    assert first == second
    alone = measure_on_rank(0)
    assert first["grok/complexity/bits"] == pytest.approx(alone["grok/complexity/bits"], rel=0.05)
