"""What others have published as signs of grokking to come, as series over the same runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks._forecast_data import Case
from benchmarks._forecast_suite import QUANTILE_EVERY
from grok_callbacks.functional import loss_oscillation
from grok_callbacks.history import Series

#: The early part of training whose loss oscillation is looked at, in steps.
EARLY = 200

#: Hankel dynamic-mode decomposition: observations in a window, delays stacked, modes kept.
WINDOW, DELAYS, MODES_KEPT = 24, 4, 4


@dataclass(frozen=True)
class Rival:
    """A published signal.

    Args:
        name: What tables call it.
        forms: Ways to read it as one number at each step, of which the best on the calibration runs is taken.
        uses_labels: Whether it looks at validation labels, which the forecast does not.
        rule: The paper's own threshold and sign for the first form, if it gives one: alarm where sign x value >= threshold.
    """

    name: str
    forms: tuple[Callable[[Case], np.ndarray], ...]
    uses_labels: bool = False
    rule: tuple[float, float] | None = None


def _values(series: Sequence[Series], steps: np.ndarray, logarithm: bool = False) -> np.ndarray:
    rows = np.array([[one.at(int(step)) for step in steps] for one in series], dtype=float)
    return np.log(np.maximum(rows, 1e-12)).mean(0) if logarithm else rows.mean(0)


def _layers(case: Case, key: str) -> list[Series]:
    history = case.record.history
    return [series for name, series in history.items() if name == key or (key.endswith("/") and name.startswith(key))]


def level(key: str, logarithm: bool = False) -> Callable[[Case], np.ndarray]:
    """The value, mean over layers."""
    return lambda case: _values(_layers(case, key), case.steps, logarithm)


def change(key: str, logarithm: bool = False) -> Callable[[Case], np.ndarray]:
    """The change since memorising; with ``logarithm`` that of the logarithm."""

    def read(case: Case) -> np.ndarray:
        begin = np.array([case.truth.memorized or 0])
        layers = _layers(case, key)
        return _values(layers, case.steps, logarithm) - _values(layers, begin, logarithm)

    return read


def drop_from_peak(key: str) -> Callable[[Case], np.ndarray]:
    """The share that a curve has fallen from its highest value so far."""

    def read(case: Case) -> np.ndarray:
        (series,) = _layers(case, key)
        steps, values = np.array(series.steps), np.fmax.accumulate(np.array(series.values))
        highest = values[np.searchsorted(steps, case.steps, side="right") - 1]
        return 1 - _values([series], case.steps) / highest

    return read


def oscillation(case: Case) -> np.ndarray:
    """Hjorth activity of the early training loss; of what there is of it at each step."""
    ends = np.minimum(case.steps, EARLY)
    known = {int(end): float(loss_oscillation(torch.from_numpy(case.record.losses[: int(end)]))) for end in set(ends)}
    return np.log(np.maximum([known[int(end)] for end in ends], 1e-12))


def dynamic_mode_residual(case: Case) -> np.ndarray:
    """Residual of a Hankel dynamic-mode decomposition of the quantiles of the training samples' log-probability."""
    curve = case.record.quantiles.astype(float)
    return np.array([_hankel_residual(curve[: int(step) // QUANTILE_EVERY][-WINDOW:]) for step in case.steps])


def _hankel_residual(window: np.ndarray) -> float:
    if len(window) < DELAYS + 3:
        return float("nan")
    stacked = np.lib.stride_tricks.sliding_window_view(window, DELAYS, axis=0).reshape(len(window) - DELAYS + 1, -1).T
    before, after = stacked[:, :-1], stacked[:, 1:]
    left, singular, right = np.linalg.svd(before, full_matrices=False)
    rank = min(MODES_KEPT, int((singular > 1e-8 * max(singular[0], 1e-30)).sum()))
    left, singular, right = left[:, :rank], singular[:rank], right[:rank]
    # The linear map of the leading modes that takes each stack of observations to the next.
    operator = left.T @ after @ (right.T / singular)
    residual = after - left @ operator @ (left.T @ before)
    return float(np.log(np.linalg.norm(residual) / max(np.linalg.norm(after), 1e-30) + 1e-12))


RIVALS = (
    Rival("L2 norm drop", (change("grok/norm", logarithm=True), drop_from_peak("grok/norm"))),
    Rival("PMI", (level("grok/robustness/pmi"), change("grok/robustness/pmi"))),
    Rival("PE", (level("grok/robustness/pe"), change("grok/robustness/pe"))),
    Rival("MID", (level("grok/robustness/mid"), change("grok/robustness/mid"))),
    Rival("ED", (level("grok/robustness/ed"), change("grok/robustness/ed"))),
    Rival(
        "representation entropy",
        (level("grok/representation/entropy"), change("grok/representation/entropy")),
        rule=(-0.61, -1.0),
    ),
    Rival(
        "class-distance ratio",
        (change("grok/representation/class_distance_ratio", logarithm=True), level("grok/representation/class_distance_ratio")),
        uses_labels=True,
        rule=(float(np.log(2.5)), 1.0),
    ),
    Rival("loss oscillation", (oscillation,)),
    Rival("dynamic-mode residual", (dynamic_mode_residual,)),
    Rival("validation loss past its peak", (drop_from_peak("grok/loss/validation"),), uses_labels=True),
    Rival("linear mapping number", (change("grok/lmn/", logarithm=True), level("grok/lmn/", logarithm=True))),
    Rival(
        "circuit complexity",
        (change("grok/circuit_complexity/", logarithm=True), level("grok/circuit_complexity/", logarithm=True)),
    ),
    Rival("spectral entropy", (change("grok/spectral_entropy/"), level("grok/spectral_entropy/"))),
    Rival(
        "loss with cut weights", (change("grok/truncation/loss/0.5", logarithm=True), change("grok/truncation/loss/0.7", True))
    ),
    Rival("gradient coherence", (level("grok/gradient_coherence"), change("grok/gradient_coherence"))),
    Rival("evenness of answers", (level("grok/representation/answer_entropy"),)),
    Rival("weight entropy", (change("grok/weight_entropy/", logarithm=True),)),
    Rival("validation accuracy", (level("grok/accuracy/validation"), change("grok/accuracy/validation")), uses_labels=True),
)
