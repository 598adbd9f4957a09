"""What happened in a run, from its history: accuracies, events, and a verdict in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from grok_callbacks.forecast.onset import OnsetTracker, Outcome, Thresholds, is_share
from grok_callbacks.forecast.sources import accuracy_key
from grok_callbacks.history import History, Series

__all__ = ["RunSummary", "summarize"]


@dataclass(frozen=True)
class RunSummary:
    """A run in brief.

    Args:
        outcome: What the run is, ``None`` if it has no accuracies to judge by.
        steps: The step of each event, ``None`` where it has not come.
        accuracies: Training and validation accuracy, those of them that there are.
        stage: The last stage of feature learning, ``None`` where it was not measured.
    """

    outcome: Outcome | None
    steps: Mapping[str, int | None] = field(default_factory=dict)
    accuracies: Mapping[str, Series] = field(default_factory=dict)
    stage: int | None = None

    @property
    def verdict(self) -> str:
        """One sentence, and another where the stage of feature learning says otherwise."""
        odd = {"memorisation": (3, "III"), "grokking": (1, "I"), "comprehension": (1, "I")}
        stage, numeral = odd.get(self.outcome or "", (0, ""))
        if self.stage == stage:
            return f"{self._outcome_in_words} Feature learning is in stage {numeral} all the same: a stage is no verdict."
        return self._outcome_in_words

    @property
    def _outcome_in_words(self) -> str:
        memorized, generalized = self.steps.get("memorized"), self.steps.get("generalized")
        if self.outcome is None:
            return "No accuracies were logged or measured, so there is no verdict."
        if self.outcome == "grokking":
            return f"Grokking: memorised at step {memorized:,}, generalised at step {generalized:,}."
        if self.outcome == "comprehension":
            fitted = (
                "without fitting all training data" if memorized is None else f"soon after memorising at step {memorized:,}"
            )
            return f"Comprehension: generalised at step {generalized:,}, {fitted}."
        if self.outcome == "memorisation":
            return f"Memorisation: the training data were fitted at step {memorized:,}; the run has not generalised."
        return "Confusion: the run has neither fitted its training data nor generalised."


def summarize(history: History, thresholds: Thresholds | None = None, prefix: str = "grok") -> RunSummary:
    """Judge a run by its accuracies, and by the steps that a detector logged in it, which know its thresholds.

    Args:
        history: The run's series.
        thresholds: What counts as memorised and generalised.
        prefix: The prefix of the monitors' keys.

    Returns:
        The summary.
    """
    keys = {"training": accuracy_key("train", history, prefix), "validation": accuracy_key("validation", history, prefix)}
    accuracies = {name: history[key] for name, key in keys.items() if key is not None and is_share(history[key].values[-1])}
    tracker = OnsetTracker(thresholds)
    for name, update in (("training", tracker.update_train), ("validation", tracker.update_validation)):
        for step, value in zip(accuracies.get(name, Series()).steps, accuracies.get(name, Series()).values, strict=True):
            update(step, value)
    logged = {
        event: history[key].values[-1]
        for event, key in zip(
            ("memorized", "onset", "generalized"),
            (f"{prefix}/onset/memorized_step", f"{prefix}/onset/onset_step", f"{prefix}/onset/grokked_step"),
            strict=True,
        )
        if key in history
    }
    tracker.adopt({event: int(step) for event, step in logged.items()})
    judged = bool(accuracies) or bool(logged)
    steps = {"memorized": tracker.memorized_step, "onset": tracker.onset_step, "generalized": tracker.grokked_step}
    stages = history.get(f"{prefix}/li2/stage", Series()).values
    stage = int(stages[-1]) if stages and stages[-1] in {1, 2, 3} else None
    return RunSummary(tracker.outcome if judged else None, steps, accuracies, stage)
