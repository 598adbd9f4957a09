"""A run in brief, for TensorBoard's text tab."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from grok_callbacks.forecast.onset import OnsetTracker, Phase

__all__ = ["escaped", "in_markdown"]

_MEANINGS: dict[Phase, str] = {
    "memorising": "the training data are not fitted yet",
    "memorised": "the training data are fitted, validation is still near chance",
    "generalising": "validation has left chance",
    "generalised": "validation has reached its target",
}


def in_markdown(tracker: OnsetTracker, sentences: Sequence[str], sources: Sequence[str]) -> str:
    """Phase, what happened, and the steps of the events.

    Args:
        tracker: Knows the steps.
        sentences: What happened, in words.
        sources: Names of the metrics that the run was judged by.
    """
    events = {
        "memorised": tracker.memorized_step,
        "onset of generalisation": tracker.onset_step,
        "generalised": tracker.grokked_step,
    }
    rows = [f"| {event} | {'-' if step is None else format(step, ',')} |" for event, step in events.items()]
    judged = f"Judged by {' and '.join(escaped(name) for name in sources)}." if sources else ""
    paragraphs = [
        f"**Phase: {tracker.phase}** ({_MEANINGS[tracker.phase]}).",
        "\n".join(f"- {escaped(sentence)}" for sentence in sentences),
        "\n".join(["| event | step |", "|---|---:|", *rows]),
        judged,
    ]
    return "\n\n".join(filter(None, paragraphs))


def escaped(text: str) -> str:
    r"""A string of the user's, literally: no HTML and no Markdown.

    Example:
        >>> print(escaped("<b>acc_1|x</b>"))
        &lt;b&gt;acc\_1\|x&lt;/b&gt;
    """
    return re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", html.escape(text, quote=False))
