"""Pruning by substitution: against pruning a copy of the model, on all kinds of models, alone and on two ranks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from grok_callbacks import CircuitComplexityMonitor, Probe, Recorder
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks._packing import unpack
from grok_callbacks.functional import pruning_masks
from grok_callbacks.tasks import DecoderTransformer
from tests._common import Plain, fit
from tests.metrics._ddp import run_on_two_ranks

INPUTS = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
PROBE = Probe(train=(INPUTS, torch.arange(20) % 3))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def measured(model, monitor=None, probe=PROBE):
    values = Recorder(model, [monitor or CircuitComplexityMonitor()], probe).record(step=0)
    return {key.removeprefix("grok/circuit_"): value for key, value in values.items()}


@torch.no_grad()
def reference(model, name, inputs=INPUTS, *, fraction=0.1, repeats=5, seed=0):
    """One pruned copy of the whole model after the other, and the KL by its definition."""
    results = []
    for mask in pruning_masks(model.get_parameter(name).shape, fraction, repeats, seed):
        pruned = copy.deepcopy(model).eval()
        pruned.get_parameter(name)[mask] = 0
        p, q = (net(inputs).double().softmax(-1) for net in (copy.deepcopy(model).eval(), pruned))
        results.append((p * (p / q).log()).sum(-1).mean())
    return torch.stack(results)


class TestValues:
    @pytest.mark.parametrize("settings", [{}, {"fraction": 0.5, "repeats": 3, "seed": 7}, {"memory_limit": 1}])
    def test_against_pruned_copies(self, settings):
        model = network()
        values = measured(model, CircuitComplexityMonitor("*", **settings))
        own = {key: value for key, value in settings.items() if key != "memory_limit"}
        for layer in ("0", "2", "4"):
            expected = reference(model, f"{layer}.weight", **own)
            assert values[f"complexity/{layer}"] == pytest.approx(expected.mean().item(), rel=1e-5)
            assert values[f"complexity_std/{layer}"] == pytest.approx(expected.std().item(), rel=1e-4)
        assert set(values) == {f"complexity{kind}/{layer}" for kind in ("", "_std") for layer in ("0", "2", "4")}

    def test_only_the_first_samples_are_looked_at(self):
        few = measured(network(), CircuitComplexityMonitor(num_samples=8))
        alone = measured(network(), probe=Probe(train=(INPUTS[:8], torch.arange(8) % 3)))
        assert few == pytest.approx(alone, rel=1e-6)
        assert few != pytest.approx(measured(network()), rel=1e-6)

    def test_rows_that_are_not_one_a_sample_are_all_looked_at(self):
        class Pairs(nn.Sequential):
            """Two rows of outputs for each sample."""

            def forward(self, x):
                return super().forward(torch.cat([x, x]))

        model = Pairs(*network())
        probe = Probe(train=(INPUTS, None), unpack=lambda batch: batch)
        assert measured(model, CircuitComplexityMonitor(num_samples=8), probe) == pytest.approx(
            measured(model, probe=probe), rel=1e-6
        )

    def test_same_seed_same_value_other_seed_another(self):
        model = network()
        first, second, other = (measured(model, CircuitComplexityMonitor(seed=seed)) for seed in (0, 0, 1))
        assert first == second
        assert first != other

    def test_one_mask_has_no_deviation(self):
        assert set(measured(network(), CircuitComplexityMonitor("4", repeats=1))) == {"complexity/4"}

    def test_sequences_leave_out_what_is_ignored(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        tokens = torch.randint(5, (10, 6))
        labels = torch.randint(4, (10, 6))
        labels[:, 2:] = -100
        values = measured(model, CircuitComplexityMonitor("3"), Probe(train=(tokens, labels)))
        kept = tokens[:, :2].reshape(-1)
        assert values["complexity/3"] == pytest.approx(reference(model, "3.weight", inputs=kept).mean().item(), rel=1e-5)

    def test_one_sample(self):
        model = network()
        values = measured(model, probe=Probe(train=(INPUTS[:1], torch.tensor([0]))))
        assert values["complexity/2"] == pytest.approx(reference(model, "2.weight", inputs=INPUTS[:1]).mean().item(), rel=1e-5)

    def test_nan_weights_are_said_once(self):
        model = network()
        nn.init.constant_(model[0].weight, math.nan)
        recorder = Recorder(model, [CircuitComplexityMonitor()], PROBE)
        with pytest.warns(UserWarning, match="nan at step 0; said once"):
            assert math.isnan(recorder.record(step=0)["grok/circuit_complexity/4"])
        assert math.isnan(recorder.record(step=1)["grok/circuit_complexity/4"])


class Tied(nn.Module):
    """One matrix for embedding and unembedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 6)
        self.unembedding = nn.Linear(6, 7, bias=False)
        self.unembedding.weight = self.embedding.weight

    def forward(self, tokens):
        return self.unembedding(self.hidden(self.embedding(tokens)).relu())


class Twice(nn.Module):
    """One layer, called twice, and one that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.spare, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        return self.last(self.shared(self.shared(self.first(x).relu()).relu()))


class Recurrent(nn.Module):
    """Cannot be batched over its weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x[:, None])[0][:, -1])


class Attention(nn.Module):
    """Attention's own matrices are no modules' weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0])


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


TOKENS = torch.arange(20) % 7
MODELS = {
    "plain": (network, INPUTS, {"2", "4"}),
    "tied": (Tied, TOKENS, {"embedding"}),
    "called twice": (Twice, INPUTS, {"shared", "last"}),
    "recurrent": (Recurrent, INPUTS, {"head"}),
    "attention": (Attention, INPUTS, {"head"}),
    "normalised": (normalised, INPUTS, {"4"}),
    "transformer": (
        lambda: DecoderTransformer(7, 7, d_model=8, num_heads=2, mlp_width=16),
        torch.cartesian_prod(TOKENS[:5], TOKENS[:4]),
        {"blocks.0.attention.output", "unembedding"},
    ),
}


class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    def test_layers_chosen_by_default_and_what_is_left_behind(self, name):
        make, inputs, layers = MODELS[name]
        model = make()
        before = {key: (tensor, tensor.clone(), tensor._version) for key, tensor in model.state_dict(keep_vars=True).items()}
        modes = [module.training for module in model.modules()]
        values = measured(model, probe=Probe(train=(inputs, torch.arange(20) % 3)))
        assert {key.removeprefix("complexity/") for key in values if "std" not in key} == layers
        for layer in layers:
            expected = reference(model, f"{layer}.weight", inputs=inputs).mean().item()
            assert values[f"complexity/{layer}"] == pytest.approx(expected, rel=1e-4, abs=1e-9)
        for key, tensor in model.state_dict(keep_vars=True).items():
            assert tensor is before[key][0]
            assert torch.equal(tensor, before[key][1])
            assert tensor._version == before[key][2]
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_tied_weights_are_pruned_in_both_places_and_stay_tied(self):
        model = Tied()
        measured(model, probe=Probe(train=(TOKENS, TOKENS)))
        assert model.unembedding.weight is model.embedding.weight

    def test_matrices_that_are_no_modules_weight_are_called_by_their_names(self):
        # Of a sequence of one step the state before it is zero, and so is what its weights do.
        values = measured(Recurrent(), CircuitComplexityMonitor("lstm.*", repeats=1))
        assert values == {
            "complexity/lstm.weight_ih_l0": values["complexity/lstm.weight_ih_l0"],
            "complexity/lstm.weight_hh_l0": 0,
        }
        assert values["complexity/lstm.weight_ih_l0"] > 0

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    @pytest.mark.parametrize(
        "compiled", [torch.jit.script, lambda model: torch.jit.trace(model, INPUTS)], ids=["script", "trace"]
    )
    def test_torchscript(self, compiled):
        layers = ["2", "4"]
        values, expected = (measured(model, CircuitComplexityMonitor(layers)) for model in (compiled(network()), network()))
        assert values == pytest.approx(expected, rel=1e-5)
        # Without module names to go by, the choice is made among all matrices.
        assert set(measured(compiled(network()))) == set(values)


class TestWhatCannotBe:
    def test_layer_that_is_never_called(self):
        with pytest.raises(ValueError, match="pruning 'spare' would say nothing"):
            measured(Twice(), CircuitComplexityMonitor("spare"))

    def test_one_output(self):
        model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
        with pytest.raises(ValueError, match="at least two classes"):
            measured(model, probe=Probe(train=(INPUTS, torch.rand(20, 1))))

    def test_wrong_glob(self):
        with pytest.raises(MisconfigurationException, match=r"`layers`: 'net.9' matches nothing.*net.2"):
            fit([CircuitComplexityMonitor("net.9")])

    @pytest.mark.parametrize(
        "settings", [{"fraction": 0}, {"fraction": 1.1}, {"repeats": 0}, {"memory_limit": 0}, {"num_samples": 0}]
    )
    def test_settings(self, settings):
        with pytest.raises(MisconfigurationException, match=f"`{next(iter(settings))}`"):
            CircuitComplexityMonitor(**settings)

    def test_a_model_that_comes_to_refuse_substitution_is_left_alone(self):
        class Moody(nn.Sequential):
            moody = False

            def forward(self, x):
                if self.moody and self[2].weight is not own:
                    raise RuntimeError("these are not my weights")
                return super().forward(x) * 1  # Or the layers after the pruned one would be called without their model.

        model = Moody(*network())
        own = model[2].weight
        recorder = Recorder(model, [CircuitComplexityMonitor("2")], PROBE)
        assert recorder.record(step=0)
        model.moody = True
        with pytest.warns(UserWarning, match="switched off for the rest of this run: RuntimeError: these are not my weights"):
            assert recorder.record(step=1) == {}
        assert model[2].weight is own


class TestWhereAChainOfLayersLeadsToTheOutputs:
    class Opaque(nn.Sequential):
        """The same network, whose outputs no module returns."""

        def forward(self, x):
            return super().forward(x) * 1

    def test_it_alone_is_run_and_says_the_same(self):
        layers = list(network())
        calls = []
        layers[0].register_forward_hook(lambda *_: calls.append(1))
        values, counts = [], []
        for model in (self.Opaque(*layers), nn.Sequential(*layers)):
            recorder = Recorder(model, [CircuitComplexityMonitor()], PROBE)
            recorder.record(step=0)
            calls.clear()
            values.append(recorder.record(step=1))
            counts.append(len(calls))
        assert values[1] == pytest.approx(values[0], rel=1e-6)
        # The common pass over the probe alone, and one more for each of two layers.
        assert counts == [3, 1]

    def test_not_for_a_weight_that_is_used_elsewhere(self):
        class TiedByHand(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

            def forward(self, x):
                return self.last(torch.relu(x @ self.last.weight) + self.first(x))

        model, inputs = TiedByHand(), torch.randn(20, 6)
        probe = Probe(train=(inputs, torch.randint(6, (20,))))
        expected = reference(model, "last.weight", inputs)
        values = measured(model, CircuitComplexityMonitor("last"), probe)
        assert values["complexity/last"] == pytest.approx(expected.mean().item(), rel=1e-5)


class TestInATrainer:
    def test_every_measurement_is_logged(self):
        torch.manual_seed(0)
        monitor = CircuitComplexityMonitor()
        _, trainer = fit([monitor])
        assert trainer.callback_metrics["grok/circuit_complexity/net.2"] > 0
        assert trainer.callback_metrics["grok/circuit_complexity_std/net.2"] > 0
        assert monitor.history["grok/circuit_complexity/net.2"].steps[0] == 0

    def test_training_is_the_one_without_it(self):
        torch.manual_seed(0)
        watched, plain = Plain(), Plain()
        plain.load_state_dict(watched.state_dict())
        fit([CircuitComplexityMonitor("*")], watched)
        fit([], plain)
        for (name, left), right in zip(watched.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(left, right), name


def on_rank(rank, settings):
    monitor, model = CircuitComplexityMonitor("*", **settings), network()
    values = measured(model, monitor)
    assert all(torch.equal(after, before) for after, before in zip(model.parameters(), network().parameters(), strict=True))
    return values, unpack(monitor.state_dict()["metric"])


def on_ranks(rank):
    # More masks than ranks, an odd number of them, and fewer masks than ranks.
    return [on_rank(rank, {"repeats": repeats}) for repeats in (5, 1)]


def test_ranks_share_the_masks():
    first, second = run_on_two_ranks(on_ranks)
    for (values, state), (others, other_state), repeats in zip(first, second, (5, 1), strict=True):
        assert values == others
        alone, alone_state = on_rank(0, {"repeats": repeats})
        assert values == pytest.approx(alone, rel=1e-5)
        # Every rank's state is the whole.
        for member in alone_state:
            for name in ("total", "count"):
                torch.testing.assert_close(
                    state[member]["states"][name], alone_state[member]["states"][name], rtol=1e-5, atol=0
                )
                assert torch.equal(state[member]["states"][name], other_state[member]["states"][name])
