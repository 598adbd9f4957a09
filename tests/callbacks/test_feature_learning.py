"""What the monitor finds in networks, against the closed forms on tensors taken from them by hand."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grok_callbacks import FeatureLearningMonitor, Probe, Recorder
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks._packing import unpack
from grok_callbacks.callbacks import _last_layer, feature_learning
from grok_callbacks.functional import (
    center,
    feature_energy,
    feature_gradient,
    largest_feature_cosine,
    lazy_alignment,
    participation_ratio,
    residual_alignment,
    residual_ratio,
    ridge_distance,
)
from tests._common import fit, loader

CLASSES = 4
INPUTS = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % CLASSES
ONE_HOT = F.one_hot(LABELS, CLASSES).double()
DATA = (INPUTS, LABELS)


def network(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES, bias=bias))


def measured(model, probe=None, monitor=None, step=0):
    values = Recorder(model, [monitor or FeatureLearningMonitor()], probe or Probe(train=DATA)).record(step=step)
    return {key.removeprefix("grok/li2/"): value for key, value in values.items()}


def expected(features, targets, residual, weight, ridge=None):
    """Nothing of autograd here."""
    gradient = feature_gradient(residual, weight)
    energy = feature_energy(features, targets)
    values = {
        "cos_lazy": lazy_alignment(gradient, features, targets),
        "cos_residual": residual_alignment(gradient, features, targets, residual),
        "gradient_norm": torch.linalg.norm(gradient),
        "residual_ratio": residual_ratio(residual, targets),
        "participation_ratio": participation_ratio(features),
        "feature_cosine": largest_feature_cosine(features),
        "energy_top": energy.max(),
        "energy_median": energy.quantile(0.5),
    }
    if ridge is not None:
        values["ridge_distance"] = ridge_distance(weight, features, targets, ridge)
    return {name: float(value) for name, value in values.items()}


def assert_measured(values, wanted, rel=1e-5):
    assert {name: values[name] for name in wanted} == pytest.approx(wanted, rel=rel, nan_ok=True)
    assert ("ridge_distance" in values) == ("ridge_distance" in wanted)


@torch.no_grad()
def parts(model, inputs=INPUTS):
    """Features, outputs and weight of a network whose last module is its last layer."""
    model.eval()
    return model[:-1](inputs), model(inputs).double(), model[-1].weight.T.double()


def squared(outputs, targets):
    return (outputs - targets).square().sum(1).mean()


def half_squared(outputs, targets):
    return squared(outputs, targets) / 2


def summed(outputs, targets):
    return F.mse_loss(outputs, targets, reduction="sum")


def to_one_hot(outputs, labels):
    return F.mse_loss(outputs, F.one_hot(labels, CLASSES).to(outputs.dtype))


def cross_entropy_sum(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="sum")


def soft_cross_entropy(outputs, targets):
    return F.cross_entropy(outputs, targets)


class TestLosses:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("loss", "targets"), [
        (None, LABELS), (cross_entropy_sum, LABELS), (soft_cross_entropy, ONE_HOT.float())
    ])  # fmt: skip
    def test_cross_entropy(self, loss, targets, bias):
        model = network(bias)
        features, outputs, weight = parts(model)
        values = measured(model, Probe(train=(INPUTS, targets), loss=loss))
        assert_measured(values, expected(features, ONE_HOT, ONE_HOT - outputs.softmax(1), weight))

    @pytest.mark.parametrize(
        ("loss", "targets", "scale"),
        [
            (None, ONE_HOT.float(), 2 / (30 * CLASSES)),
            (squared, ONE_HOT.float(), 2 / 30),
            (half_squared, ONE_HOT.float(), 1 / 30),
            (summed, ONE_HOT.float(), 2),
            (to_one_hot, LABELS, 2 / (30 * CLASSES)),
        ],
    )
    def test_squared_error(self, loss, targets, scale):
        model = network()
        features, outputs, weight = parts(model)
        values = measured(model, Probe(train=(INPUTS, targets), loss=loss), FeatureLearningMonitor(weight_decay=0.02))
        assert_measured(values, expected(features, ONE_HOT, ONE_HOT - outputs, weight, ridge=0.02 / scale))

    def test_several_labels_at_once(self):
        model, targets = network(), torch.rand(30, CLASSES, generator=torch.Generator().manual_seed(1)).round()
        features, outputs, weight = parts(model)
        loss = F.binary_cross_entropy_with_logits
        values = measured(model, Probe(train=(INPUTS, targets), loss=loss))
        assert_measured(values, expected(features, targets, targets - outputs.sigmoid(), weight))

    def test_one_output(self):
        torch.manual_seed(0)
        model, targets = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)), INPUTS[:, 0].sin()
        with torch.no_grad():
            features, residual, weight = model[:2](INPUTS), (targets - model(INPUTS))[:, None], model[2].weight.T.clone()
        wanted = expected(features, targets[:, None], residual, weight, ridge=0.0)
        assert_measured(measured(model, Probe(train=(INPUTS, targets))), wanted)

    def test_smoothed_labels_are_what_is_fitted(self):
        """A loss that is neither: the residual is what it sends back, and vanishes where it is smallest."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))
        smooth = ONE_HOT * 0.9 + 0.1 / CLASSES
        nn.init.zeros_(model[2].weight)
        probe = Probe(train=(INPUTS[:1], LABELS[:1]), loss=nn.CrossEntropyLoss(label_smoothing=0.1))
        with torch.no_grad():
            model[2].bias.copy_(smooth[0].log())
        with pytest.warns(UserWarning, match="said once"):
            assert measured(model, probe)["gradient_norm"] == pytest.approx(0, abs=1e-12)

    def test_exact_fit(self):
        """With nothing to send back there is no direction, but all else has a value."""
        model = network()
        _, outputs, _ = parts(model)
        with pytest.warns(UserWarning, match="cos_lazy is nan"):
            values = measured(model, Probe(train=(INPUTS, outputs.float())))
        assert values["gradient_norm"] == values["residual_ratio"] == 0
        assert {name for name, value in values.items() if math.isnan(value)} == {"cos_lazy", "cos_residual"}

    def test_a_residual_far_below_half_precision(self):
        """1e-8, and the mean over samples makes it 3e-10: in 16 bits such a gradient would be zero."""
        torch.manual_seed(0)
        model, labels = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).half(), torch.zeros(30, dtype=torch.long)
        with torch.no_grad():
            model[2].bias.copy_(torch.tensor([18.0, 0.0]))
            residual = F.one_hot(labels, 2) - model(INPUTS.half()).double().softmax(1)
            gradient = feature_gradient(residual, model[2].weight.T)
        assert 0 < residual.abs().max() < 2.0**-24
        with pytest.warns(UserWarning, match="cos_lazy is nan"):  # one class has no direction
            values = measured(model, Probe(train=(INPUTS, labels)))
        assert values["gradient_norm"] == pytest.approx(float(torch.linalg.norm(gradient)), rel=0.01)

    def test_centred_squares_are_no_cross_entropy(self):
        """At zero logits their slopes agree."""

        def loss(outputs, labels):
            return squared(outputs, F.one_hot(labels, CLASSES) - 1 / CLASSES)

        model = network()
        features, outputs, weight = parts(model)
        centred = ONE_HOT - 1 / CLASSES
        values = measured(model, Probe(train=(INPUTS, LABELS), loss=loss))
        assert_measured(values, expected(features, centred, centred - outputs, weight, ridge=0.0))


class Tied(nn.Module):
    """Answers at each position, or at the last one, with its embedding for a last layer."""

    def __init__(self, form="positions"):
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.embedding = nn.Embedding(7, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def features(self, tokens):
        return self.hidden(self.embedding(tokens)).tanh()

    def forward(self, tokens):
        output = self.head(self.features(tokens))
        if self.form == "last":
            return output[:, -1]
        return output.movedim(-1, 1) if self.form == "moved" else output


TOKENS = torch.randint(7, (12, 5), generator=torch.Generator().manual_seed(0))


class TestLayers:
    @pytest.mark.parametrize("form", ["positions", "moved", "last"])
    def test_positions_and_tied_weights(self, form):
        model, targets = Tied(form), TOKENS.roll(1, 1).clone()
        with torch.no_grad():
            features, weight = model.features(TOKENS), model.embedding.weight.T.double()
        if form == "last":
            targets, features = targets[:, -1], features[:, -1]
        else:
            targets[::2, 1] = -100
        labels, kept = targets.flatten(), (targets != -100).flatten()
        features = features.flatten(0, -2)[kept]
        wanted = F.one_hot(labels[kept], 7).double()
        residual = wanted - (features.double() @ weight).softmax(1)
        probe = Probe(train=(TOKENS, targets))
        values = measured(model, probe)
        assert_measured(values, expected(features, wanted, residual, weight))
        # The tied embedding is the last layer, so that only the hidden layer counts among those before it.
        monitor = FeatureLearningMonitor()
        Recorder(model, [monitor], probe).record(step=0)
        assert list(monitor.own_state()["initial"]) == ["hidden.weight"]

    def test_many_positions_are_thinned_out_alike(self, monkeypatch):
        monkeypatch.setattr(_last_layer, "_MOST_ROWS", 20)
        model, targets = Tied(), TOKENS.roll(1, 1)
        chosen = _last_layer.subset(60)
        assert len(chosen.unique()) == 20
        with torch.no_grad():
            features, weight = model.features(TOKENS).flatten(0, 1)[chosen], model.embedding.weight.T.double()
        wanted = F.one_hot(targets.flatten()[chosen], 7).double()
        residual = wanted - (features.double() @ weight).softmax(1)
        assert_measured(measured(model, Probe(train=(TOKENS, targets))), expected(features, wanted, residual, weight))

    def test_predictions_without_a_target(self):
        probe = Probe(train=(TOKENS, torch.full_like(TOKENS, -100)))
        with pytest.raises(ValueError, match="All targets of the train samples are -100, to be ignored"):
            Recorder(Tied(), [FeatureLearningMonitor()], probe).record(step=0)

    def test_a_named_layer_with_something_after_it(self):
        """Outputs centred over classes, as in the paper: what the layer receives is the centred residual."""

        class Centred(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.w, self.v = nn.Linear(6, 8, bias=False), nn.Linear(8, CLASSES, bias=False)

            def forward(self, x):
                outputs = self.v(self.w(x).square())
                return outputs - outputs.mean(1, keepdim=True)

        model, targets = Centred(), ONE_HOT - 1 / CLASSES
        probe = Probe(train=(INPUTS, targets.float()), loss=squared)
        with pytest.raises(ValueError, match=r"`layer`: .* Linear layers: w, v"):
            measured(model, probe)
        values = measured(model, probe, FeatureLearningMonitor("v"))
        with torch.no_grad():
            features, weight = model.w(INPUTS).square().double(), model.v.weight.T.double()
            residual = targets - model(INPUTS).double()
        assert_measured(values, expected(features, targets, residual, weight, ridge=0.0))

    def test_frozen_below(self):
        model = network()
        values = measured(model)
        for parameter in model[0].parameters():
            parameter.requires_grad_(False)
        assert measured(model) == values

    def test_sharded_weights_need_no_backward_pass(self):
        """FSDP would act in it, and gives parameters that can be gathered."""
        model = network()
        values = measured(model)
        for parameter in model.parameters():
            parameter.full_tensor = parameter.detach
        assert measured(model) == pytest.approx(values, rel=1e-5)

    def test_parametrised_weight(self):
        model = network()
        values = measured(model)
        nn.utils.parametrizations.weight_norm(model[3])
        del values["weight_change"]
        assert_measured(measured(model), values)

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            ("nope", "'nope' matches nothing"),
            ("1", "'1' matches nothing.* There are: 0, 3"),
            ("0", "output of '0'"),
            ("*", "name one"),
        ],
    )
    def test_wrong_layer(self, layer, message):
        with pytest.raises(ValueError, match=message):
            measured(network(), monitor=FeatureLearningMonitor(layer))

    def test_no_linear_layer_at_the_end(self):
        with pytest.raises(ValueError, match=r"`layer`: the model returns the output of no `nn\.Linear`"):
            measured(nn.Sequential(nn.Linear(6, CLASSES), nn.Tanh()))

    def test_no_targets(self):
        with pytest.raises(ValueError, match="need targets"):
            measured(network(), Probe(train=INPUTS))


class TestWeightChange:
    def change(self, model, by, monitor=None):
        recorder = Recorder(model, [monitor or FeatureLearningMonitor()], Probe(train=DATA))
        assert recorder.record(step=0)["grok/li2/weight_change"] == 0
        by(model)
        return recorder.record(step=1)["grok/li2/weight_change"]

    def test_of_all_but_the_last(self):
        def double(model):
            with torch.no_grad():
                model[0].weight.mul_(2)
                model[3].weight.mul_(5)
                model[0].bias.add_(1)

        assert self.change(network(), double) == pytest.approx(1)
        assert self.change(network(), double, FeatureLearningMonitor(parameters="3.*")) == pytest.approx(4)

    def test_large_matrices_are_sampled(self, monkeypatch):
        torch.manual_seed(0)
        moved = {name: torch.randn_like(value) for name, value in network().named_parameters()}
        exact = self.change(network(), lambda model: self.move(model, moved))
        monkeypatch.setattr(feature_learning, "_MOST_ENTRIES", 40)
        monitor = FeatureLearningMonitor()
        estimate = self.change(network(), lambda model: self.move(model, moved), monitor)
        assert estimate == pytest.approx(exact, rel=0.3)
        assert estimate != exact
        assert monitor.own_state()["initial"]["0.weight"].shape == (40,)

    @staticmethod
    def move(model, by):
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.add_(by[name])

    def test_a_single_layer_has_none(self):
        assert "weight_change" not in measured(nn.Sequential(nn.Linear(6, CLASSES)))


class Scripted(FeatureLearningMonitor):
    """Told what it measures."""

    def __init__(self, cosines, **kwargs):
        super().__init__(**kwargs)
        self.cosines = iter(cosines)

    def _advance(self, values, snapshot):
        lazy, residual, ratio = next(self.cosines)
        super()._advance({"li2/cos_lazy": lazy, "li2/cos_residual": residual, "li2/residual_ratio": ratio}, snapshot)


START, INDEPENDENT, INTERACTIVE = (0.1, 0.1, 0.01), (0.7, 0.7, 0.01), (0.3, 0.8, 0.01)


class TestStage:
    def test_changes_are_announced_by_name(self, caplog):
        caplog.set_level(logging.INFO, "grok_callbacks")
        monitor = Scripted([START, INDEPENDENT, INDEPENDENT, INDEPENDENT, INTERACTIVE, INTERACTIVE, START])
        recorder = Recorder(network(), [monitor], Probe(train=DATA))
        stages = [recorder.record(step=10**step)["grok/li2/stage"] for step in range(7)]
        assert stages == [1, 1, 2, 2, 2, 3, 3]
        assert [record.getMessage() for record in caplog.records] == [
            "Feature learning is in stage II at step 100, independent: each unit learns a feature on its own.",
            "Feature learning is in stage III at step 100,000, interactive: units learn what the others still miss.",
        ]
        assert monitor.stage.name == "interactive"

    def test_plain_rule(self):
        early = (0.9, 0.9, 1.0)
        for fit_threshold, stage in ((0.1, 1), (math.inf, 2)):
            monitor = Scripted([early] * 2, fit_threshold=fit_threshold)
            recorder = Recorder(network(), [monitor], Probe(train=DATA))
            assert [recorder.record(step=step)["grok/li2/stage"] for step in (0, 1)][-1] == stage

    def test_is_taken_up_with_the_initial_weights(self):
        model, script = network(), [INDEPENDENT, INDEPENDENT, INTERACTIVE, INTERACTIVE]
        first = Recorder(model, [Scripted(script)], Probe(train=DATA))
        for step in range(3):
            first.record(step=step)
        with torch.no_grad():
            model[0].weight.mul_(3)
        going_on = Scripted(script[3:])
        # The script is a setting, hence part of the name.
        going_on._label = first.monitors[0].label
        second = Recorder(model, [going_on], Probe(train=DATA))
        second.load_state_dict(first.state_dict())
        values = second.record(step=3)
        assert values["grok/li2/stage"] == 3
        assert values["grok/li2/weight_change"] == pytest.approx(2)

    @pytest.mark.parametrize(("validation_labels", "says"), [((LABELS + 1) % CLASSES, True), (LABELS, False)])
    def test_disagreement_with_the_outcome_is_said_once(self, validation_labels, says, caplog):
        caplog.set_level(logging.INFO, "grok_callbacks")
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        model.eval()
        for _ in range(200):
            optimizer.zero_grad()
            F.cross_entropy(model(INPUTS), LABELS).backward()
            optimizer.step()
        assert (model(INPUTS).argmax(1) == LABELS).all()
        monitor = Scripted([INDEPENDENT, INDEPENDENT, *[INTERACTIVE] * 6])
        recorder = Recorder(model, [monitor], Probe(train=DATA, validation=(INPUTS, validation_labels)))
        heard = []
        for step in (1, 2, 4, 8, 15, 16, 32, 64):
            caplog.clear()
            recorder.record(step=step)
            heard += [step for record in caplog.records if "disagree" in record.getMessage()]
        assert heard == ([16] if says else [])

    def test_no_outcome_to_compare_with(self, caplog):
        caplog.set_level(logging.INFO, "grok_callbacks")
        monitor = Scripted([INDEPENDENT, INDEPENDENT, *[INTERACTIVE] * 3])
        recorder = Recorder(network(), [monitor], Probe(train=DATA))
        for step in (1, 2, 4, 8, 100):
            recorder.record(step=step)
        assert "disagree" not in caplog.text


class TestInATrainer:
    def test_during_training_and_validation(self):
        from grok_callbacks import AtValidation

        monitor = FeatureLearningMonitor(schedule=AtValidation(), on_error="raise")
        _, trainer = fit([monitor], validation=loader(), val_check_interval=2)
        assert trainer.callback_metrics["grok/li2/stage"] == 1
        assert monitor.history["grok/li2/cos_lazy"].steps[-1] == 8
        assert monitor.history["grok/li2/weight_change"].values[-1] > 0

    def test_figure(self):
        monitor = FeatureLearningMonitor()
        assert monitor.figures() == {}
        fit([monitor])
        (figure,) = monitor.figures().values()
        figure.canvas.draw()
        labels = {text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()}
        assert {"cos_lazy", "weight_change", "participation_ratio"} <= labels
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["I lazy"]

    def test_state_is_small(self):
        monitor = FeatureLearningMonitor()
        fit([monitor])
        states = unpack(monitor.state_dict()["metric"])
        assert not any(held for member in states.values() for held in member["states"].values())

    def test_wrong_settings(self):
        with pytest.raises(MisconfigurationException, match="`layer`: 'nope' matches nothing"):
            fit([FeatureLearningMonitor("nope")])
        with pytest.raises(MisconfigurationException, match="weight_decay"):
            FeatureLearningMonitor(weight_decay=-1.0)
        with pytest.raises(ValueError, match="patience"):
            FeatureLearningMonitor(patience=0)


class TestHostile:
    def test_nan_weights(self):
        model = network()
        nn.init.constant_(model[0].weight, math.nan)
        recorder = Recorder(model, [FeatureLearningMonitor()], Probe(train=DATA))
        with pytest.warns(UserWarning, match="nan at step 0; said once"):
            values = recorder.record(step=0)
        assert math.isnan(values["grok/li2/cos_lazy"])
        assert values["grok/li2/stage"] == 1

    def test_one_sample(self):
        with pytest.warns(UserWarning, match="said once"):
            values = measured(network(), Probe(train=(INPUTS[:1], LABELS[:1])))
        assert math.isnan(values["cos_lazy"])

    def test_zero_last_layer(self):
        model = network()
        nn.init.zeros_(model[3].weight)
        with pytest.warns(UserWarning, match="cos_lazy is nan"):
            values = measured(model)
        assert values["gradient_norm"] == 0

    def test_called_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.layer = nn.Linear(CLASSES, CLASSES)

            def forward(self, x):
                return self.layer(self.layer(x[:, :CLASSES]).relu())

        model = Twice()
        with torch.no_grad():
            features, outputs = model.layer(INPUTS[:, :CLASSES]).relu(), model(INPUTS).double()
        wanted = expected(features, ONE_HOT, ONE_HOT - outputs.softmax(1), model.layer.weight.T.detach().double())
        assert_measured(measured(model), wanted)

    def test_never_called(self):
        model = network()
        model[0].spare = nn.Linear(8, CLASSES)
        assert measured(model) == measured(network()) | {"weight_change": 0.0}
        with pytest.raises(ValueError, match="matches nothing"):
            measured(model, monitor=FeatureLearningMonitor("0.spare"))


def test_features_are_centred():
    """The closed forms above would agree on an uncentred mistake of both: columns of G sum to zero, <G, F~> = <F~^T R, V>."""
    model = network()
    features, outputs, weight = parts(model)
    residual = ONE_HOT - outputs.softmax(1)
    gradient = feature_gradient(residual, weight)
    assert gradient.sum(0).abs().max() < 1e-12
    assert float((gradient * center(features)).sum()) == pytest.approx(float(((center(features).T @ residual) * weight).sum()))
    assert measured(model)["gradient_norm"] == pytest.approx(float(torch.linalg.norm(gradient)), rel=1e-5)
