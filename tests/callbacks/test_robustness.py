"""RobustnessMonitor against the definitions, on networks and noise made by hand."""

from __future__ import annotations

import math
import warnings

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grok_callbacks import Probe, Recorder, RobustnessMonitor, default_callbacks
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks._packing import unpack
from grok_callbacks.functional import gram_matrix, matrix_entropy, matrix_mutual_information
from grok_callbacks.tasks import PairTaskDataModule
from grok_callbacks.tasks.modules import DecoderTransformer, EmbeddingMLP, OneHotMLP
from tests._common import Plain, samples

PREFIX = "grok/robustness/"
KEYS = {"pmi", "pmi_se", "mid", "pe", "pe_se", "ed", "input_gradient"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))


def inputs(count: int = 20) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1))


def record(model, x, **settings):
    probe = Probe(train=(x, torch.zeros(len(x), dtype=torch.long)))
    values = Recorder(model, [RobustnessMonitor(probe=probe, on_error="raise", **settings)]).record(step=0)
    assert all(key.startswith(PREFIX) for key in values)
    return {key.removeprefix(PREFIX): value for key, value in values.items()}


@torch.no_grad()
def information(features, logits, alpha):
    grams = gram_matrix(features), gram_matrix(logits)
    return matrix_mutual_information(*grams, alpha).item(), matrix_entropy(grams[1], alpha).item()


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_values_are_those_of_the_definition(alpha):
    model, x = network(), inputs()
    values = record(model, x, alpha=alpha, noise_scale=0.3, num_draws=4, seed=5)
    generator = torch.Generator().manual_seed(5)
    noisy = [x + 0.3 * torch.randn(x.shape, generator=generator) for _ in range(4)]
    draws = torch.tensor([information(model[0](z), model(z), alpha) for z in noisy], dtype=torch.float64)
    clean = torch.tensor(information(model[0](x), model(x), alpha), dtype=torch.float64)
    for index, (perturbed, difference) in enumerate((("pmi", "mid"), ("pe", "ed"))):
        assert values[perturbed] == pytest.approx(draws[:, index].mean().item(), rel=1e-5)
        assert values[difference] == pytest.approx((draws[:, index] - clean[index]).mean().item(), abs=1e-5)
        assert values[f"{perturbed}_se"] == pytest.approx(draws[:, index].std().item() / 2, rel=1e-3)
    assert set(values) == KEYS


def test_one_number_a_sample_may_come_without_a_dimension_of_its_own():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1)), inputs()
    measured = []
    for targets in (torch.zeros(len(x), 1), torch.zeros(len(x))):
        monitor = RobustnessMonitor(probe=Probe(train=(x, targets)), on_error="raise")
        measured.append(Recorder(model, [monitor]).record(step=0))
    assert measured[0] == measured[1]
    assert len(measured[0]) == len(KEYS)


def test_only_the_first_samples_are_looked_at():
    model, x = network(), inputs()
    part, few, all_samples = (record(model, x, num_samples=8), record(model, x[:8]), record(model, x))
    assert part == pytest.approx(few, rel=1e-5)
    assert part["input_gradient"] != all_samples["input_gradient"]


def test_the_gradient_is_that_of_the_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3))
    values = record(model, torch.randn(400, 5), gradient_probes=64)
    assert values["input_gradient"] == pytest.approx(model[0].weight.square().sum().item() / 3, rel=0.05)


def test_without_noise_nothing_differs():
    values = record(network(), inputs(), noise_scale=0.0)
    assert values["mid"] == values["ed"] == values["pmi_se"] == 0.0
    assert values["pmi"] > 0


def test_noise_is_the_same_at_every_step_and_depends_on_the_seed():
    model, x = network(), inputs()
    probe = Probe(train=(x, torch.zeros(len(x), dtype=torch.long)))
    recorder = Recorder(model, [RobustnessMonitor(probe=probe)])
    first, second = recorder.record(0), recorder.record(1)
    assert first
    assert first == second
    assert record(model, x, seed=1)["pmi"] != record(model, x, seed=0)["pmi"]


def test_one_draw_has_no_standard_error():
    assert set(record(network(), inputs(), num_draws=1)) == KEYS - {"pmi_se", "pe_se"}


def test_several_layers_have_a_key_each():
    values = record(network(), inputs(), layers=["0", "1"])
    assert {"pmi/0", "pmi/1", "mid/0", "mid/1", "pmi_se/0", "pmi_se/1", "pe", "ed"} < set(values)
    assert values["pmi/0"] == pytest.approx(record(network(), inputs(), layers="0")["pmi"])


def test_tokens_are_jittered_at_the_embedding():
    torch.manual_seed(0)
    model = EmbeddingMLP(11, 11)
    pairs = torch.cartesian_prod(torch.arange(11), torch.arange(11))
    values = record(model, pairs, num_draws=2, seed=3)
    generator = torch.Generator().manual_seed(3)
    embedded = model.embedding(pairs).detach()
    draws = []
    for _ in range(2):
        noisy = embedded + 0.4 * torch.randn(len(pairs), 128, generator=generator).view_as(embedded)
        draws.append(information(noisy, model.mlp(noisy.flatten(1)), 1.0))
    assert values["pmi"] == pytest.approx(sum(draw[0] for draw in draws) / 2, rel=1e-5)
    assert values["pe"] == pytest.approx(sum(draw[1] for draw in draws) / 2, rel=1e-5)


def test_an_embedding_called_for_each_operand_counts_whole():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(8, 7)

        def forward(self, pairs):
            return self.head(torch.cat([self.embedding(pairs[:, 0]), self.embedding(pairs[:, 1])], 1))

    class Together(Apart):
        def forward(self, pairs):
            return self.head(self.embedding(pairs).flatten(1))

    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    results = []
    for make in (Apart, Together):
        torch.manual_seed(0)
        results.append(record(make(), pairs))
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_one_hot_networks_are_jittered_at_their_first_layer():
    torch.manual_seed(0)
    model = OneHotMLP(5, 5)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    one_hot = F.one_hot(pairs, 5).flatten(1).float()
    values, direct = record(model, pairs), record(model.mlp, one_hot, noise_scale=0.4)
    assert values == pytest.approx(direct, rel=1e-5)


def test_positions_shared_by_all_samples_get_no_noise():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.token, self.head = nn.Embedding(3, 4), nn.Embedding(7, 4), nn.Linear(12, 7)

        def forward(self, tokens):
            position = self.position(torch.arange(tokens.shape[1]))
            return self.head((self.token(tokens) + position).flatten(1))

    tokens = torch.randint(7, (10, 3), generator=torch.Generator().manual_seed(0))
    monitor = RobustnessMonitor(probe=Probe(train=(tokens, tokens[:, 0])), on_error="raise")
    assert set(Recorder(Positions(), [monitor]).record(0)) == {PREFIX + key for key in KEYS}
    assert monitor._noise_sites == ["token"]
    monitor = RobustnessMonitor(probe=Probe(train=(tokens, tokens[:, 0])), noise_sites="position", on_error="raise")
    with pytest.raises(ValueError, match="noise_sites"):
        Recorder(Positions(), [monitor]).record(0)


def test_inputs_in_a_structure():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, left, right, count):
            assert count.dtype == torch.int64
            return self.fc(torch.cat([left, right], 1))

    torch.manual_seed(0)
    model, x = Two(), torch.randn(12, 5)
    batch = {"left": x[:, :2], "right": x[:, 2:], "count": torch.ones(12, dtype=torch.long), "labels": torch.zeros(12).long()}
    monitor = RobustnessMonitor(probe=Probe(train=batch), on_error="raise")
    values = Recorder(model, [monitor]).record(0)
    assert values == pytest.approx({PREFIX + key: value for key, value in record(nn.Sequential(model.fc), x).items()}, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (inputs(1), {"pmi": 0.0, "pe": 0.0, "mid": 0.0, "ed": 0.0}),
        (torch.zeros(6, 4), {}),
    ],
)
def test_few_or_empty_samples(x, expected):
    values = record(network(), x)
    assert all(math.isfinite(value) for value in values.values())
    assert {key: values[key] for key in expected} == pytest.approx(expected, abs=1e-9)


def test_weights_that_are_not_numbers_give_nan_and_one_warning():
    model = network()
    nn.init.constant_(model[2].weight, torch.nan)
    probe = Probe(train=(inputs(), torch.zeros(20, dtype=torch.long)))
    recorder = Recorder(model, [RobustnessMonitor(probe=probe, on_error="raise")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = recorder.record(0)
        recorder.record(1)
    assert math.isnan(values[f"{PREFIX}pmi"])
    assert math.isnan(values[f"{PREFIX}pe"])
    assert sum("robustness" in str(warning.message) for warning in caught) == 1


def test_half_precision_networks():
    values = record(network().to(torch.bfloat16), inputs())
    assert values["pmi"] == pytest.approx(record(network(), inputs())["pmi"], rel=0.05)


def test_nothing_is_left_behind_in_the_metric_and_the_model():
    model = network()
    model[0].weight.grad = torch.ones(7, 4)
    monitor = RobustnessMonitor(probe=Probe(train=(inputs(), torch.zeros(20, dtype=torch.long))))
    recorder = Recorder(model, [monitor])
    recorder.record(0)
    assert model[0].weight.grad.equal(torch.ones(7, 4))
    assert model[2].weight.grad is None
    assert all(member["states"]["features1"] == [] for member in unpack(monitor.state_dict()["metric"]).values())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"on": "weights"}, "on"),
        ({"noise_scale": math.nan}, "noise_scale"),
        ({"noise_scale": -0.1}, "noise_scale"),
        ({"num_draws": 0}, "num_draws"),
        ({"num_samples": 0}, "num_samples"),
        ({"gradient_probes": 1.5}, "gradient_probes"),
        ({"on": "input", "noise_sites": "0"}, "noise_sites"),
    ],
)
def test_bad_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        RobustnessMonitor(**settings)


def fit(module, data, *monitors):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=4, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(monitors),
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer.callback_metrics


def test_noise_on_integer_inputs_is_refused_at_the_start_of_fit():
    data = PairTaskDataModule("add", 5)
    with pytest.raises(MisconfigurationException, match='on="embedding"'):
        fit(EmbeddingMLP(5, 5), data, RobustnessMonitor(on="input"))


@pytest.mark.parametrize("settings", [{"layers": "nowhere"}, {"noise_sites": "nowhere"}])
def test_a_wrong_name_is_refused_at_the_start_of_fit(settings):
    with pytest.raises(MisconfigurationException, match="nowhere"):
        fit(EmbeddingMLP(5, 5), PairTaskDataModule("add", 5), RobustnessMonitor(**settings))


@pytest.mark.parametrize("make", [EmbeddingMLP, OneHotMLP, DecoderTransformer])
def test_in_a_trainer(make):
    values = fit(make(5, 5), PairTaskDataModule("add", 5), RobustnessMonitor(on_error="raise"))
    logged = {key.removeprefix(PREFIX): float(value) for key, value in values.items() if key.startswith(PREFIX)}
    assert set(logged) == KEYS
    assert all(math.isfinite(value) for value in logged.values())


def test_in_the_standard_preset():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = fit(Plain(), torch.utils.data.DataLoader(samples(), batch_size=8), *default_callbacks("standard"))
    assert f"{PREFIX}pmi" in values
