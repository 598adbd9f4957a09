"""A run in brief, for TensorBoard's text tab."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from grok_callbacks.forecast.onset import Events
from grok_callbacks.forecast.words import meaning_of

__all__ = ["escaped", "in_markdown"]

_WORDS = {"memorized": "memorised", "onset": "onset of generalisation", "generalized": "generalised"}


def in_markdown(events: Events, sentences: Sequence[str], sources: Sequence[str]) -> str:
    """Phase, what happened, and the steps of the events.

    Args:
        events: The steps, and what was seen of the run.
        sentences: What happened, in words.
        sources: Names of the metrics that the run was judged by.
    """
    rows = [
        f"| {words} | {'-' if events.steps[event] is None else events.when(event).removeprefix('at step ')} |"
        for event, words in _WORDS.items()
    ]
    judged = f"Judged by {' and '.join(escaped(name) for name in sources)}." if sources else ""
    paragraphs = [
        f"**Phase: {events.phase}** ({meaning_of(events.phase, events)}).",
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
