"""The forecast: a logistic regression for whether a run will grok, a linear one for when, and the shipped coefficients."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import resources
from typing import Any

from grok_callbacks.forecast._numbers import require_number, require_whole
from grok_callbacks.forecast.features import FEATURES, MODES, Mode, extract
from grok_callbacks.history import Series

__all__ = ["ForecastModel", "Prediction", "Term"]

_FORMAT = 1

#: A feature further than this from its mean on the calibration runs, in standard deviations, counts as this far.
_FURTHEST = 3.0

#: Longer than e to this power times the steps so far is as good as never, and a float still holds it.
_LONGEST = 100.0


@dataclass(frozen=True)
class Term:
    """How one feature enters: standardised by ``mean`` and ``scale``, then times a weight.

    Args:
        mean: Its mean over the calibration runs.
        scale: Its standard deviation there.
        log_odds: What one standard deviation adds to the log-odds of grokking.
        log_wait: What one standard deviation adds to the logarithm of the remaining time.

    Raises:
        ValueError: If one of them is no finite number, or ``scale`` is not positive.
    """

    mean: float
    scale: float
    log_odds: float
    log_wait: float

    def __post_init__(self) -> None:
        for name in ("mean", "scale", "log_odds", "log_wait"):
            require_number(name, getattr(self, name))
        if not self.scale > 0:
            raise ValueError(f"`scale` must be positive, got {self.scale!r}.")

    def standardised(self, value: float) -> float:
        """The feature in standard deviations; 0, which is neutral, where it is unknown."""
        if not math.isfinite(value):
            return 0.0
        return max(-_FURTHEST, min(_FURTHEST, (value - self.mean) / self.scale))


@dataclass(frozen=True)
class Prediction:
    """What is to be expected of a run that has memorised and not yet generalised.

    Args:
        probability: That it will grok.
        lower: Step by which it will have generalised with a chance of 10%, if it does at all.
        median: The same with an even chance.
        upper: The same with 90%.
        contributions: What each known feature adds to the log-odds, the largest first; features that only tell when are not
            among them.
        missing: Features that were not measured, which count as their mean.
    """

    probability: float
    lower: float
    median: float
    upper: float
    contributions: dict[str, float]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class ForecastModel:
    r"""Says how likely a run is to grok, and when, from its features.

    .. math::
        \text{log-odds} = a + \sum_k w_k z_k, \qquad
        \ln \frac{\text{generalised step} - \text{step}}{\text{step}} = b + \sum_k v_k z_k + \varepsilon

    with :math:`z_k` the standardised features. The interval takes the 10% and 90% quantiles of :math:`\varepsilon` on runs that
    had no part in the fit (conformal prediction, by run), so it holds a generalising run's step in about 80% of the cases.

    Args:
        mode: ``"train"``: from training data alone; ``"inputs"``: from the answers to validation inputs as well;
            ``"labels"``: from their labels, too.
        terms: The features that it uses.
        log_odds: The intercept a.
        log_wait: The intercept b.
        wait_quantiles: The quantiles of :math:`\varepsilon` that make the interval.
        threshold: Probability from which on to give an alarm: 5% of the calibration runs that did not grok exceeded it in the
            course of their training.
        hopeless: Probability below which a run is hopeless.
        hopeless_after: How many times the steps of memorising must have passed before a run can be hopeless.
        wait: Steps after memorising before which there is nothing to go by.
        patience: Consecutive measurements that an alarm or a verdict takes.
        calibrated_on: What the coefficients come from.

    Raises:
        ValueError: If a number is not finite or out of its range, the quantiles are not in order, or there is no such mode or
            feature.

    Example:
        >>> from grok_callbacks import History
        >>> model = ForecastModel.load("train")
        >>> history = History()
        >>> history.add(100, {"grok/norm": 20.0})
        >>> history.add(400, {"grok/norm": 10.0})
        >>> prediction = model(history, step=400, memorized_step=100)
        >>> 0 < prediction.probability < 1, 400 < prediction.lower < prediction.median < prediction.upper
        (True, True)
    """

    mode: Mode
    terms: Mapping[str, Term] = field(repr=False)
    log_odds: float
    log_wait: float
    wait_quantiles: tuple[float, float, float]
    threshold: float
    hopeless: float
    hopeless_after: float
    wait: int
    patience: int
    calibrated_on: str = field(repr=False)

    def __post_init__(self) -> None:
        _require_mode(self.mode)
        self._require_terms()
        require_number("log_odds", self.log_odds)
        require_number("log_wait", self.log_wait)
        quantiles = self.wait_quantiles
        if not isinstance(quantiles, tuple) or len(quantiles) != 3:
            raise ValueError(f"`wait_quantiles` must be three numbers, got {quantiles!r}.")
        for number, quantile in enumerate(quantiles):
            require_number(f"wait_quantiles[{number}]", quantile)
        if list(quantiles) != sorted(quantiles):
            raise ValueError(f"`wait_quantiles` must be in order, got {quantiles!r}.")
        require_number("threshold", self.threshold, 0, 1)
        require_number("hopeless", self.hopeless, 0, 1)
        require_number("hopeless_after", self.hopeless_after, 0)
        require_whole("wait", self.wait, 0)
        require_whole("patience", self.patience, 1)
        if not isinstance(self.calibrated_on, str):
            raise ValueError(f"`calibrated_on` must be a text, got a {type(self.calibrated_on).__name__}.")

    def _require_terms(self) -> None:
        if not isinstance(self.terms, Mapping) or not all(isinstance(term, Term) for term in self.terms.values()):
            raise ValueError("`terms` must be a Term for each feature by name.")
        unknown = sorted(str(name) for name in self.terms if name not in FEATURES)
        if unknown:
            raise ValueError(f"`terms` has the features {unknown}, which this version does not know.")
        unread = sorted(name for name in self.terms if MODES.index(FEATURES[name].mode) > MODES.index(self.mode))
        if unread:
            raise ValueError(f"`terms` has the features {unread}, which mode {self.mode!r} does not read.")

    @classmethod
    def load(cls, mode: Mode = "inputs") -> ForecastModel:
        """The model that ships with the package.

        Raises:
            ValueError: If there is no such mode.
        """
        _require_mode(mode)
        return _shipped(mode)

    @classmethod
    def from_json(cls, text: str) -> ForecastModel:
        """The model that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is no such model; it says which field is wrong: one that is missing or has no place there, a
                number that is none or out of its range, a feature that this version does not know.
        """
        try:
            return cls(**_read(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"`text` is no forecast model of this version: {error}") from error

    def to_json(self) -> str:
        """The model as text that a person can read."""
        data = {"format": _FORMAT, **asdict(self), "terms": {name: asdict(term) for name, term in self.terms.items()}}
        return json.dumps(_rounded(data), indent=2) + "\n"

    def predict(self, features: Mapping[str, float], step: int) -> Prediction:
        """The forecast at ``step``.

        Args:
            features: What :func:`~grok_callbacks.forecast.extract` gave; what is missing or not finite counts as its mean.
            step: The step at which they were taken.
        """
        standardised = {name: term.standardised(features.get(name, math.nan)) for name, term in self.terms.items()}
        missing = tuple(name for name in self.terms if not math.isfinite(features.get(name, math.nan)))
        added = {
            name: self.terms[name].log_odds * z
            for name, z in standardised.items()
            if self.terms[name].log_odds and name not in missing
        }
        log_wait = self.log_wait + sum(self.terms[name].log_wait * z for name, z in standardised.items())
        waits = (min(log_wait + quantile, _LONGEST) for quantile in self.wait_quantiles)
        lower, median, upper = (max(step, 1) * (1 + math.exp(wait)) for wait in waits)
        return Prediction(
            probability=_sigmoid(self.log_odds + sum(added.values())),
            lower=lower,
            median=median,
            upper=upper,
            contributions=dict(sorted(added.items(), key=lambda item: -abs(item[1]))),
            missing=missing,
        )

    def __call__(self, history: Mapping[str, Series], step: int, memorized_step: int, prefix: str = "grok") -> Prediction:
        """The forecast from what was measured up to ``step``."""
        return self.predict(extract(history, step, memorized_step, self.mode, prefix), step)


@cache
def _shipped(mode: Mode) -> ForecastModel:
    text = resources.files("grok_callbacks.forecast").joinpath(f"{mode}.json").read_text(encoding="utf-8")
    return ForecastModel.from_json(text)


def _require_mode(mode: Any) -> None:
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {list(MODES)}, got {mode!r}.")


def _read(text: str) -> dict[str, Any]:
    """A model's settings from its text, where all are there and none besides; their values are the constructors' to check."""
    data: dict[str, Any] = json.loads(text)
    _require_fields("the model", data, {"format", *(each.name for each in fields(ForecastModel))})
    written = data.pop("format")
    if written is True or written != _FORMAT:
        raise ValueError(f"`format` must be {_FORMAT}, got {written!r}.")
    _require_object("`terms`", data["terms"])
    data["terms"] = {name: _read_term(name, term) for name, term in data["terms"].items()}
    if isinstance(data["wait_quantiles"], list):
        data["wait_quantiles"] = tuple(data["wait_quantiles"])
    return data


def _read_term(name: str, data: Any) -> Term:
    where = f"`terms[{name!r}]`"
    _require_fields(where, data, {each.name for each in fields(Term)})
    try:
        return Term(**data)
    except ValueError as error:
        raise ValueError(f"in {where}, {error}") from error


def _require_fields(where: str, data: Any, names: set[str]) -> None:
    _require_object(where, data)
    missing, unknown = sorted(names - data.keys()), sorted(data.keys() - names)
    if missing:
        raise ValueError(f"{where} lacks {missing}.")
    if unknown:
        raise ValueError(f"{where} has no place for {unknown}.")


def _require_object(where: str, data: Any) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got a {type(data).__name__}.")


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    exponential = math.exp(value)
    return exponential / (1.0 + exponential)


def _rounded(value: Any) -> Any:
    """Six significant digits, which is more than calibration knows."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
