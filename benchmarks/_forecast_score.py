"""How good a forecast is: AUROC, alarms, steps, compute saved; each on runs that its calibration has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks._forecast_data import Case, hyper_parameters
from benchmarks._forecast_fit import (
    PATIENCE,
    Calibrated,
    alarm_scores,
    calibrate,
    fit,
    is_late,
    log_wait_of,
    logistic,
    peak,
    threshold_at,
)
from benchmarks._forecast_rivals import Rival
from benchmarks._forecast_suite import Setting
from grok_callbacks.forecast.features import Mode

#: Moments at which forecasts are compared, as steps of a run that memorised at a given step.
MOMENTS: dict[str, Callable[[int], float]] = {
    "memorised + 100": lambda memorized: memorized + 100,
    "memorised + 200": lambda memorized: memorized + 200,
    "memorised + 400": lambda memorized: memorized + 400,
    "2 x memorised": lambda memorized: 2 * memorized,
    "5 x memorised": lambda memorized: 5 * memorized,
    "10 x memorised": lambda memorized: 10 * memorized,
}
MAIN = "memorised + 200"

SCHEMES = ("in-family", "family left out", "architecture left out")


@dataclass(frozen=True, eq=False)
class Judged:
    """One run, its scores by a forecast that was calibrated without it, and that forecast's threshold."""

    case: Case
    scores: np.ndarray
    threshold: float
    calibrated: Calibrated | None = None

    def score_at(self, moment: str) -> float:
        """The score at a moment, NaN if the run's onset had come or it was over."""
        index = self.case.index_at(MOMENTS[moment](self.case.truth.memorized or 0))
        return math.nan if index is None else float(self.scores[index])

    @property
    def alarm_index(self) -> int | None:
        """Which measurement completes the first streak at or above the threshold."""
        due = np.flatnonzero(self.case.is_due)
        streaks = np.flatnonzero(alarm_scores(self.scores[due]) >= self.threshold)
        return int(due[streaks[0] + PATIENCE - 1]) if len(streaks) else None


# Areas and intervals.


def auroc(scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray) -> float:
    """Chance that a positive has a higher score than a negative, ties counting half; NaN without both.

    A score that is unknown (NaN) counts as the median of the known ones.
    """
    values, positive = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    if positive.all() or not positive.any():
        return math.nan
    known = np.isfinite(values)
    values = np.where(known, values, np.median(values[known]) if known.any() else 0.0)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    count = positive.sum()
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(values) - count)))


def bootstrap(statistic: Callable[[np.ndarray], float], size: int, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% interval of a statistic of runs, given as indices with repetition; draws where it is undefined are left out."""
    generator = np.random.default_rng(seed)
    values = np.array([statistic(generator.integers(size, size=size)) for _ in range(draws)]) if size else np.array([])
    values = values[np.isfinite(values)]
    return (math.nan, math.nan) if len(values) == 0 else (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975)))


@dataclass(frozen=True)
class Figure:
    """A number with its 95% interval and the runs behind it."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def area(judged: Sequence[Judged], moment: str) -> tuple[Figure, int, int]:
    """AUROC over runs whose onset had not come, with the numbers of positives and negatives."""
    pairs = [(one.score_at(moment), one.case.is_positive) for one in judged if one.case.index_at(_at(one, moment)) is not None]
    scores, labels = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs], dtype=bool)
    low, high = bootstrap(lambda index: auroc(scores[index], labels[index]), len(pairs))
    value = auroc(scores, labels) if pairs else math.nan
    return Figure(value, low, high, len(pairs)), int(labels.sum()), int((~labels).sum())


def area_difference(first: Sequence[Judged], second: Sequence[Judged], moment: str) -> Figure:
    """AUROC of the first less that of the second on the same runs, with the paired interval."""
    ours = {one.case.setting.key: one for one in first}
    rows = [
        (ours[other.case.setting.key].score_at(moment), other.score_at(moment), other.case.is_positive)
        for other in second
        if other.case.setting.key in ours and other.case.index_at(_at(other, moment)) is not None
    ]
    table = np.array(rows, dtype=float).reshape(-1, 3)

    def difference(index: np.ndarray) -> float:
        labels = table[index, 2] > 0
        return auroc(table[index, 0], labels) - auroc(table[index, 1], labels)

    low, high = bootstrap(difference, len(table))
    return Figure(difference(np.arange(len(table))) if len(table) else math.nan, low, high, len(table))


def _at(one: Judged, moment: str) -> float:
    return MOMENTS[moment](one.case.truth.memorized or 0)


# Forecasts on runs that they have not seen.


def _split(cases: Sequence[Case], scheme: str) -> Iterable[tuple[list[Case], list[Case], Callable[[Case], Hashable]]]:
    """Calibration runs, runs to judge, and what is held out together inside calibration; runs that do not count are neither."""
    for half in ("A", "B"):
        others = [case for case in cases if case.setting.half != half and case.judged]
        own = [case for case in cases if case.setting.half == half and case.judged]
        if scheme == "in-family":
            yield others, own, lambda case: case.setting.seed // 2 % 5
            continue
        left_out: Callable[[Case], Hashable] = family_of if scheme == "family left out" else architecture_of
        for name in sorted({left_out(case) for case in own}, key=str):
            yield (
                [case for case in others if left_out(case) != name],
                [case for case in own if left_out(case) == name],
                family_of,
            )


def family_of(case: Case) -> str:
    """The isomorphism class of the task."""
    return case.setting.family


def architecture_of(case: Case) -> str:
    """Transformer or multilayer perceptron."""
    return "transformer" if case.setting.is_transformer else "MLP"


def forecasts(cases: Sequence[Case], mode: Mode, scheme: str) -> list[Judged]:
    """Every run by the forecast that was calibrated on the other half, and, as the scheme says, on other families."""
    result = []
    for known, unseen, group in _split(cases, scheme):
        calibrated = calibrate(known, mode, group)
        result += [Judged(case, calibrated.fit.probabilities(case), calibrated.threshold, calibrated) for case in unseen]
    return result


def by_features(cases: Sequence[Case], mode: Mode, scheme: str, chosen: Sequence[str]) -> list[Judged]:
    """The same from other features than those that were chosen, without thresholds."""
    result = []
    for known, unseen, _ in _split(cases, scheme):
        fitted = fit(known, mode, chosen)
        result += [Judged(case, fitted.probabilities(case), 1.0) for case in unseen]
    return result


def at_shipped_thresholds(cases: Sequence[Case], mode: Mode) -> list[Judged]:
    """Every run by a forecast calibrated on all other families, at the threshold that ships.

    That threshold lets 5% of these very negatives pass, so their false alarms say nothing; what it finds and how early does.
    """
    shipped = calibrate(cases, mode, family_of)
    known = [case for case in cases if case.judged]
    result = []
    for name in sorted({family_of(case) for case in known}):
        fitted = fit([case for case in known if family_of(case) != name], mode)
        result += [
            Judged(case, fitted.probabilities(case), shipped.threshold, shipped) for case in known if family_of(case) == name
        ]
    return result


def by_hyper_parameters(
    cases: Sequence[Case], scheme: str, describe: Callable[[Setting], np.ndarray] = hyper_parameters
) -> list[Judged]:
    """The same by a predictor that knows the hyper-parameters, or what else of a setting is described, and no signal."""
    result = []
    for known, unseen, _ in _split(cases, scheme):
        table = np.array([describe(case.setting) for case in known])
        mean, scale = table.mean(0), np.maximum(table.std(0), 1e-9)
        labels = np.array([float(case.is_positive) for case in known])
        beta = logistic((table - mean) / scale, labels, np.ones(len(known)), 1.0)

        def score(case: Case, beta: np.ndarray = beta, mean: np.ndarray = mean, scale: np.ndarray = scale) -> float:
            return float(beta[0] + (describe(case.setting) - mean) / scale @ beta[1:])

        threshold = threshold_at([score(case) for case in known if not case.is_positive])
        result += [Judged(case, np.full(len(case.steps), score(case)), threshold) for case in unseen]
    return result


def by_rival(cases: Sequence[Case], rival: Rival, *, own_rule: bool = False) -> list[Judged]:
    """Every run by a rival, whose form, sign and threshold come from the other half, or from its paper with ``own_rule``."""
    tables = [[form(case) if len(case.steps) else np.zeros(0) for case in cases] for form in rival.forms]
    result = []
    for half in ("A", "B"):
        known = [index for index, case in enumerate(cases) if case.setting.half != half and case.judged]
        if own_rule and rival.rule is not None:
            threshold, sign, chosen = rival.rule[0], rival.rule[1], tables[0]
        else:
            areas = [auroc(*_at_main([cases[i] for i in known], [table[i] for i in known])) for table in tables]
            best = int(np.nanargmax([abs(value - 0.5) for value in areas]))
            sign, chosen = (1.0 if areas[best] >= 0.5 else -1.0), tables[best]
            due = [(cases[i], sign * chosen[i]) for i in known if not cases[i].is_positive]
            finite = [np.nan_to_num(values[case.is_due], nan=-1e9) for case, values in due]
            # Peaks of any sign: a run that cannot alarm is shown by its length.
            peaks = [peak(values) for values in finite if len(values) >= PATIENCE]
            threshold = _threshold_of_any_sign(peaks)
        result += [
            Judged(case, np.nan_to_num(sign * chosen[index], nan=-1e9) if own_rule else sign * chosen[index], threshold)
            for index, case in enumerate(cases)
            if case.setting.half == half and case.judged
        ]
    return result


def _threshold_of_any_sign(peaks: Sequence[float]) -> float:
    lowest = min(peaks, default=0.0)
    return threshold_at([value - lowest for value in peaks]) + lowest


def _at_main(cases: Sequence[Case], series: Sequence[np.ndarray]) -> tuple[list[float], list[bool]]:
    pairs = []
    for case, values in zip(cases, series, strict=True):
        index = case.index_at(MOMENTS[MAIN](case.truth.memorized or 0))
        if index is not None:
            pairs.append((float(values[index]), case.is_positive))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


# Alarms.


@dataclass(frozen=True)
class Alarms:
    """What the alarms of a forecast were worth."""

    true_positives: Figure
    false_alarms: Figure
    lead_steps: Figure
    lead_share: Figure


def alarms(judged: Sequence[Judged]) -> Alarms:
    """Rates over the runs that could give an alarm, among positives those with an onset after the main moment."""
    counted = [one for one in judged if one.case.judged]
    positives = [one for one in counted if one.case.is_positive and one.case.index_at(_at(one, MAIN)) is not None]
    negatives = [one for one in counted if not one.case.is_positive]
    leads = np.array([_lead(one) for one in positives]).reshape(-1, 2)
    found = np.array([one.alarm_index is not None for one in positives], dtype=float)
    wrong = np.array([one.alarm_index is not None for one in negatives], dtype=float)
    return Alarms(_mean(found), _mean(wrong), _median(leads[found > 0, 0]), _median(leads[found > 0, 1]))


def _lead(one: Judged) -> tuple[float, float]:
    index, truth = one.alarm_index, one.case.truth
    if index is None or truth.onset is None or truth.memorized is None:
        return math.nan, math.nan
    steps = truth.onset - int(one.case.steps[index])
    return float(steps), steps / (truth.onset - truth.memorized)


def _mean(values: np.ndarray) -> Figure:
    low, high = bootstrap(lambda index: float(values[index].mean()), len(values))
    return Figure(float(values.mean()) if len(values) else math.nan, low, high, len(values))


def _median(values: np.ndarray) -> Figure:
    low, high = bootstrap(lambda index: float(np.median(values[index])), len(values))
    return Figure(float(np.median(values)) if len(values) else math.nan, low, high, len(values))


@dataclass(frozen=True)
class Steps:
    """What the forecast steps were worth, over the true alarms."""

    within_factor_2: Figure
    coverage: Figure
    forecast: np.ndarray
    truth: np.ndarray


def steps(judged: Sequence[Judged]) -> Steps:
    """The forecast made at the alarm against the step at which the run had generalised."""
    rows = []
    for one in judged:
        index = one.alarm_index
        if one.calibrated is None or not one.case.judged or not one.case.is_positive or index is None:
            continue
        wait, true = float(one.calibrated.fit.log_waits(one.case)[index]), float(log_wait_of(one.case)[index])
        low, middle, high = (wait + quantile for quantile in one.calibrated.quantiles)
        now = float(one.case.steps[index])
        rows.append((now * (1 + math.exp(middle)), float(one.case.truth.grokked or 0), low <= true <= high))
    table = np.array(rows, dtype=float).reshape(-1, 3)
    ratio = table[:, 0] / np.maximum(table[:, 1], 1)
    return Steps(_mean(((ratio >= 0.5) & (ratio <= 2)).astype(float)), _mean(table[:, 2]), table[:, 0], table[:, 1])


@dataclass(frozen=True)
class Savings:
    """What stopping hopeless runs saves, and what it loses."""

    saved: float
    stopped: Figure
    lost: Figure


def savings(judged: Sequence[Judged]) -> Savings:
    """Steps saved among all that the runs took, and the share of positives that were stopped."""
    counted = [one for one in judged if one.case.judged and one.calibrated is not None]
    stops = [_stop_of(one) for one in counted]
    total = sum(one.case.record.last_step for one in counted)
    saved = sum(one.case.record.last_step - stop for one, stop in zip(counted, stops, strict=True) if stop is not None)
    positive = np.array([one.case.is_positive for one in counted], dtype=bool)
    stopped = np.array([stop is not None for stop in stops], dtype=float)
    return Savings(saved / max(total, 1), _mean(stopped[~positive]), _mean(stopped[positive]))


def _stop_of(one: Judged) -> int | None:
    assert one.calibrated is not None
    late = np.flatnonzero(is_late(one.case))
    streaks = np.flatnonzero(alarm_scores(-one.scores[late]) > -one.calibrated.hopeless)
    return int(one.case.steps[late[streaks[0] + PATIENCE - 1]]) if len(streaks) else None
