"""Names: clean ones, and choosing among them by glob."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

__all__ = ["check_patterns", "clean_name", "select"]

# What torch.compile, activation checkpointing and FSDP put into the names of what they wrap.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_SHOWN = 60


def clean_name(name: str) -> str:
    """The name that the user gave, without the segments that wrappers add.

    Example:
        >>> clean_name("net._orig_mod.0._checkpoint_wrapped_module.weight")
        'net.0.weight'
    """
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)


def select(names: Iterable[str], patterns: str | Sequence[str], argument: str) -> list[str]:
    """The names that match a glob or any of several, in the order of ``names``.

    Args:
        names: What there is.
        patterns: One glob or several, as in :mod:`fnmatch`: ``*`` matches any text, dots included. A pattern that begins
            with ``!`` takes away what it matches.
        argument: The setting that the patterns came from, for the error.

    Returns:
        The chosen names.

    Raises:
        ValueError: If there is no pattern or one that is no text, one matches nothing, or nothing is left; the message lists
            the names there are.

    Example:
        >>> select(["mlp.0", "mlp.2", "head"], ["mlp.*", "!*.2"], "layers")
        ['mlp.0']
    """
    check_patterns(patterns, argument)
    available = list(names)
    globs = [patterns] if isinstance(patterns, str) else list(patterns)
    if not globs:
        raise ValueError(f"`{argument}` holds no pattern. {_listing(available)}")
    for glob in globs:
        if not any(fnmatchcase(name, glob.removeprefix("!")) for name in available):
            raise ValueError(f"`{argument}`: {glob!r} matches nothing.{_suggestion(glob, available)} {_listing(available)}")
    wanted = [glob for glob in globs if not glob.startswith("!")] or ["*"]
    unwanted = [glob[1:] for glob in globs if glob.startswith("!")]
    chosen = [
        name
        for name in available
        if any(fnmatchcase(name, glob) for glob in wanted) and not any(fnmatchcase(name, glob) for glob in unwanted)
    ]
    if not chosen:
        raise ValueError(f"`{argument}`: {globs!r} leaves nothing. {_listing(available)}")
    return chosen


def check_patterns(patterns: object, argument: str) -> None:
    """Refuse what is neither a glob nor several.

    Args:
        patterns: What was given.
        argument: The setting, for the error.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(patterns, str):
        return
    if not isinstance(patterns, Iterable) or not all(isinstance(glob, str) for glob in patterns):
        raise ValueError(f"`{argument}` must be a name or a glob, or a list of them, got {patterns!r}.")


def _suggestion(glob: str, available: Sequence[str]) -> str:
    close = difflib.get_close_matches(glob, available, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _listing(available: Sequence[str]) -> str:
    if not available:
        return "There is nothing to choose from in this model."
    more = f" and {len(available) - _SHOWN} more" if len(available) > _SHOWN else ""
    return f"There are: {', '.join(available[:_SHOWN])}{more}."
