"""Circuit complexity against a plain sum, and pruning that leaves the model alone whatever the model is."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from grok_callbacks.functional import circuit_complexity, pruned_logits, pruning_masks


def slow_divergence(logits, pruned):
    """KL in nats by its definition, one sample and one class at a time."""
    total = 0.0
    for row, other in zip(logits.tolist(), pruned.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(math.exp(y) for y in values) for x in values] for values in (row, other))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(logits)


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestDivergence:
    def test_golden(self, golden):
        case = golden["circuit"]
        logits, pruned = (torch.tensor(case[key], dtype=torch.float64) for key in ("logits", "pruned_logits"))
        torch.testing.assert_close(circuit_complexity(logits, pruned).item(), case["circuit_complexity"])

    def test_slow_reference_and_repeats(self):
        logits, pruned = random_logits(9, 5), random_logits(3, 9, 5, seed=1)
        result = circuit_complexity(logits, pruned)
        assert result.shape == (3,)
        for value, repeat in zip(result, pruned, strict=True):
            assert value.item() == pytest.approx(slow_divergence(logits, repeat), rel=1e-12)
            assert circuit_complexity(logits, repeat) == value

    def test_zero_for_equal_predictions_and_else_positive(self):
        logits = random_logits(50, 7)
        assert circuit_complexity(logits, logits) == 0
        assert circuit_complexity(logits, logits + 3).item() == pytest.approx(0, abs=1e-14)
        nearly = [circuit_complexity(logits, logits + 1e-9 * random_logits(50, 7, seed=seed)) for seed in range(20)]
        assert min(nearly) >= 0

    def test_large_logits_neither_overflow_nor_vanish(self):
        logits = torch.tensor([[5000.0, 0.0], [0.0, 5000.0]])
        assert circuit_complexity(logits, logits.flip(1)).item() == pytest.approx(5000)

    def test_classes_of_probability_zero(self):
        masked = torch.tensor([[1.0, 1.0, -math.inf]])
        assert circuit_complexity(masked, masked) == 0
        assert circuit_complexity(masked, torch.tensor([[1.0, 1.0, 1.0]])).item() == pytest.approx(math.log(1.5))
        assert circuit_complexity(torch.ones(1, 3), masked) == math.inf

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_one_bad_logit_spoils_the_value(self, bad):
        # Beside it, the class that the bad logit belongs to has a probability that rounds to zero.
        logits = torch.tensor([[2000.0, -2000.0], [1.0, 0.0]])
        spoilt = logits.clone()
        spoilt[0, 1] = bad
        assert circuit_complexity(logits, spoilt).isnan()
        assert circuit_complexity(spoilt, logits).isnan()
        assert circuit_complexity(logits, torch.stack([logits, spoilt])).isnan().tolist() == [False, True]

    def test_half_logits_are_widened_first(self):
        logits, pruned = random_logits(20, 4).half(), random_logits(20, 4, seed=1).half()
        assert circuit_complexity(logits, pruned) == circuit_complexity(logits.double(), pruned.double())

    @pytest.mark.parametrize(
        ("logits", "pruned", "name"),
        [
            (torch.ones(3), torch.ones(3), "logits"),
            (torch.ones(0, 3), torch.ones(0, 3), "logits"),
            (torch.ones(2, 3), torch.ones(3, 2), "pruned_logits"),
            (torch.ones(2, 3), torch.ones(3), "pruned_logits"),
            (torch.ones(2, 3), torch.ones(0, 2, 3), "pruned_logits"),
            (torch.ones(2, 3), torch.ones(1, 1, 2, 3), "pruned_logits"),
        ],
    )
    def test_wrong_shapes(self, logits, pruned, name):
        with pytest.raises(ValueError, match=f"^{name} must"):
            circuit_complexity(logits, pruned)


class TestMasks:
    def test_fraction(self):
        masks = pruning_masks((300, 300), 0.1, repeats=4)
        # The standard deviation of a mask's share is 0.001.
        shares = masks.double().mean((1, 2))
        assert ((shares - 0.1).abs() < 0.005).all()
        assert shares.unique().numel() == 4
        overlaps = (masks[0] & masks[1]).double().mean()
        assert abs(overlaps - 0.01) < 0.002

    def test_extremes(self):
        assert not pruning_masks((9, 9), 0.0).any()
        assert pruning_masks((9, 9), 1.0).all()

    def test_depends_on_the_arguments_alone(self):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = pruning_masks((40, 30), 0.2, repeats=3, seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(7)
        assert torch.equal(pruning_masks((40, 30), 0.2, repeats=3, seed=5), first)
        assert torch.equal(pruning_masks((40, 30), 0.2, repeats=6, seed=5)[:3], first)
        assert not torch.equal(pruning_masks((40, 30), 0.2, repeats=3, seed=6), first)

    def test_larger_fractions_prune_more_of_the_same(self):
        small, large = (pruning_masks((40, 30), fraction) for fraction in (0.1, 0.3))
        assert (small <= large).all()

    def test_wrong_arguments(self):
        for fraction in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match="fraction"):
                pruning_masks((2, 2), fraction)
        with pytest.raises(ValueError, match="repeats"):
            pruning_masks((2, 2), repeats=0)


class Tied(nn.Module):
    """One matrix as embedding and as read-out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.read_out = nn.Linear(8, 10, bias=False)
        self.read_out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.read_out(self.embedding(tokens).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(8, 6, batch_first=True)
        self.read_out = nn.Linear(6, 4)

    def forward(self, inputs):
        return self.read_out(self.recurrent(inputs[:, None])[0][:, -1])


class Branching(nn.Module):
    """What it does depends on the values."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.read_out = nn.Linear(6, 4)

    def forward(self, inputs):
        hidden = self.first(inputs)
        return self.read_out(hidden if hidden.sum().item() > 0 else -hidden)


class Writing(nn.Module):
    """Writes its result into a buffer of its own making."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 4)

    def forward(self, inputs):
        result = inputs.new_zeros(len(inputs), 4)
        result[:] = self.first(inputs)
        return result


class Keeping(nn.Module):
    """Keeps an activation as an attribute."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.read_out = nn.Linear(6, 4)
        self.last = None

    def forward(self, inputs):
        self.last = self.first(inputs).relu()
        return self.read_out(self.last)


def perceptron():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def convolutional():
    layers = [nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(4, 4)]
    return nn.Sequential(*layers)


def transformer():
    return nn.Sequential(nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten())


CASES = {
    "perceptron, first": (perceptron, "0.weight", True),
    "perceptron, middle": (perceptron, "2.weight", True),
    "perceptron, bias": (perceptron, "2.bias", True),
    "tied": (Tied, "embedding.weight", True),
    "convolution": (convolutional, "1.weight", True),
    "transformer": (transformer, "1.self_attn.in_proj_weight", True),
    "keeping": (Keeping, "first.weight", True),
    "recurrent": (Recurrent, "recurrent.weight_ih_l0", False),
    "branching": (Branching, "first.weight", False),
    "writing": (Writing, "first.weight", False),
}


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    inputs = torch.randint(10, (6, 3)) if make is Tied else torch.randn(6, 8)
    return model, inputs


def name_of(weights):
    # Not the weights themselves: a tensor of vmap's that outlives it is what the function watches for.
    (name,) = weights
    return name


def caller(model, inputs, calls=None):
    def call(weights):
        if calls is not None:
            calls.append(name_of(weights))
        return torch.func.functional_call(model, weights, (inputs,))

    return call


def in_place_reference(model, inputs, name, masks):
    """The obvious way, on a copy of the model: write zeros into the weight, one mask after another."""
    results = []
    for mask in masks:
        pruned = copy.deepcopy(model)
        with torch.no_grad():
            dict(pruned.named_parameters())[name].masked_fill_(mask, 0)
            results.append(pruned(inputs))
    return torch.stack(results)


class TestPrunedLogits:
    @pytest.mark.parametrize("inference_mode", [False, True])
    @pytest.mark.parametrize("case", CASES)
    def test_same_as_writing_zeros_and_the_model_is_left_alone(self, case, inference_mode):
        make, name, can_batch = CASES[case]
        model, inputs = build(make)
        before = copy.deepcopy(model.state_dict())
        random_state = torch.get_rng_state()
        weight = dict(model.named_parameters())[name].detach()
        masks = pruning_masks(weight.shape, 0.3, repeats=5)
        calls = []
        with torch.inference_mode(inference_mode):
            result = pruned_logits(caller(model, inputs, calls), name, weight, masks)

        expected = in_place_reference(model, inputs, name, masks)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
        # The reference itself is no constant.
        assert (expected - model(inputs)).abs().amax((1, 2)).min() > 1e-3
        if can_batch:
            # One alone, the others together; a kept activation takes one more.
            assert len(calls) == (3 if make is Keeping else 2)
        assert not result.requires_grad
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_a_kept_activation_is_an_ordinary_tensor_afterwards(self):
        model, inputs = build(Keeping)
        weight = model.first.weight.detach()
        pruned_logits(caller(model, inputs), "first.weight", weight, pruning_masks(weight.shape, repeats=4))
        assert model.last.shape == (6, 6)
        copy.deepcopy(model)
        pickle.dumps(model)

    def test_weights_that_share_memory_with_the_substitute_stay(self):
        # Tied by a view, which no list of parameters shows.
        model, inputs = build(perceptron)
        weight = model[2].weight.detach()
        view = weight.view(-1)
        before = view.clone()
        pruned_logits(caller(model, inputs), "2.weight", weight, pruning_masks(weight.shape, 1.0, repeats=3))
        assert torch.equal(view, before)

    def test_memory_limit(self):
        model, inputs = build(perceptron)
        weight = model[2].weight.detach()
        masks = pruning_masks(weight.shape, 0.3, repeats=9)
        calls = []
        expected = pruned_logits(caller(model, inputs), "2.weight", weight, masks)
        one_pass = weight.nbytes + inputs.shape[0] * (16 + 16 + 16 + 16 + 4) * 4
        for limit, passes in ((1, 9), (2 * one_pass - 1, 9), (2 * one_pass, 5), (4 * one_pass, 3), (8 * one_pass, 2)):
            calls.clear()
            result = pruned_logits(caller(model, inputs, calls), "2.weight", weight, masks, memory_limit=limit)
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
            assert len(calls) == passes

    def test_fraction_zero_and_a_single_mask(self):
        model, inputs = build(perceptron)
        weight = model[2].weight.detach()
        untouched = pruned_logits(caller(model, inputs), "2.weight", weight, pruning_masks(weight.shape, 0.0, repeats=1))
        with torch.no_grad():
            logits = model(inputs)
        assert torch.equal(untouched, logits[None])
        assert circuit_complexity(logits, untouched).tolist() == [0]

    def test_same_seed_same_value(self):
        model, inputs = build(perceptron)
        weight = model[2].weight.detach()
        values = [
            pruned_logits(caller(model, inputs), "2.weight", weight, pruning_masks(weight.shape, 0.3, seed=seed))
            for seed in (0, 0, 1)
        ]
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])

    def test_an_error_of_the_model_is_the_model_s_own(self):
        def broken(weights):
            raise KeyError("the model's own")

        with pytest.raises(KeyError, match="the model's own"):
            pruned_logits(broken, "w", torch.ones(2, 2), pruning_masks((2, 2)))

    def test_an_error_that_a_batch_alone_meets_is_none(self):
        weight = torch.ones(2, 2)

        def scarce(weights):
            if torch._C._functorch.is_batchedtensor(weights["w"]):
                raise torch.OutOfMemoryError("no memory for a batch")
            return weights["w"] + 1

        masks = pruning_masks((2, 2), 0.5, repeats=3)
        assert torch.equal(pruned_logits(scarce, "w", weight, masks), weight.masked_fill(masks, 0) + 1)

    def test_an_operation_that_refuses_to_be_watched(self):
        class Shy(torch.autograd.Function):
            @staticmethod
            def forward(ctx, weight):
                if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                    raise RuntimeError("watched")
                return weight + 1

        weight = torch.ones(2, 2)
        masks = pruning_masks((2, 2), 0.5, repeats=3)
        result = pruned_logits(lambda weights: Shy.apply(weights["w"]), "w", weight, masks)
        assert torch.equal(result, weight.masked_fill(masks, 0) + 1)

    @pytest.mark.parametrize("masks", [torch.ones(3, 2, 2), torch.ones(2, 2).bool(), torch.ones(0, 2, 2).bool()])
    def test_wrong_masks(self, masks):
        with pytest.raises(ValueError, match="masks must be boolean"):
            pruned_logits(lambda weights: weights["w"], "w", torch.ones(2, 2), masks)

    def test_wrong_memory_limit(self):
        with pytest.raises(ValueError, match="memory_limit"):
            pruned_logits(lambda weights: weights["w"], "w", torch.ones(2, 2), pruning_masks((2, 2)), memory_limit=0)
