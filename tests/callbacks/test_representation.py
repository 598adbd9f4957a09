"""Signals of the last representation and of predictions, against the closed forms on tensors taken by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from grok_callbacks import EverySteps, Probe, Recorder, RepresentationMonitor
from grok_callbacks._compat import MisconfigurationException
from grok_callbacks._packing import unpack
from grok_callbacks.callbacks import _last_layer
from grok_callbacks.functional import class_distance_ratio, prediction_confidence, representation_entropy
from tests._common import Stream, fit, loader, samples

CLASSES = 4
INPUTS = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % CLASSES
TRAIN, VALIDATION = INPUTS[:30], INPUTS[30:]
BOTH = Probe(train=(TRAIN, LABELS), validation=(VALIDATION, LABELS))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def measured(model, probe=BOTH, monitor=None):
    values = Recorder(model, [monitor or RepresentationMonitor()], probe).record(step=0)
    return {key.removeprefix("grok/representation/"): value for key, value in values.items()}


@torch.no_grad()
def expected(model, inputs, labels=LABELS, predicted=None):
    model.eval()
    features = model[:-1](inputs)
    values = {"entropy": float(representation_entropy(features))}
    if labels is not None:
        values["class_distance_ratio"] = float(class_distance_ratio(features, labels))
    if predicted is not None:
        shares = model(predicted).double().softmax(1)
        values["prediction_entropy"] = float(-(shares * shares.log()).sum(1).mean())
        mean = shares.mean(0)
        values["answer_entropy"] = float(-(mean * mean.log()).sum() / math.log(CLASSES))
        values["confidence"] = float(shares.max(1).values.mean())
    return values


class TestValues:
    def test_on_validation_samples_where_there_are_any(self):
        model = network()
        assert measured(model) == pytest.approx(expected(model, VALIDATION, LABELS, VALIDATION))

    def test_on_training_samples_otherwise(self):
        model = network()
        assert measured(model, Probe(train=(TRAIN, LABELS))) == pytest.approx(expected(model, TRAIN))

    def test_labels_of_validation_samples_are_not_needed(self):
        model = network()
        probe = Probe(train=(TRAIN, LABELS), validation=VALIDATION)
        assert measured(model, probe) == pytest.approx(expected(model, VALIDATION, None, VALIDATION))

    def test_one_hot_targets(self):
        model, targets = network(), F.one_hot(LABELS, CLASSES).float()
        probe = Probe(train=(TRAIN, targets), validation=(VALIDATION, targets))
        assert measured(model, probe) == pytest.approx(expected(model, VALIDATION, LABELS, VALIDATION))

    def test_regression_has_no_classes(self):
        model, targets = network(), torch.randn(30, CLASSES)
        probe = Probe(train=(TRAIN, targets), validation=(VALIDATION, targets))
        assert measured(model, probe) == pytest.approx(expected(model, VALIDATION, None))
        torch.manual_seed(0)
        single = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        probe = Probe(train=(TRAIN, targets[:, :1]), validation=VALIDATION)
        assert set(measured(single, probe)) == {"entropy"}

    def test_one_row_a_position_and_ignored_ones_dropped(self, monkeypatch):
        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.embedding, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

            def forward(self, tokens):
                return self.head(self.embedding(tokens).tanh())

        model, tokens = Tokens(), torch.randint(7, (10, 5), generator=torch.Generator().manual_seed(0))
        targets = tokens.roll(1, 1).clone()
        targets[::3, 2] = -100
        kept = (targets != -100).flatten()
        probe = Probe(train=(tokens, targets), validation=(tokens, targets))
        with torch.no_grad():
            features, logits = model.embedding(tokens).tanh().flatten(0, 1)[kept], model(tokens).flatten(0, 1)[kept]
        values = measured(model, probe)
        assert values["entropy"] == pytest.approx(float(representation_entropy(features)))
        assert values["class_distance_ratio"] == pytest.approx(float(class_distance_ratio(features, targets.flatten()[kept])))
        assert values["confidence"] == pytest.approx(float(prediction_confidence(logits)))
        monkeypatch.setattr(_last_layer, "_MOST_ROWS", 20)
        chosen = _last_layer.subset(len(logits))
        values = measured(model, probe)
        assert values["confidence"] == pytest.approx(float(prediction_confidence(logits[chosen])))
        ratio = class_distance_ratio(features[chosen], targets.flatten()[kept][chosen])
        assert values["class_distance_ratio"] == pytest.approx(float(ratio))

    def test_named_layer(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES), nn.LogSoftmax(1))
        with pytest.raises(ValueError, match="`layer`"):
            measured(model)
        values = measured(model, monitor=RepresentationMonitor("2"))
        assert values == pytest.approx(expected(nn.Sequential(*model[:2], model[2:]), VALIDATION, LABELS, VALIDATION))


class TestChurn:
    def churn(self, model, changes, **kwargs):
        recorder = Recorder(model, [RepresentationMonitor()], BOTH)
        assert "grok/representation/churn" not in recorder.record(step=0)
        values = []
        for step, change in enumerate(changes, 1):
            change(model)
            values.append(recorder.record(step=step).get("grok/representation/churn"))
        return values

    @staticmethod
    def answer(which):
        def change(model):
            nn.init.zeros_(model[3].weight)
            nn.init.zeros_(model[3].bias)
            with torch.no_grad():
                model[3].bias[which] = 1

        return change

    def test_since_the_last_measurement(self):
        model = network()
        model.eval()
        first = float((model(VALIDATION).argmax(1) != 1).double().mean())
        changes = [self.answer(1), self.answer(1), self.answer(2)]
        assert self.churn(model, changes) == pytest.approx([first, 0, 1])

    def test_what_is_not_a_number_is_no_answer(self):
        def spoil(model):
            nn.init.constant_(model[3].bias, math.nan)

        with pytest.warns(UserWarning, match="nan at step 1; said once"):
            values = self.churn(network(), [spoil, self.answer(1), self.answer(1)])
        assert math.isnan(values[0])
        assert values[1:] == [None, 0]

    def test_over_a_resume(self):
        model = network()
        self.answer(1)(model)
        first = Recorder(model, [RepresentationMonitor()], BOTH)
        first.record(step=0)
        second = Recorder(model, [RepresentationMonitor()], BOTH)
        second.load_state_dict(first.state_dict())
        self.answer(2)(model)
        assert second.record(step=1)["grok/representation/churn"] == 1


class TestInATrainer:
    def test_every_measurement_is_logged(self):
        monitor = RepresentationMonitor(on_error="raise")
        _, trainer = fit([monitor], validation=loader(seed=1))
        keys = {key for key in trainer.callback_metrics if key.startswith("grok/")}
        names = ("entropy", "class_distance_ratio", "prediction_entropy", "answer_entropy", "confidence", "churn")
        assert keys == {f"grok/representation/{name}" for name in names}
        states = unpack(monitor.state_dict()["metric"])
        assert not states["entropy"]["states"]["features"]

    def test_features_stay_those_of_the_samples_of_the_first_measurement(self):
        """Iterated validation data come late; a curve that changes from training to validation would show a jump."""
        monitor = RepresentationMonitor(schedule=EverySteps(1), on_error="raise")
        fit([monitor], validation=DataLoader(Stream(samples(32, 1)), 8), val_check_interval=2)
        alone = RepresentationMonitor(schedule=EverySteps(1))
        fit([alone])
        assert monitor.own_state()["split"] == "train"
        assert monitor.history["grok/representation/entropy"].steps == list(range(9))
        assert min(monitor.history["grok/representation/confidence"].steps) in {2, 3}

    def test_wrong_layer(self):
        with pytest.raises(MisconfigurationException, match="`layer`: 'nope' matches nothing"):
            fit([RepresentationMonitor("nope")])


class TestHostile:
    def test_nan_weights(self):
        model = network()
        nn.init.constant_(model[0].weight, math.nan)
        with pytest.warns(UserWarning, match="said once"):
            assert all(math.isnan(value) for value in measured(model).values())

    def test_one_sample(self):
        probe = Probe(train=(TRAIN, LABELS), validation=(VALIDATION[:1], LABELS[:1]))
        with pytest.warns(UserWarning, match="said once"):
            values = measured(network(), probe)
        assert math.isnan(values["entropy"])
        assert math.isnan(values["class_distance_ratio"])
        assert 0 < values["confidence"] < 1

    def test_one_sample_a_class(self):
        probe = Probe(train=(TRAIN, LABELS), validation=(VALIDATION[:4], LABELS[:4]))
        with pytest.warns(UserWarning, match="class_distance_ratio is nan"):
            measured(network(), probe)

    def test_dead_features(self):
        model = network()
        nn.init.constant_(model[0].bias, -100.0)
        with pytest.warns(UserWarning, match="entropy is nan"):
            values = measured(model)
        assert values["prediction_entropy"] <= math.log(CLASSES)
