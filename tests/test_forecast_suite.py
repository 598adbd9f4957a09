"""The runs that calibrate the forecast, their cache, what they turned out to be, and how forecasts of them are scored."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from benchmarks import _forecast_data as data
from benchmarks import _forecast_fit as fit
from benchmarks import _forecast_rivals as rivals
from benchmarks import _forecast_score as score
from benchmarks import _forecast_suite as suite
from benchmarks import _forecast_truth as truth
from grok_callbacks import CircuitComplexityMonitor, GrokkingDetector, History, NormMonitor, Probe, RepresentationMonitor
from grok_callbacks.forecast.model import ForecastModel
from grok_callbacks.tasks import PairTaskDataModule

SHORT = suite.Setting("A", "add", 7, "onehot", 0.6, 0.02, 0.5, 4, width=16, max_steps=60)


def record_of(setting, accuracies, steps=None, memorized_at=10):
    """A run whose validation accuracy is given and whose training accuracy is 1 from a step on."""
    steps = list(range(0, 10 * len(accuracies), 10)) if steps is None else steps
    history = History()
    for step, accuracy in zip(steps, accuracies, strict=True):
        history.add(step, {"grok/accuracy/train": float(step >= memorized_at), "grok/accuracy/validation": accuracy})
        history.add(step, {"grok/norm": 10.0 - step / 100 * (setting.weight_decay > 0), "grok/loss/train": 1 / (1 + step)})
        history.add(step, {"train_only/representation/entropy": 0.5})
    return suite.RunRecord(setting, history, np.ones(steps[-1], np.float32), np.zeros((3, 2), np.float32), steps[-1], 0.0)


# The runs.


def test_halves_share_nothing():
    chosen = suite.settings()
    assert len(chosen) >= 400
    assert len({setting.key for setting in chosen}) == len(chosen)
    seeds, sizes = (
        {half: {f(s) for s in chosen if s.half == half} for half in "AB"}
        for f in (lambda s: s.seed, lambda s: (s.task, s.size))
    )
    assert not seeds["A"] & seeds["B"]
    assert not sizes["A"] & sizes["B"]
    moduli = {
        half: {s.size for s in chosen if s.half == half and s.family in ("cyclic", "quadratic", "random")} for half in "AB"
    }
    assert not moduli["A"] & moduli["B"]


def test_the_suite_has_what_it_must():
    chosen = suite.settings()
    assert {"add", "sub", "mul", "div", "x2y2", "x2xyy2", "random", "permutation", "xor", "digits"} <= {s.task for s in chosen}
    for is_transformer in (False, True):
        own = [s for s in chosen if s.is_transformer == is_transformer and s.family == "cyclic"]
        assert len({s.fraction for s in own}) >= 3
        assert len({s.weight_decay for s in own} - {0.0}) >= 3
        assert any(s.weight_decay == 0 for s in own)
    assert suite.settings() == chosen


@pytest.mark.parametrize(("task", "order"), [(suite.dihedral(5), 10), (suite.frobenius(7), 21)])
def test_groups_are_groups(task, order):
    table = task.group.table
    assert len(table) == order
    assert not task.group.is_abelian
    everything = torch.arange(order)
    left = table[table[everything[:, None, None], everything[:, None]], everything]
    right = table[everything[:, None, None], table[everything[:, None], everything]]
    assert torch.equal(left, right)


@pytest.mark.parametrize("architecture", ["onehot", "embedding", "transformer"])
def test_a_run_is_reproducible_and_comes_back_from_its_file(tmp_path, architecture):
    setting = replace(SHORT, architecture=architecture, max_steps=2)
    first, second = suite.train(setting), suite.train(setting)
    assert dict(first.history) == dict(second.history)
    suite.save(first, tmp_path)
    loaded = suite.load(tmp_path / f"{setting.key}.npz")
    assert loaded.setting == setting
    assert dict(loaded.history) == dict(first.history)
    assert np.array_equal(loaded.losses, first.losses)
    assert len(loaded.losses) == loaded.last_step + 1 == 3


def test_a_longer_run_begins_like_a_shorter_one():
    shorter, longer = suite.train(replace(SHORT, max_steps=4)), suite.train(replace(SHORT, max_steps=6))
    assert dict(longer.history.until(4)) == dict(shorter.history)


def test_a_trainer_gives_the_same_history(tmp_path):
    """The bare loop stands for what a user's callbacks record."""
    setting = replace(SHORT, max_steps=25)
    network, seen, unseen = suite.build(setting)
    probe = Probe(train=seen, validation=unseen)

    def watch():
        return [
            GrokkingDetector(probe=probe),
            NormMonitor(probe=probe),
            CircuitComplexityMonitor(probe=probe),
            RepresentationMonitor(probe=probe),
        ]

    bare = suite.train(setting, watch())
    # The module logs accuracies of batches, and the loop has none to go by.
    network.configure_optimizers = lambda: suite.optimiser_of(network)
    network.log = lambda *_, **__: None
    module = PairTaskDataModule(setting.task, setting.size, setting.fraction, setting.seed)
    module.train_set.inputs, module.train_set.targets = seen
    callbacks = watch()
    trainer = pl.Trainer(
        max_steps=25, max_epochs=-1, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", limit_val_batches=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(network, module)
    history = callbacks[0].history
    assert {key for key in bare.history if key.startswith("grok/")} == {key for key in history if key.startswith("grok/")}
    for key, series in bare.history.items():
        # Only in a Trainer a module may still log an accuracy of its own, so it is said later from when on one was watched.
        assert history[key].steps == series.steps or key.endswith("_since"), key
        assert history[key].values == pytest.approx(series.values, rel=1e-6, nan_ok=True), key


def test_the_suite_is_resumed(tmp_path, monkeypatch):
    chosen = [replace(SHORT, seed=seed, max_steps=8) for seed in (2, 4, 6)]
    suite.run_and_save(chosen[0], tmp_path)
    (tmp_path / f"{chosen[1].key}.npz").write_bytes(b"cut off")
    made = []
    monkeypatch.setattr(suite, "_over_processes", lambda settings, folder, workers: made.extend(settings) or iter([]))
    suite.run_suite(chosen, tmp_path, workers=1)
    assert made == chosen[1:]
    made.clear()
    suite.run_suite([replace(chosen[0], max_steps=9)], tmp_path, workers=1)
    assert [setting.max_steps for setting in made] == [9]


def test_workers_make_the_runs(tmp_path):
    chosen = [replace(SHORT, seed=seed, max_steps=4) for seed in (2, 4)]
    suite.run_suite(chosen, tmp_path, workers=1)
    assert {record.setting for record in suite.load_all(chosen, tmp_path)} == set(chosen)


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match="pip install ray"):
        suite.run_suite([SHORT], tmp_path, ray=True)


# What became of them.


def test_truth_and_horizons():
    grows = record_of(SHORT, [0.1] * 6 + [0.95] * 3)
    flat = record_of(replace(SHORT, seed=6), [0.15] * 30)
    short = record_of(replace(SHORT, seed=8), [0.15] * 15)
    rising = record_of(replace(SHORT, seed=10), [0.15 + 0.02 * k for k in range(30)])
    partial = record_of(replace(SHORT, seed=12), [0.15] * 5 + [0.6] * 25)
    noise = record_of(replace(SHORT, seed=14, task="random"), [0.15] * 8)
    records = [grows, flat, short, rising, partial, noise]
    truths = [truth.truth_of(record) for record in records]
    assert [one.outcome for one in truths] == ["grokking"] + ["memorisation"] * 5
    assert (truths[0].memorized, truths[0].onset, truths[0].grokked) == (10, 60, 60)
    known = truth.horizons(records, truths)
    assert known == {("cyclic", False, 0.5): 60}
    censored = [truth.is_censored(record, one, known) for record, one in zip(records, truths, strict=True)]
    # The third was stopped before three times the slowest positive, the fourth was still rising.
    assert censored == [False, False, True, True, False, False]


def test_a_late_positive_is_left_out_where_its_negatives_were_watched_too_briefly():
    early = [record_of(replace(SHORT, seed=2 * seed), [0.1] * 6 + [0.95] * 3) for seed in range(3)]
    late = record_of(replace(SHORT, seed=20), [0.1] * 15 + [0.95] * 3)
    negatives = [record_of(replace(SHORT, seed=30 + 2 * seed), [0.1] * 25) for seed in range(3)]
    records = [*early, late, *negatives]
    truths = [truth.truth_of(record) for record in records]
    known = truth.horizons(records, truths)
    assert known == {("cyclic", False, 0.5): 60}
    assert [truth.is_censored(r, t, known) for r, t in zip(records, truths, strict=True)] == [False] * 3 + [True] + [False] * 3


def test_forecasts_are_made_between_memorising_and_onset():
    record = record_of(SHORT, [0.1] * 20 + [0.4, 0.5] + [0.95] * 3)
    case = data.cases_of([record])[0]
    assert case.truth.memorized == 10
    assert case.steps.tolist() == list(range(20, 200, 10))
    assert case.steps[case.is_due].tolist() == list(range(60, 200, 10))
    assert case.index_at(110) == case.steps.tolist().index(110)
    assert case.index_at(115) == case.steps.tolist().index(110)
    assert case.index_at(200) is None
    assert case.index_at(15) is None


# Scores.


@pytest.mark.parametrize("seed", range(5))
def test_auroc_against_counting_pairs(seed):
    draw = np.random.default_rng(seed)
    scores, labels = draw.integers(0, 5, size=30).astype(float), draw.random(30) < 0.4
    wins = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    assert score.auroc(scores, labels) == pytest.approx(np.mean(wins))


def test_auroc_of_one_kind_and_of_unknown_scores():
    assert math.isnan(score.auroc([1.0, 2.0], [True, True]))
    assert score.auroc([math.nan, math.nan], [True, False]) == 0.5
    assert score.auroc([math.nan, 1.0, 3.0], [True, False, True]) == score.auroc([2.0, 1.0, 3.0], [True, False, True])


def test_bootstrap_of_a_mean_has_the_textbook_interval():
    values = np.random.default_rng(0).normal(size=400)
    low, high = score.bootstrap(lambda index: float(values[index].mean()), 400)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high
    assert math.isnan(score.bootstrap(lambda index: 0.0, 0)[0])


def test_logistic_regression_against_sklearn():
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(0)
    X, weight = draw.normal(size=(200, 3)), draw.random(200)
    y = (draw.random(200) < 1 / (1 + np.exp(-X @ [1.0, -2.0, 0.0]))).astype(float)
    ours = fit.logistic(X, y, weight, 2.0)
    theirs = LogisticRegression(C=0.5, tol=1e-10, max_iter=1000).fit(X, y, weight)
    assert ours[1:] == pytest.approx(theirs.coef_[0], abs=1e-4)
    assert ours[0] == pytest.approx(theirs.intercept_[0], abs=1e-4)


def test_threshold_lets_no_more_than_the_rate_pass():
    peaks = np.random.default_rng(0).random(100)
    threshold = fit.threshold_at(peaks, 0.05)
    assert (peaks >= threshold).sum() == 5
    assert fit.threshold_at([0.3, 0.2], 0.05) > 0.3
    # Runs that can't give an alarm don't count.
    assert fit.threshold_at([0.3, -1.0], 0.05) == fit.threshold_at([0.3], 0.05)


def test_conformal_intervals_cover():
    draw = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        low, _, high = fit.conformal_quantiles([draw.normal(size=1) for _ in range(60)])
        new = draw.normal(size=50)
        covered.append(((new >= low) & (new <= high)).mean())
    assert np.mean(covered) == pytest.approx(0.8, abs=0.03)


def test_runs_weigh_the_same_in_conformal_quantiles():
    low, middle, high = fit.conformal_quantiles([np.full(1000, 5.0), *[np.array([float(k)]) for k in range(9)]])
    assert (low, middle, high) == (0.0, 4.0, 8.0)


def judged_of(scores, *, positive, onset=None, threshold=0.5):
    setting = replace(SHORT, seed=2 * abs(hash((tuple(scores), positive))) % 10**6)
    steps = np.arange(10, 10 + 10 * len(scores), 10)
    one = truth.Truth(0, onset, None if not positive else (onset or 0) + 50, "grokking" if positive else "memorisation", True)
    record = suite.RunRecord(setting, History(), np.zeros(1), np.zeros((1, 1)), 1000, 0.0)
    case = data.Case(record, one, "positive" if positive else "negative", steps, {})
    return score.Judged(case, np.array(scores, dtype=float), threshold)


def test_an_alarm_takes_two_in_a_row_and_time_to_have_passed():
    early = judged_of([1, 1, 1, 0, 0, 0, 0, 0], positive=True, onset=400)
    assert early.alarm_index is None
    single = judged_of([0, 0, 0, 0, 1, 0, 1, 0], positive=True, onset=400)
    assert single.alarm_index is None
    twice = judged_of([0, 0, 0, 0, 0, 1, 1, 0], positive=True, onset=400)
    assert int(twice.case.steps[twice.alarm_index]) == 70
    assert judged_of([0.5] * 8, positive=False).alarm_index is not None


def test_alarms_by_hand():
    runs = [
        judged_of([0] * 10 + [1] * 20, positive=True, onset=320),
        judged_of([0] * 30, positive=True, onset=320),
        judged_of([0] * 30, positive=False),
        judged_of([0] * 29 + [1], positive=False),
        judged_of([0] * 28 + [1, 1], positive=False),
    ]
    found = score.alarms(runs)
    assert found.true_positives.value == 0.5
    assert found.false_alarms.value == pytest.approx(1 / 3)
    assert found.lead_steps.value == 320 - 120
    assert found.lead_share.value == pytest.approx(200 / 320)


def test_the_shipped_model_is_the_fitted_one():
    draw = np.random.default_rng(0)
    records = []
    for seed in range(12):
        groks = seed % 2 == 0
        setting = replace(SHORT, seed=seed, weight_decay=0.5 * groks)
        rise = [0.12] * (20 + int(draw.integers(5))) + ([0.95] * 3 if groks else [0.12] * 60)
        records.append(record_of(setting, rise))
    cases = data.cases_of(records)
    for mode in ("train", "inputs", "labels"):
        calibrated = fit.calibrate(cases, mode, lambda case: case.setting.seed % 4)
        model = ForecastModel.from_json(calibrated.to_model("Twelve made-up runs.").to_json())
        for case in cases[:3]:
            history = data.history_for(case.record, mode)
            for step, probability in zip(case.steps, calibrated.fit.probabilities(case), strict=True):
                assert model(history, int(step), case.truth.memorized).probability == pytest.approx(probability, rel=1e-3)


def test_runs_whose_end_is_unknown_are_not_scored():
    records = [
        record_of(replace(SHORT, seed=seed, half="AB"[seed % 2]), [0.12] * 30 + ([0.95] * 3 if seed % 3 else [0.12] * 90))
        for seed in range(12)
    ]
    cases = [replace(case, status="censored") if case.setting.seed in (4, 5, 6, 9) else case for case in data.cases_of(records)]
    expected = {seed for seed in range(12) if seed not in (4, 5, 6, 9)}
    by_norm = rivals.Rival("norm", (rivals.level("grok/norm"),))
    for judged in (
        score.forecasts(cases, "train", "in-family"),
        score.by_hyper_parameters(cases, "in-family"),
        score.by_rival(cases, by_norm),
        score.by_rival(cases, by_norm, own_rule=True),
    ):
        assert {one.case.setting.seed for one in judged} == expected
        _, positives, negatives = score.area(judged, "memorised + 100")
        assert positives + negatives == len(expected)


def test_settings_beyond_the_hyper_parameters_tell_what_these_cannot():
    settings = [replace(SHORT, seed=seed, half="AB"[seed % 2], task="add" if seed % 4 < 2 else "xor") for seed in range(12)]
    records = [record_of(one, [0.12] * 30 + ([0.95] * 3 if one.task == "add" else [0.12] * 90)) for one in settings]
    # Of one size by the number of elements.
    records = [replace(one, setting=replace(one.setting, size=8 if one.setting.task == "add" else 3)) for one in records]
    cases = data.cases_of(records)
    blind = score.by_hyper_parameters(cases, "in-family")
    informed = score.by_hyper_parameters(cases, "in-family", data.all_settings)
    assert score.area(blind, "memorised + 100")[0].value == 0.5
    assert score.area(informed, "memorised + 100")[0].value == 1.0


def test_at_the_shipped_threshold_no_more_negatives_than_the_rate_give_an_alarm():
    draw = np.random.default_rng(1)
    records = []
    for seed in range(60):
        groks, task = seed % 2 == 0, ("add", "x2y2", "xor")[seed % 3]
        setting = replace(SHORT, seed=seed, task=task, weight_decay=0.5 * groks)
        record = record_of(setting, [0.12] * (20 + int(draw.integers(5))) + ([0.95] * 3 if groks else [0.12] * 60))
        for step in record.history["grok/norm"].steps:
            record.history.add(step, {"grok/truncation/loss/0.5": math.exp(draw.normal() - 0.01 * step * groks)})
        records.append(record)
    judged = score.at_shipped_thresholds(data.cases_of(records), "train")
    assert {one.case.setting.seed for one in judged} == set(range(60))
    assert len({one.threshold for one in judged}) == 1
    found = score.alarms(judged)
    assert found.false_alarms.count == 30
    assert 0 < found.false_alarms.value <= fit.FALSE_ALARMS
    assert found.true_positives.value > 0.5


def test_every_rival_has_a_number_at_every_forecast():
    record = suite.train(replace(SHORT, max_steps=300))
    case = data.cases_of([record])[0]
    assert len(case.steps)
    for rival in rivals.RIVALS:
        for form in rival.forms:
            assert form(case).shape == case.steps.shape, rival.name


def test_dynamic_modes_of_a_linear_system_leave_no_residual():
    steps = np.arange(24)
    curve = np.stack([0.9**steps, 0.9**steps * 2 + 0.5**steps], axis=1)
    assert rivals._hankel_residual(curve) < math.log(1e-6)
    assert rivals._hankel_residual(np.random.default_rng(0).normal(size=(24, 2))) > math.log(0.1)
