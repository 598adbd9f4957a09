from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grok_callbacks import EveryEpoch, EverySteps, GrokkingDetector, NormMonitor, Probe, Recorder
from grok_callbacks._compat import MisconfigurationException
from tests._common import Plain, Stream, events, fit, loader, samples, trainer

EVERY, RARELY = EverySteps(1), EverySteps(100)


class Scripted(Plain):
    """Logs accuracies by the epoch."""

    def __init__(self, train, validation, names=("train_acc", "val_acc")):
        super().__init__()
        self.train_values, self.val_values, self.names = train, validation, names

    def training_step(self, batch, batch_idx):
        if self.train_values:
            self.log(self.names[0], self.train_values[self.current_epoch], on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.val_values:
            self.log(self.names[1], self.val_values[self.current_epoch])


TRAIN = [0.2, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
VALIDATION = {
    "grokking": [0.3, 0.3, 0.3, 0.3, 0.3, 0.5, 0.6, 0.95, 0.96, 1.0],
    "comprehension": [0.3, 0.6, 0.95, 0.96, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    "memorisation": [0.3] * 10,
}


def follow(detector, module, **kwargs):
    """Ten epochs of one step each."""
    settings = {"train": loader(8), "validation": loader(8, seed=1), "max_steps": -1, "max_epochs": 10, **kwargs}
    return fit([detector], module, **settings)


@pytest.mark.parametrize("outcome", VALIDATION)
@pytest.mark.parametrize(
    "names", [("train_acc", "val_acc"), ("train/accuracy", "valid/accuracy"), ("accuracy/train", "acc/validation")]
)
def test_reads_what_the_module_logs(outcome, names):
    detector = GrokkingDetector(schedule=RARELY)
    follow(detector, Scripted(TRAIN, VALIDATION[outcome], names))
    assert detector.outcome == outcome
    assert detector.memorized_step == 3
    assert detector.grokked_step == {"grokking": 8, "comprehension": 3, "memorisation": None}[outcome]
    assert detector.onset_step == {"grokking": 6, "comprehension": 2, "memorisation": None}[outcome]
    assert detector.delay == {"grokking": 5, "comprehension": 0, "memorisation": None}[outcome]


def test_confusion():
    detector = GrokkingDetector(schedule=RARELY)
    follow(detector, Scripted([0.3] * 10, [0.3] * 10))
    assert detector.outcome == "confusion"


def test_reads_the_metrics_that_are_named():
    detector = GrokkingDetector("my/fit", "my/test", memorized_threshold=0.8, target=0.6, chance=0.3)
    follow(detector, Scripted(TRAIN, VALIDATION["grokking"], ("my/fit", "my/test")))
    assert (detector.memorized_step, detector.onset_step, detector.grokked_step) == (2, 6, 7)


def test_metrics_that_fall():
    detector = GrokkingDetector("train_loss", "val_loss", mode="min", memorized_threshold=0.1, target=0.0, chance=1.0)
    follow(detector, Scripted([1 - v for v in TRAIN], [1 - v for v in VALIDATION["grokking"]], ("train_loss", "val_loss")))
    assert (detector.memorized_step, detector.grokked_step, detector.outcome) == (3, 8, "grokking")


def test_named_metrics_need_no_data_that_can_be_read():
    triples = DataLoader(TensorDataset(*samples(8).tensors, torch.arange(8)), 8)

    class Triples(Scripted):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    detector = GrokkingDetector("train_acc", "val_acc")
    follow(detector, Triples(TRAIN, VALIDATION["grokking"]), train=triples)
    assert detector.outcome == "grokking"
    assert "grok/accuracy/train" not in detector.history


def test_named_metrics_that_are_never_logged():
    detector = GrokkingDetector("nothing", "nothing_either")
    with pytest.warns(UserWarning, match="has not been logged so far") as warned:
        follow(detector, Scripted(TRAIN, VALIDATION["grokking"]))
    assert detector.outcome is None
    said = [str(one.message) for one in warned if "has not been logged so far" in str(one.message)]
    assert len(said) == 2, "once each"
    assert "`train_metric`, 'nothing'" in said[0]
    assert "`validation_metric`, 'nothing_either'" in said[1]
    assert "['train_acc', 'val_acc']" in said[0]


@pytest.mark.parametrize("percent_of", [("train",), ("train", "validation")])
def test_percentages_are_no_accuracies_and_what_they_seemed_to_tell_is_taken_back(percent_of):
    """Chance is about 1 % of 97 classes: two values of 0.95 (%) in a row would look like a model that has generalised."""
    train, validation = [0.99, 0.995, 5.0, 60.0, *[100.0] * 6], [0.95, 0.97, 1.2, 1.1, 1.0, 1.3, 2.0, 1.5, 1.2, 1.1]
    if "validation" not in percent_of:
        validation = [value / 100 for value in validation]
    detector = GrokkingDetector(schedule=EVERY)
    with pytest.warns(
        UserWarning, match=r"is no share between 0 and 1; GrokkingDetector.* goes by the accuracy that it measures"
    ):
        follow(detector, _frozen(train, validation))
    assert detector.grokked_step is None
    assert detector.memorized_step is None
    last = {key: series.values[-1] for key, series in detector.history.items() if key.startswith("grok/onset/")}
    assert set(last) >= {"grok/onset/train_since", "grok/onset/validation_since"}
    assert {key: value for key, value in last.items() if value > 0} == {}, "what was logged too early is taken back"


def test_percentages_of_one_split_are_noticed_before_the_other_is_judged():
    """0.95 % would be beyond the level; that training logs percentages is known before its first epoch has ended."""

    class Percent(Plain):
        def training_step(self, batch, batch_idx):
            self.log("train_acc", 55.0)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 0.95)

    detector = GrokkingDetector(schedule=EVERY, patience=1, stop_after_generalization=True)
    with pytest.warns(UserWarning, match="'train_acc' is no share between 0 and 1"):
        _, trainer = fit(
            [detector], Percent(lr=1e-6), loader(320), loader(), max_steps=12, val_check_interval=5, num_sanity_val_steps=0
        )
    assert trainer.global_step == 12
    assert detector.grokked_step is None


def test_what_turned_out_to_be_percentages_is_not_named_as_what_was_judged_by():
    detector = GrokkingDetector()
    detector.optional = True
    recorder = Recorder(torch.nn.Linear(2, 1), [detector])
    with pytest.warns(UserWarning, match="no share"):
        recorder.record(0, metrics={"train_acc": 50.0, "val_acc": 10.0})
    assert detector.own_state()["sources"] == {}
    assert "train_acc" not in detector.texts()["summary"]


def _frozen(train, validation):
    """Knows nothing: the classes are all wrong, whatever the logged numbers say."""
    module = Scripted(train, validation)
    module.lr = 0.0
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.net[2].bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    return module


# Where the module logs nothing.


def learnable(count=64, seed=0):
    return DataLoader(samples(count, seed), 16)


def test_goes_by_one_series_from_its_beginning():
    """What the probe told until the module began to log counts no more."""
    perfect = _frozen(TRAIN, [0.0] * 10)
    data = DataLoader(TensorDataset(torch.randn(8, 6), torch.full((8,), 2)), 8)
    detector = GrokkingDetector(schedule=EVERY)
    follow(detector, perfect, train=data, validation=data)
    assert detector.history["grok/accuracy/validation"].values == [1.0] * 11
    assert (detector.memorized_step, detector.grokked_step, detector.onset_step) == (3, None, None)


def test_measures_accuracies_itself():
    detector = GrokkingDetector(schedule=EVERY, target=0.8)
    module, _ = fit([detector], Plain(), learnable(), learnable(seed=1), max_steps=60)
    history = detector.history
    x, y = samples(64).tensors
    assert history["grok/accuracy/train"].values[-1] == pytest.approx((module(x).argmax(-1) == y).double().mean().item())
    assert history["grok/loss/train"].values[-1] == pytest.approx(F.cross_entropy(module(x), y).item(), rel=1e-5)
    fitted = [value >= 0.99 for value in history["grok/accuracy/train"].values]
    assert detector.memorized_step == next(step for step in range(60) if fitted[step] and fitted[step + 1])
    assert detector.outcome in ("grokking", "comprehension")
    # A third of three classes is chance.
    assert detector.tracker.thresholds.chance == pytest.approx(1 / 3)


def measured(model, targets, **kwargs):
    data = TensorDataset(torch.randn(len(targets), 6), targets)
    detector = GrokkingDetector(probe=Probe(train=data), **kwargs)
    recorder = Recorder(model, [detector])
    return detector, recorder.record(0) | recorder.record(1)


def test_one_hot_targets():
    targets = F.one_hot(torch.randint(3, (20,)), 3).float()
    detector, values = measured(nn.Linear(6, 3), targets)
    assert 0 <= values["grok/accuracy/train"] <= 1
    assert detector.tracker.thresholds.chance == pytest.approx(1 / 3)


@pytest.mark.parametrize("targets", [torch.randn(20, 3), torch.full((20, 3), 1 / 3), torch.randn(20)])
def test_regression_has_a_loss_and_no_accuracy(targets):
    model = nn.Linear(6, 3 if targets.ndim > 1 else 1)
    _, values = measured(model, targets)
    assert "grok/loss/train" in values
    assert "grok/accuracy/train" not in values


def test_chance():
    assert measured(nn.Linear(6, 97), torch.randint(97, (20,)))[0].tracker.thresholds.chance == pytest.approx(1 / 97)
    assert measured(nn.Linear(6, 3), torch.randint(3, (20,)), chance=0.1)[0].tracker.thresholds.chance == 0.1
    # A target that is no better than guessing leaves chance out of it.
    assert measured(nn.Linear(6, 2), torch.randint(2, (20,)), target=0.4)[0].tracker.thresholds.chance == 0.0


def test_chance_is_that_of_each_run():
    detector = GrokkingDetector(probe=Probe(train=TensorDataset(torch.randn(9, 6), torch.zeros(9, dtype=torch.long))))
    for classes in (5, 3):
        Recorder(nn.Linear(6, classes), [detector]).record(0)
        assert detector.tracker.thresholds.chance == pytest.approx(1 / classes)


def test_broken_weights_are_no_events():
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    with pytest.warns(UserWarning, match="grok/loss/train is nan"):
        detector, values = measured(model, torch.zeros(20, dtype=torch.long))
    assert (detector.memorized_step, detector.outcome) == (None, None)
    assert math.isnan(values["grok/loss/train"])
    assert math.isnan(values["grok/accuracy/train"])  # Though the largest of three NaN is the first.


# What it does about it.


def test_announces_and_logs_each_event_once(tmp_path, capsys):
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    detector = GrokkingDetector(schedule=RARELY)
    made = trainer([detector], max_steps=-1, max_epochs=10, logger=logger)
    made.fit(Scripted(TRAIN, VALIDATION["grokking"]), loader(8), loader(8, seed=1))
    said = [line for line in capsys.readouterr().out.splitlines() if " at step " in line]
    assert said == [
        "Memorised at step 3: the training data are fitted.",
        "Onset at step 6: validation leaves chance.",
        "Generalised at step 8: grokking, 5 steps after memorising.",
    ]
    written = events(logger.log_dir)
    # Logged when the second measurement establishes them.
    assert written["grok/onset/memorized_step"] == [(4, 3.0)]
    assert written["grok/onset/onset_step"] == [(7, 6.0)]
    assert written["grok/onset/grokked_step"] == [(9, 8.0)]
    assert written["grok/onset/delay"] == [(9, 5.0)]
    assert written["grok/onset/train_since"][0][1] == written["grok/onset/validation_since"][0][1] == 0.0


@pytest.mark.parametrize("stop", [True, False])
def test_stops_after_generalisation_if_asked_to(stop):
    detector = GrokkingDetector(stop_after_generalization=stop, schedule=RARELY)
    _, made = follow(detector, Scripted(TRAIN, VALIDATION["grokking"]))
    assert made.global_step == (9 if stop else 10)
    assert detector.should_stop == stop


def test_should_stop_in_a_loop_of_ones_own():
    detector = GrokkingDetector("train", "val", stop_after_generalization=True, schedule=EVERY)
    recorder = Recorder(nn.Linear(6, 3), [detector])
    stopped = next(
        step
        for step in range(1, 10)
        if [recorder.record(step, metrics={"train": 1.0, "val": float(step > 3)}), detector.should_stop][1]
    )
    assert (stopped, detector.grokked_step) == (5, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "up"}, "`mode`"), ({"patience": 0}, "`patience`"), ({"target": 0.1, "chance": 0.2}, "`target`"),
        ({"mode": "min"}, "`mode='min'`.*train_metric.*chance"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(kwargs, message):
    with pytest.raises(MisconfigurationException, match=message):
        GrokkingDetector(**kwargs)


def test_a_single_logit_is_judged_too():
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(6, 1)
    nn.init.zeros_(model.bias)
    with torch.no_grad():
        model.weight.copy_(torch.eye(1, 6))
    detector = GrokkingDetector(schedule=EVERY, on_error="raise")
    labels = (x[:, 0] > 0).long()
    labels[:16] = 1 - labels[:16]
    values = Recorder(model, [detector], Probe(train=(x, labels), size=64)).record(step=0)
    assert values["grok/accuracy/train"] == 0.75
    expected = F.binary_cross_entropy_with_logits(x[:, 0].double(), labels.double())
    assert values["grok/loss/train"] == pytest.approx(float(expected), rel=1e-6)
    assert detector.tracker.thresholds.chance == 0.5


class Answers(nn.Module):
    """Says what it is told to."""

    def __init__(self, samples, classes):
        super().__init__()
        self.table = nn.Embedding(samples, classes)

    def forward(self, x):
        return self.table(x)

    def get_right(self, count):
        """Of all samples, whose class is 0."""
        with torch.no_grad():
            self.table.weight.zero_()
            self.table.weight[:count, 0] = 1.0
            self.table.weight[count:, 1] = 1.0


@pytest.mark.parametrize(
    ("samples", "classes", "lucky", "level"),
    [(8, 10, 3, 0.1 + 3.1 * math.sqrt(0.09 / 8)), (4, 3, 2, 0.9), (256, 10, 30, 0.28), (1000, 2, 540, 0.6)],
)
def test_guesses_that_are_right_on_few_samples_are_no_onset(samples, classes, lucky, level):
    """Guessing gets so many once in a thousand times; on many samples that is below a fifth of the way, which then decides."""
    model = Answers(samples, classes)
    data = torch.arange(samples), torch.zeros(samples, dtype=torch.long)
    detector = GrokkingDetector(schedule=EverySteps(1))
    recorder = Recorder(model, [detector], Probe(size=samples, train=data, validation=data))
    for step in range(5):
        model.get_right(0 if step == 0 else lucky)
        recorder.record(step)
    assert detector.onset_step is None
    assert detector.tracker.thresholds.onset_level == pytest.approx(level)
    for step in range(5, 9):
        model.get_right(math.ceil(level * samples))
        recorder.record(step)
    assert detector.onset_step == 5


def test_an_untrained_network_that_is_lucky_on_a_tiny_probe():
    model, data = Answers(5, 5), (torch.arange(5), torch.zeros(5, dtype=torch.long))
    detector = GrokkingDetector(schedule=EverySteps(1))
    recorder = Recorder(model, [detector], Probe(train=data, validation=data))
    for step, right in enumerate([4, 4, 4, 0, 0, 4, 4, 5, 5]):
        model.get_right(right)
        recorder.record(step)
    assert (detector.onset_step, detector.grokked_step) == (5, 7)


# What it did not see.


def test_without_validation_nothing_is_said_of_it():
    detector = GrokkingDetector(schedule=RARELY)
    follow(detector, Scripted(TRAIN, None), validation=None)
    assert (detector.memorized_step, detector.phase, detector.outcome) == (3, "memorised", None)
    assert "validation has not been measured" in detector.texts()["summary"]
    assert "chance" not in detector.texts()["summary"]


def checkpointed(folder, callbacks, epochs, values):
    _, made = fit(callbacks, Scripted(*values), loader(8), loader(8, seed=1), max_steps=-1, max_epochs=epochs)
    made.save_checkpoint(folder / "x.ckpt")


LATE = [0.3] * 5 + [0.3, 0.3, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95, 0.95]


def test_a_detector_that_is_added_at_a_resume(tmp_path, capsys):
    """Memorised at 3, which it did not see; generalised at 8, which may be late or not."""
    values = TRAIN + [1.0] * 5, LATE
    checkpointed(tmp_path, [], 5, values)
    detector = GrokkingDetector(schedule=RARELY)
    with pytest.warns(UserWarning, match=r"goes on from step 5 without a saved state of this detector\. ") as warned:
        fit_on(detector, tmp_path, values)
    assert len([one for one in warned if "without a saved state" in str(one.message)]) == 1
    assert (detector.memorized_step, detector.outcome, detector.delay) == (6, None, None)
    said = [line for line in capsys.readouterr().out.splitlines() if " at " in line or "before step" in line]
    assert said[0] == "Memorised at or before step 6: the training data are fitted."
    assert said[-1] == "Generalised at step 8: whether late or at once is unknown, since the order was not seen."
    assert "| memorised | at or before step 6 |" in detector.texts()["summary"]


def test_generalising_long_after_the_first_look_is_grokking_whenever_it_memorised(tmp_path):
    values = TRAIN + [1.0] * 5, [0.3] * 12 + [0.95] * 3
    checkpointed(tmp_path, [], 5, values)
    detector = GrokkingDetector(schedule=RARELY)
    with pytest.warns(UserWarning, match="without a saved state"):
        fit_on(detector, tmp_path, values)
    assert (detector.memorized_step, detector.grokked_step, detector.outcome) == (6, 13, "grokking")
    assert "at least 7 steps after memorising" in detector.texts()["summary"].replace("\\", "")


def test_the_bar_says_at_or_before(tmp_path):
    values = TRAIN + [1.0] * 5, [0.3] * 15
    checkpointed(tmp_path, [], 5, values)
    detector = GrokkingDetector(schedule=RARELY)
    with pytest.warns(UserWarning, match="without a saved state"):
        fit_on(detector, tmp_path, values)
    assert detector.status() == {"phase": "memorised at or before step 6"}


def test_a_probe_that_fills_as_batches_pass_is_no_late_beginning():
    """Nothing is measured until the probe is full, at step 3, but the run is watched from its first step."""
    x, y = torch.randn(64, 6), torch.zeros(64, dtype=torch.long)
    data = DataLoader(Stream(TensorDataset(x, y)), 8)
    module = Plain(lr=0.0)
    with torch.no_grad():
        module.net[2].bias.copy_(torch.tensor([99.0, 0.0, 0.0]))
    detector = GrokkingDetector(probe=Probe(size=24), schedule=EVERY)
    fit([detector], module, data, max_steps=12)
    assert detector.history["grok/accuracy/train"].steps[0] == 3
    assert detector.tracker.events.when("memorized") == "at step 3"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_setting_that_is_changed_at_a_resume_is_named(tmp_path):
    values = TRAIN + [1.0] * 5, LATE
    checkpointed(tmp_path, [GrokkingDetector(schedule=RARELY)], 5, values)
    detector = GrokkingDetector(schedule=RARELY, patience=1)
    with pytest.warns(UserWarning, match="without a saved state") as warned:
        fit_on(detector, tmp_path, values)
    (said,) = [str(one.message) for one in warned if "without a saved state" in str(one.message)]
    assert f"only of {GrokkingDetector(schedule=RARELY).label} with other settings" in said


def test_a_resume_with_its_state_says_nothing(tmp_path):
    values = TRAIN + [1.0] * 5, LATE
    checkpointed(tmp_path, [GrokkingDetector(schedule=RARELY)], 5, values)
    detector = GrokkingDetector(schedule=RARELY)
    fit_on(detector, tmp_path, values)
    assert (detector.memorized_step, detector.grokked_step, detector.outcome) == (3, 8, "grokking")


def fit_on(detector, folder, values):
    made = trainer([detector], max_steps=-1, max_epochs=15)
    made.fit(Scripted(*values), loader(8), loader(8, seed=1), ckpt_path=folder / "x.ckpt")


def test_a_schedule_by_epochs_beside_it_changes_no_event():
    """The accuracy that the module logs at an epoch's end is there when that end is looked at."""

    def found(schedule):
        torch.manual_seed(0)
        detector = GrokkingDetector(chance=0.0, memorized_threshold=0.5)
        monitors = [detector, NormMonitor(schedule=schedule)]
        fit(monitors, Plain(logs=True), loader(), loader(16, seed=1), max_steps=-1, max_epochs=8)
        return detector.memorized_step, detector.onset_step, detector.grokked_step

    by_epochs = found(EveryEpoch())
    assert None not in by_epochs
    assert by_epochs == found(EverySteps(100))
