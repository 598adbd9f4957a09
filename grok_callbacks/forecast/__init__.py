"""Events of a run and what will come of it, from its history alone: plain objects, no Lightning."""

from grok_callbacks.forecast.features import FEATURES, MODES, Mode, extract, measured_keys, phrase
from grok_callbacks.forecast.model import ForecastModel, Prediction
from grok_callbacks.forecast.onset import EVENTS, OnsetTracker, Outcome, Thresholds

__all__ = [
    "EVENTS",
    "FEATURES",
    "MODES",
    "ForecastModel",
    "Mode",
    "OnsetTracker",
    "Outcome",
    "Prediction",
    "Thresholds",
    "extract",
    "measured_keys",
    "phrase",
]
