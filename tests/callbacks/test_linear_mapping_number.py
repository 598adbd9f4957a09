"""The linear mapping number inside real networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from grok_callbacks import LinearMappingNumberMonitor, Probe, Recorder
from grok_callbacks.callbacks._clusters import order_by_cluster
from grok_callbacks.callbacks._tail import is_cut, tail_after
from grok_callbacks.functional import linear_connectivity, linear_mapping_number
from grok_callbacks.snapshot import ModelView
from grok_callbacks.tasks import DecoderTransformer, EmbeddingMLP, PairTaskDataModule
from tests.metrics._ddp import run_on_two_ranks


def slow_number(function, points, num_interpolation=21):
    """One pair at a time, one output at a time, by the textbook formula."""
    n = len(points)
    times = torch.linspace(0, 1, num_interpolation, dtype=torch.float64)
    matrix = torch.eye(n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + 1, n):
            outputs = (
                torch.stack([function((points[i] + float(t) * (points[j] - points[i]))[None])[0] for t in times])
                .detach()
                .double()
            )
            squared = [float(torch.corrcoef(torch.stack([times, column]))[0, 1] ** 2) for column in outputs.flatten(1).T]
            matrix[i, j] = matrix[j, i] = sum(squared) / len(squared)
    eigenvalues = torch.linalg.eigvalsh(matrix).abs()
    shares = eigenvalues / eigenvalues.sum()
    return float(2 ** -(shares * shares.log2()).sum())


def view_of(model, inputs):
    probe = Probe(train=inputs, size=len(inputs))
    return ModelView(model, probe, {"train": probe.sample("train")})


class FunctionalNet(nn.Module):
    """A two-layer network without activation modules, with dropout that eval mode must switch off."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 10), nn.Linear(10, 8), nn.Linear(8, 2)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        hidden = nn.functional.dropout(hidden, 0.5, self.training)
        return self.head(torch.tanh(self.second(hidden)))


class ResidualNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.branch = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        stream = self.embed(x)
        return self.head(torch.tanh(stream + self.branch(stream)))


def lmn_of(model, inputs, **settings):
    settings = {"quadrature": None, **settings}
    monitor = LinearMappingNumberMonitor(num_samples=len(inputs), on_error="raise", **settings)
    return Recorder(model, [monitor], Probe(train=inputs, size=len(inputs))).record(step=0), monitor


def test_chain_of_layers_is_measured_from_its_tail():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    inputs = torch.randn(9, 3, dtype=torch.float64)
    assert [type(layer) for layer in tail_after(view_of(model, inputs), "1")] == [nn.Linear, nn.Tanh, nn.Linear]
    values, _ = lmn_of(model, inputs)
    expected = slow_number(model[2:], model[:2](inputs).detach())
    assert values == {"grok/lmn/1": pytest.approx(expected, rel=1e-9)}
    assert expected > 1.05


def test_the_default_rule_comes_near_all_points():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    torch.nn.init.normal_(model[2].weight)
    inputs = 2 * torch.randn(32, 3)
    everywhere, _ = lmn_of(model, inputs)
    (by_default,) = Recorder(model, [LinearMappingNumberMonitor()], Probe(train=inputs)).record(step=0).values()
    assert everywhere["grok/lmn/1"] > 2
    assert by_default == pytest.approx(everywhere["grok/lmn/1"], rel=0.05)


def test_functional_activations_are_measured_by_substitution():
    torch.manual_seed(0)
    model = FunctionalNet().double()
    inputs = torch.randn(8, 3, dtype=torch.float64)
    assert tail_after(view_of(model, inputs), "second:input") is None
    values, _ = lmn_of(model, inputs, layers="second:input")
    hidden = torch.tanh(model.first(inputs)).detach()
    expected = slow_number(lambda h: model.head(torch.tanh(model.second(h))), hidden)
    assert values["grok/lmn/second:input"] == pytest.approx(expected, rel=1e-9)
    assert model.training, "the mode is put back"


class Convolutional(nn.Module):
    """Images, flattened before the head in one way or another."""

    def __init__(self, flatten):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.MaxPool2d(2))
        self.head = nn.Linear(16, 2)
        self.flatten = flatten

    def forward(self, images):
        return self.head(self.flatten(self.features(images)))


@pytest.mark.parametrize(
    "flatten",
    [lambda x: x.flatten(1), lambda x: torch.flatten(x, 1), lambda x: x.view(len(x), -1), lambda x: x.reshape(-1, 16)],
)
def test_a_flatten_before_the_head_is_part_of_the_chain(flatten):
    torch.manual_seed(0)
    model = Convolutional(flatten).double()
    images = torch.randn(7, 1, 7, 7, dtype=torch.float64)
    tail = tail_after(view_of(model, images), "features.1")
    assert [type(layer) for layer in tail] == [nn.Conv2d, nn.Tanh, nn.MaxPool2d, nn.Flatten, nn.Linear]
    values, _ = lmn_of(model, images)
    expected = slow_number(lambda h: model.head(model.features[2:](h).flatten(1)), model.features[:2](images).detach())
    assert values == {"grok/lmn/features.1": pytest.approx(expected, rel=1e-9)}


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.transpose(1, 2).flatten(1),  # other rows
        lambda x: x.flatten(1) + 0,  # an operation of its own
        lambda x: x.flatten(1).abs_(),  # in the very memory
        lambda x: x.flatten(2).mean(2).repeat(1, 4),
        lambda x: x.view(-1, 4)[: len(x)].repeat(1, 4),
    ],
)
def test_what_is_no_flatten_is_measured_by_substitution(flatten):
    torch.manual_seed(0)
    model = Convolutional(flatten).double()
    images = torch.randn(7, 1, 7, 7, dtype=torch.float64)
    assert tail_after(view_of(model, images), "features.1") is None


def test_a_tensor_that_is_written_to_between_layers_is_noticed():
    class Scaled(nn.Sequential):
        def forward(self, x):
            hidden = self[1](self[0](x))
            hidden.mul_(2)
            return self[2](hidden)

    model = Scaled(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    assert tail_after(view_of(model, torch.randn(6, 3)), "0") is None


def test_a_layer_that_needs_its_parent_is_measured_by_substitution():
    class Needy(nn.Linear):
        shift = None

        def forward(self, x):
            return super().forward(x) + self.shift

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(3, 4), nn.Tanh(), Needy(4, 2)

        def forward(self, x):
            self.last.shift = x[:, :1]
            out = self.last(self.act(self.first(x)))
            self.last.shift = None
            return out

    torch.manual_seed(0)
    inputs = torch.randn(6, 3)
    assert tail_after(view_of(Parent(), inputs), "act") is None
    values, _ = lmn_of(Parent(), inputs, layers="act")
    assert values["grok/lmn/act"] == pytest.approx(1.0)


def test_default_is_the_first_place_through_which_everything_passes():
    torch.manual_seed(0)
    inputs = torch.randn(8, 3)
    model = ResidualNet()
    view = view_of(model, inputs)
    assert not is_cut(view, "branch.1")
    assert is_cut(view, "embed")
    values, _ = lmn_of(model, inputs)
    assert list(values) == ["grok/lmn/embed"]


def test_default_avoids_the_last_hidden_layer_which_is_linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 2)).double()
    inputs = torch.randn(8, 3, dtype=torch.float64)
    values, _ = lmn_of(model, inputs)
    # The first layer before its activation: the same number as from the input.
    assert values == {"grok/lmn/0": pytest.approx(slow_number(model, inputs), rel=1e-9)}
    assert lmn_of(model, inputs, layers="1")[0]["grok/lmn/1"] == pytest.approx(1.0)


def test_inside_a_residual_branch_the_rest_is_the_first_samples():
    torch.manual_seed(0)
    model = ResidualNet().double()
    inputs = torch.randn(6, 3, dtype=torch.float64)
    stream = model.embed(inputs).detach()
    hidden = model.branch[:2](stream).detach()
    expected = slow_number(lambda h: model.head(torch.tanh(stream[:1] + model.branch[2](h))), hidden)
    values, _ = lmn_of(model, inputs, layers="branch.1")
    assert values["grok/lmn/branch.1"] == pytest.approx(expected, rel=1e-9)


def test_discrete_tokens_are_interpolated_at_a_layer():
    data = PairTaskDataModule("add", 7)
    model = EmbeddingMLP(data.task.num_tokens, data.task.num_classes, width=16, activation="silu")
    inputs = data.train_set.inputs[:10]
    values, _ = lmn_of(model, (inputs, data.train_set.targets[:10]))
    (key,) = values
    assert 1 <= values[key] <= 10


def test_transformer_is_measured_from_its_embedding():
    data = PairTaskDataModule("add", 7)
    model = DecoderTransformer(7, 7, d_model=16, num_heads=2, mlp_width=16)
    values, _ = lmn_of(model, data.train_set.inputs[:6])
    ((key, value),) = values.items()
    assert "embed" in key
    assert 1 < value <= 6


class PerPosition(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.act, self.head = nn.Embedding(5, 8), nn.Tanh(), nn.Linear(8, 5)
        self.mid = nn.Linear(8, 8)

    def forward(self, tokens):
        return self.head(self.act(self.mid(self.embedding(tokens))))


def test_position_chooses_among_answers():
    torch.manual_seed(0)
    model = PerPosition().double()
    tokens = torch.randint(5, (6, 4))
    hidden = model.embedding(tokens).detach()

    def tail(h):
        return model.head(torch.tanh(model.mid(h)))

    # Outputs of one position depend on that position's embedding alone; samples that share its token are a constant segment,
    # which the slow formula has no answer for, so compare through the function on distinct ones.
    chosen, _ = lmn_of(model, tokens, layers="embedding", position=2)
    expected = linear_mapping_number(linear_connectivity(lambda h: tail(h)[:, 2], hidden))
    assert chosen["grok/lmn/embedding"] == pytest.approx(float(expected), rel=1e-9)
    everything, _ = lmn_of(model, tokens, layers="embedding")
    assert everything["grok/lmn/embedding"] != pytest.approx(chosen["grok/lmn/embedding"], rel=1e-3)


def test_repeats_average_disjoint_subsets_and_give_an_error():
    torch.manual_seed(0)
    model = FunctionalNet()
    inputs = torch.randn(40, 3)
    monitor = LinearMappingNumberMonitor("second:input", num_samples=10, repeats=4, on_error="raise")
    values = Recorder(model, [monitor], Probe(train=inputs, size=40)).record(step=0)
    samples = Probe(train=inputs, size=40).sample("train").inputs
    singles = [lmn_of(model, samples[10 * k : 10 * k + 10], layers="second:input", quadrature=3)[0] for k in range(4)]
    numbers = torch.tensor([single["grok/lmn/second:input"] for single in singles], dtype=torch.float64)
    assert values["grok/lmn/second:input"] == pytest.approx(float(numbers.mean()), rel=1e-6)
    assert values["grok/lmn_standard_error/second:input"] == pytest.approx(float(numbers.std() / 2), rel=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_few_samples(count):
    values, monitor = lmn_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(count, 3))
    ((key, value),) = values.items()
    assert 1 - 1e-9 <= value <= count
    assert key in ("grok/lmn/0", "grok/lmn/1")
    assert monitor.figures()


def test_nan_weights_give_nan_and_one_warning():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[2].weight, float("nan"))
    monitor = LinearMappingNumberMonitor(num_samples=4)
    recorder = Recorder(model, [monitor], Probe(train=torch.randn(4, 3)))
    with pytest.warns(UserWarning, match="is nan"):
        values = recorder.record(step=0)
    (value,) = values.values()
    assert math.isnan(value)
    assert recorder.record(step=1).keys() == values.keys()
    assert recorder.switched_off == []


def test_layers_that_cannot_be_interpolated_are_refused_by_name():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.head = nn.MaxPool1d(2, return_indices=True), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.pool(x)[0])

    with pytest.raises(ValueError, match=r"'pool' matches nothing.*There are: head"):
        lmn_of(Pooled(), torch.randn(4, 4), layers="pool")


def test_bad_settings_name_the_argument():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="num_samples"):
        lmn_of(model, torch.randn(4, 3)[:0].new_ones(2, 3), repeats=2)
    with pytest.raises(ValueError, match="`repeats`"):
        lmn_of(model, torch.randn(4, 3), repeats=0)
    with pytest.raises(ValueError, match="`num_interpolation`"):
        lmn_of(model, torch.randn(4, 3), num_interpolation=2)
    with pytest.raises(ValueError, match="`position`"):
        lmn_of(model, torch.randn(4, 3), position=1)


@pytest.mark.parametrize("seed", range(12))
def test_default_does_not_hang_on_the_initialisation(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert list(lmn_of(model, torch.randn(40, 6))[0]) == ["grok/lmn/1"]


def test_metric_works_on_its_own_and_keeps_no_model():
    inputs = torch.randn(8, 3)
    model = FunctionalNet()
    values, monitor = lmn_of(model, inputs, layers="second:input")
    (metric,) = monitor.metric.values()
    assert metric.connectivity.shape == (8, 8)
    with pytest.raises(RuntimeError, match="no function"):
        metric.compute()
    assert torch.equal(Probe(train=TensorDataset(inputs), size=8).sample("train").inputs.sort(0)[0], inputs.sort(0)[0])
    assert values


def test_samples_are_ordered_by_cluster():
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2] * 8 + [0] * 4)
    affinity = torch.where(labels[:, None] == labels, 0.9, 0.1).double().fill_diagonal_(1.0)
    order = order_by_cluster(affinity)
    assert sorted(order.tolist()) == list(range(28))
    changes = (labels[order].diff() != 0).sum()
    assert changes == 2
    assert (labels[order][:12] == 0).all(), "the largest cluster comes first"


class Counting(nn.Module):
    """Counts the rows that pass."""

    rows = 0  # Of the class: a module's own attributes are given back after a pass.

    def forward(self, x):
        Counting.rows += len(x)
        return torch.tanh(x)


def measure_on_rank(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 8), Counting(), nn.Linear(8, 2)).double()
    probe = Probe(train=torch.randn(40, 3, dtype=torch.float64), size=40)
    recorder = Recorder(model, [LinearMappingNumberMonitor("1", num_samples=40, on_error="raise")], probe)
    recorder.bind()
    Counting.rows = 0
    return recorder.record(step=0)["grok/lmn/1"], Counting.rows


def test_pairs_are_split_over_ranks():
    alone, rows_alone = measure_on_rank(0)
    (first, rows_first), (second, rows_second) = run_on_two_ranks(measure_on_rank)
    assert first == second == pytest.approx(alone, rel=1e-12)
    # 780 segments of 3 inner points, beside a few rows that every rank needs.
    assert rows_alone >= 780 * 3
    assert max(rows_first, rows_second) < 0.56 * rows_alone


def test_a_resumed_run_keeps_the_site_whatever_its_weights_have_become():
    """With weights of zero every layer is affine, so that another would be chosen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    probe = Probe(train=torch.randn(10, 3))
    first = Recorder(model, [LinearMappingNumberMonitor()], probe)
    (key,) = first.record(0)
    state = first.state_dict()
    with torch.no_grad():
        model[2].weight.zero_()
    (other,) = Recorder(model, [LinearMappingNumberMonitor()], probe).record(1)
    assert other != key
    second = Recorder(model, [LinearMappingNumberMonitor()], probe)
    second.load_state_dict(state)
    assert list(second.record(1)) == [key]
    # Sites of another model are not looked for.
    third = Recorder(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), [LinearMappingNumberMonitor()], probe)
    third.load_state_dict({next(iter(state)): state[next(iter(state))]})
    assert not third.switched_off
