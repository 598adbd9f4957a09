"""Regularised regressions, thresholds and intervals: how the shipped coefficients are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks._forecast_data import WAIT, Case, feature_names
from grok_callbacks.forecast.features import Mode
from grok_callbacks.forecast.model import ForecastModel, Term

#: Strength of the penalty on standardised coefficients, in units of one run.
PENALTY = 5.0
STEP_PENALTY = 30.0

#: The features from which each mode tells whether a run will grok, chosen one after another on the runs that
#: ``forecast_development.txt`` lists, for the mean area over all three ways of leaving runs out. The report says how all
#: features together do. When it will, all features tell.
CHOSEN: dict[Mode, tuple[str, ...]] = {
    "train": (
        "half_loss.since", "half_loss.level", "cut_loss.since", "cut_accuracy.since", "first_coherence.level",
        "train_representation.level", "spectral_entropy.since", "time",
    ),
    "inputs": (
        "answer_entropy.level", "doubt.recent", "half_loss.since", "half_loss.level", "cut_loss.since", "cut_loss.level",
        "cut_accuracy.since", "spectral_entropy.since", "time",
    ),
    "labels": (
        "validation_loss.since", "validation_loss.recent", "validation_loss.peak", "cut_loss.since", "half_loss.level", "time",
    ),
}  # fmt: skip

#: Forecasts are learnt from up to so many times the steps of memorising, and ``LEARNT_STEPS`` more.
LEARNT_RATIO, LEARNT_STEPS = 40, 400
PATIENCE = 2
FALSE_ALARMS = 0.05
LOST = 0.05
HOPELESS_AFTER = 5.0

_FURTHEST = 3.0


def logistic(X: np.ndarray, y: np.ndarray, weight: np.ndarray, penalty: float) -> np.ndarray:
    """Coefficients of a logistic regression, intercept first and free of the penalty, by Newton's method."""
    design = np.column_stack([np.ones(len(X)), X])
    ridge = np.diag([1e-6, *[penalty] * X.shape[1]])
    beta = np.zeros(design.shape[1])

    def objective(b: np.ndarray) -> float:
        margin = design @ b
        return float(weight @ (np.logaddexp(0, margin) - y * margin) + 0.5 * b @ ridge @ b)

    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ beta, -50, 50)))
        gradient = design.T @ (weight * (p - y)) + ridge @ beta
        hessian = (design * (weight * p * (1 - p))[:, None]).T @ design + ridge
        direction, size = np.linalg.solve(hessian, gradient), 1.0
        while objective(beta - size * direction) > objective(beta) and size > 1e-6:
            size /= 2
        beta = beta - size * direction
        if np.abs(size * direction).max() < 1e-8:
            break
    return beta


def ridge(X: np.ndarray, y: np.ndarray, weight: np.ndarray, penalty: float) -> np.ndarray:
    """Coefficients of a linear regression, intercept first and free of the penalty."""
    design = np.column_stack([np.ones(len(X)), X])
    penalties = np.diag([1e-9, *[penalty] * X.shape[1]])
    return np.linalg.solve((design * weight[:, None]).T @ design + penalties, design.T @ (weight * y))


@dataclass(frozen=True)
class Fit:
    """Coefficients before there are thresholds; what was not chosen has none."""

    mode: Mode
    mean: np.ndarray
    scale: np.ndarray
    odds: np.ndarray
    wait: np.ndarray

    def standardised(self, table: np.ndarray) -> np.ndarray:
        """Features as the shipped model sees them."""
        return np.clip(np.nan_to_num((table - self.mean) / self.scale), -_FURTHEST, _FURTHEST)

    def probabilities(self, case: Case) -> np.ndarray:
        """One for each forecast of a run."""
        z = self.standardised(case.features[self.mode])
        return 1 / (1 + np.exp(-(self.odds[0] + z @ self.odds[1:])))

    def log_waits(self, case: Case) -> np.ndarray:
        """The expected logarithm of (generalised - step) / step, for each forecast of a run."""
        return self.wait[0] + self.standardised(case.features[self.mode]) @ self.wait[1:]


def fit(cases: Sequence[Case], mode: Mode, chosen: Sequence[str] | None = None) -> Fit:
    """Both regressions over all forecasts of all runs; every run weighs the same, however often it was measured.

    Args:
        cases: The calibration runs.
        mode: What the forecast may look at.
        chosen: Features that tell whether; by default :data:`CHOSEN`.
    """
    cases = [case for case in cases if case.judged]
    learnt = {case: case.is_due & (case.steps <= LEARNT_RATIO * (case.truth.memorized or 0) + LEARNT_STEPS) for case in cases}
    X = np.concatenate([case.features[mode][learnt[case]] for case in cases])
    counts = np.array([int(learnt[case].sum()) for case in cases])
    weight = np.repeat(1 / np.maximum(counts, 1), counts)
    y = np.repeat([float(case.is_positive) for case in cases], counts)
    known = np.isfinite(X)
    total = np.maximum((weight[:, None] * known).sum(0), 1e-9)
    mean = (weight[:, None] * np.where(known, X, 0)).sum(0) / total
    scale = np.sqrt((weight[:, None] * np.where(known, X - mean, 0) ** 2).sum(0) / total)
    scale = np.where(scale > 1e-9, scale, 1.0)
    result = Fit(mode, mean, scale, np.zeros(0), np.zeros(0))
    columns = [feature_names(mode).index(name) for name in (CHOSEN[mode] if chosen is None else chosen)]
    z = result.standardised(X)
    waits = np.concatenate([log_wait_of(case)[learnt[case]] for case in cases if case.is_positive])
    odds = np.zeros(X.shape[1] + 1)
    odds[[0, *(column + 1 for column in columns)]] = logistic(z[:, columns], y, weight, PENALTY)
    wait = ridge(z[y > 0], waits, weight[y > 0], STEP_PENALTY)
    return Fit(mode, mean, scale, odds, wait)


def log_wait_of(case: Case) -> np.ndarray:
    """The true logarithm of (generalised - step) / step, for each forecast of a run that grokked."""
    assert case.truth.grokked is not None
    return np.log((case.truth.grokked - case.steps) / case.steps)


def is_late(case: Case) -> np.ndarray:
    """At which steps a run may be called hopeless."""
    return case.is_due & (case.steps >= HOPELESS_AFTER * (case.truth.memorized or 0))


def alarm_scores(probabilities: np.ndarray) -> np.ndarray:
    """The highest threshold at which each forecast would complete a streak of ``PATIENCE``."""
    if len(probabilities) < PATIENCE:
        return np.zeros(0)
    return np.lib.stride_tricks.sliding_window_view(probabilities, PATIENCE).min(-1)


def peak(probabilities: np.ndarray) -> float:
    """The highest threshold at which a run gives an alarm; below zero if it cannot."""
    scores = alarm_scores(probabilities)
    return float(scores.max()) if len(scores) else -1.0


def threshold_at(peaks: Sequence[float], rate: float = FALSE_ALARMS) -> float:
    """The lowest threshold that no more than a share ``rate`` of these runs reach."""
    ordered = sorted((value for value in peaks if value >= 0), reverse=True)
    allowed = math.floor(rate * len(ordered))
    return math.nextafter(ordered[allowed], math.inf) if allowed < len(ordered) else 0.0


def conformal_quantiles(residuals: Sequence[np.ndarray], coverage: float = 0.8) -> tuple[float, float, float]:
    """Quantiles of residuals of runs held out, every run weighing the same.

    With n runs the outer ones are taken at the level (n + 1) / n x of split-conformal prediction, so that coverage is at least
    the given one on average over calibration sets.
    """
    runs = [run for run in residuals if len(run)]
    values = np.concatenate(runs)
    weight = np.concatenate([np.full(len(run), 1 / len(run)) for run in runs])
    order = np.argsort(values)
    values, level = values[order], np.cumsum(weight[order]) / len(runs)
    tail = (1 - coverage) / 2
    high = min(1.0, (1 - tail) * (len(runs) + 1) / len(runs))
    low = max(0.0, 1 - high)

    def quantile(share: float) -> float:
        return float(values[min(int(np.searchsorted(level, share - 1e-12)), len(values) - 1)])

    return quantile(low), quantile(0.5), quantile(high)


@dataclass(frozen=True)
class Calibrated:
    """A fit with what was learnt from runs that it had not seen."""

    fit: Fit
    threshold: float
    hopeless: float
    quantiles: tuple[float, float, float]

    def to_model(self, calibrated_on: str) -> ForecastModel:
        """What ships."""
        names = feature_names(self.fit.mode)
        numbers = zip(self.fit.mean, self.fit.scale, self.fit.odds[1:], self.fit.wait[1:], strict=True)
        terms = {name: Term(*map(float, row)) for name, row in zip(names, numbers, strict=True)}
        used = {name: term for name, term in terms.items() if term.log_odds or term.log_wait}
        return ForecastModel(
            self.fit.mode, used, float(self.fit.odds[0]), float(self.fit.wait[0]), self.quantiles, self.threshold,
            self.hopeless, HOPELESS_AFTER, WAIT, PATIENCE, calibrated_on,
        )  # fmt: skip


def calibrate(cases: Sequence[Case], mode: Mode, group: Callable[[Case], Hashable]) -> Calibrated:
    """Fit on all runs; thresholds and intervals from runs held out by group.

    Args:
        cases: The calibration runs.
        mode: What the forecast may look at.
        group: Runs of one group are held out together: families if the forecast is to hold for families not seen.
    """
    cases = [case for case in cases if case.judged]
    groups = sorted({str(group(case)) for case in cases})
    peaks, troughs, residuals = [], [], []
    for name in groups:
        inside = [case for case in cases if str(group(case)) == name]
        rest = [case for case in cases if str(group(case)) != name]
        partial = fit(rest, mode)
        for case in inside:
            probabilities = partial.probabilities(case)
            if not case.is_positive:
                peaks.append(peak(probabilities[case.is_due]))
                continue
            late = is_late(case)
            troughs.append(-peak(-probabilities[late]) if late.sum() >= PATIENCE else 1.0)
            residuals.append((log_wait_of(case) - partial.log_waits(case))[case.is_due])
    hopeless = float(np.quantile(troughs, LOST, method="lower")) if troughs else 0.0
    return Calibrated(fit(cases, mode), threshold_at(peaks), hopeless, conformal_quantiles(residuals))
