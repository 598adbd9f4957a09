"""Events of a run and what will come of it, from its history alone: plain objects, no Lightning."""

from grok_callbacks.forecast.onset import EVENTS, OnsetTracker, Outcome, Thresholds

__all__ = ["EVENTS", "OnsetTracker", "Outcome", "Thresholds"]
