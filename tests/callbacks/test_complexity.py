"""Rate-distortion complexity inside real networks."""

from __future__ import annotations

import bz2
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grok_callbacks import ComplexityMonitor, EverySteps, Probe, Recorder
from grok_callbacks.functional import generalization_bound, naive_size, rate_distortion
from tests._common import Plain, trainer
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


def test_what_it_is_told_of_the_training_set_counts():
    """A batch that is smaller than the probe was to be is no whole training set, if that is said to be larger."""
    model, (x, y) = network()
    whole, _ = measure(model, (x, y), size=50, num_train_samples=50)
    part, _ = measure(model, (x, y), size=60, num_train_samples=500)
    bits = whole["grok/complexity/bits"]
    assert "grok/complexity/bound" in whole
    assert "grok/complexity/bound_estimate" in part
    scaled = bits + 10 * (whole["grok/complexity/total_bits"] - bits)
    assert part["grok/complexity/total_bits_estimate"] == pytest.approx(scaled, rel=1e-9)


def test_targets_of_one_sequence_are_not_independent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))
    tokens = torch.randint(7, (12, 5))
    told, _ = measure(model, (tokens, tokens), size=20, num_train_samples=12)
    untold, _ = measure(model, (tokens, tokens), size=20)
    assert told == untold
    assert "grok/complexity/total_bits" in told
    assert "grok/complexity/bound_estimate" in told
    half, _ = measure(model, (tokens, tokens), size=12, num_train_samples=24)
    bits = told["grok/complexity/bits"]
    scaled = bits + 2 * (told["grok/complexity/total_bits"] - bits)
    assert half["grok/complexity/total_bits_estimate"] == pytest.approx(scaled, rel=1e-9)
    last = tokens.clone()
    last[:, :-1] = -100
    assert "grok/complexity/bound" in measure(model, (tokens, last), size=20)[0]


def test_where_a_decoder_needs_more_there_are_only_estimates():
    """Parameters that are left out, or statistics of a normalisation, are no part of K."""
    model, batch = network()
    normalised = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    layer_norm = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
    for net, settings, suffix in (
        (model, {"parameters": "0.*"}, "_estimate"),
        (normalised, {}, "_estimate"),
        (layer_norm, {}, ""),
    ):
        values, _ = measure(net, batch, size=60, **settings)
        assert {key for key in values if "bound" in key} == {f"grok/complexity/bound{suffix}"}
        assert {key for key in values if "total" in key} == {f"grok/complexity/total_bits{suffix}"}


def test_the_whole_training_set_of_a_trainer():
    """By default a part of a large set, all of it on demand."""
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(3000, 6), torch.randint(3, (3000,))), batch_size=1000)
    for probe, suffix in ((None, "_estimate"), (Probe(size=10_000), "")):
        fitted = trainer([ComplexityMonitor(1.0, probe=probe, on_error="raise")], max_steps=1)
        fitted.fit(Plain(), data)
        assert {key for key in fitted.callback_metrics if "bound" in key} == {f"grok/complexity/bound{suffix}"}


class Shifted(nn.Module):
    """A layer, a second use of its weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4, bias=False)
        self.second = nn.Linear(6, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.randn(500, 6))

    def forward(self, x):
        shifted = x + self.shift.mean(0)
        return self.first(shifted) + self.second(x)


def test_buffers_are_excluded_and_tied_weights_count_once():
    torch.manual_seed(0)
    model, batch = Shifted(), (torch.randn(50, 6), torch.randint(4, (50,)))
    values, _ = measure(model, batch, epsilon=0.01)
    weights = {"w": model.first.weight.detach(), "b": model.second.bias.detach()}

    def loss(coarse):
        named = {"first.weight": coarse["w"], "second.weight": coarse["w"], "second.bias": coarse["b"]}
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, batch[:1]).double(), batch[1])

    assert values["grok/complexity/bits"] == rate_distortion(weights, loss, 0.01).bits
    assert values["grok/complexity/naive_bits"] == naive_size(weights)


@pytest.mark.parametrize("settings", [{"encoding": "tight"}, {"two_sided": True}, {"encoding": "tight", "two_sided": True}])
def test_settings_reach_the_search(settings):
    """On a network that is worse than zeros, so that the rules differ."""
    model, (x, y) = network()
    nn.init.normal_(model[2].weight)
    values, monitor = measure(model, (x, y), epsilon=0.05, **settings)

    def loss(weights):
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)).double(), y)

    expected = rate_distortion(dict(model.named_parameters()), loss, 0.05, **settings)
    assert values["grok/complexity/bits"] == expected.bits
    assert values["grok/complexity/train_loss"] == pytest.approx(expected.loss, rel=1e-9)
    assert values["grok/complexity/bits"] != measure(model, (x, y), epsilon=0.05)[0]["grok/complexity/bits"]
    assert monitor.encoding == expected.encoding


def test_a_vacuous_bound_is_said_once(caplog):
    caplog.set_level("INFO")
    model, batch = network()
    recorder = Recorder(model, [ComplexityMonitor(0.1, schedule=EverySteps(1))], Probe(train=batch, size=60))
    values = [recorder.record(step)["grok/complexity/bound"] for step in range(2)]
    assert min(values) > 1
    assert len([record for record in caplog.records if "vacuous" in record.message]) == 1
    caplog.clear()
    many = torch.randn(4000, 6), torch.zeros(4000, dtype=torch.long)
    with torch.no_grad():
        model[2].bias[0] = 20.0
    values, _ = measure(model, many, size=5000)
    assert values["grok/complexity/bound"] < 1
    assert not [record for record in caplog.records if "vacuous" in record.message]


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
    values, monitor = measure(model, batch)
    figures = monitor.figures()
    assert set(figures) == {"complexity/rate_distortion"}
    (line,) = figures["complexity/rate_distortion"].axes[0].lines
    assert list(line.get_xdata()) == [1.0, 0.1]
    assert list(line.get_ydata()) == [values[f"grok/complexity/{key}"] / 8000 for key in ("bits", "bits_0.1")]
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
    for epsilon in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="`epsilon` must be positive and finite"):
            measure(model, batch, epsilon=epsilon)
    with pytest.raises(ValueError, match="`encoding` must be one of"):
        measure(model, batch, encoding="zip")
    with pytest.raises(ValueError, match="`num_train_samples` must be positive"):
        measure(model, batch, num_train_samples=0)
    with pytest.raises(ValueError, match="train"):
        Recorder(model, [ComplexityMonitor()], Probe()).record(step=0)


def measure_on_rank(rank):
    model, batch = network()
    nn.init.normal_(model[2].weight)
    values, monitor = measure(model, batch, epsilon=0.05, two_sided=True)
    return values, monitor._results[0].evaluations


def test_ranks_split_the_losses_and_agree():
    (first, losses), (second, others) = run_on_two_ranks(measure_on_rank)
    assert first == second
    alone, all_losses = measure_on_rank(0)
    assert first == alone
    assert max(losses, others) < all_losses


def test_one_logit_that_says_yes_or_no():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(20, 3)
    y = (x[:, 0] > 0).long()
    values, monitor = measure(model, (x, y), size=30)
    coarse = monitor._results[0].coarse_weights()
    logits = torch.func.functional_call(model, coarse, (x,)).detach().double()[:, 0]
    bits = nn.functional.binary_cross_entropy_with_logits(logits, y.double(), reduction="sum") / math.log(2)
    assert values["grok/complexity/total_bits"] == pytest.approx(values["grok/complexity/bits"] + float(bits), rel=1e-6)


def test_whole_numbers_that_are_no_classes_have_no_code_length():
    model, x = nn.Linear(3, 1), torch.randn(20, 3)
    monitor = ComplexityMonitor(on_error="raise")
    probe = Probe(train=(x, torch.arange(20)), loss=lambda outputs, targets: (outputs[:, 0] - targets).square().mean())
    values = Recorder(model, [monitor], probe).record(0)
    assert "grok/complexity/bits" in values
    assert not [key for key in values if "total" in key or "bound" in key]


def test_without_targets_it_is_told_at_the_start():
    model, (x, _) = network()
    with pytest.raises(ValueError, match="no targets; set `unpack`"):
        Recorder(model, [ComplexityMonitor()], Probe(train=x)).record(0)
