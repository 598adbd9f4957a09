"""Checks of numbers that come from a file or from a user."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

__all__ = ["is_number", "require_number", "require_whole"]

#: Nothing here is meant to be larger, and sums of such numbers are far from what a float can hold.
_LIMIT = 1e9


def is_number(value: Any) -> bool:
    """Whether it is a real number, of numpy's or python's; truth values are none."""
    return not isinstance(value, bool) and isinstance(value, Real)


def require_number(name: str, value: Any, low: float = -_LIMIT, high: float = _LIMIT) -> None:
    """Refuse what is no finite number in a range, ends included.

    Raises:
        ValueError: If it is not; ``name`` says what.
    """
    # The comparison is false for NaN, and holds for integers that no float can hold.
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"`{name}` must be a number {_range(low, high)}, got {_shown(value)}.")


def require_whole(name: str, value: Any, low: int) -> None:
    """Refuse what is no whole number from ``low`` on.

    Raises:
        ValueError: If it is not; ``name`` says what.
    """
    if not is_number(value) or not isinstance(value, Integral) or not low <= int(value) <= _LIMIT:
        raise ValueError(f"`{name}` must be a whole number {_range(low, _LIMIT)}, got {_shown(value)}.")


def _range(low: float, high: float) -> str:
    return f"from {low:g} to {high:g}"


def _shown(value: Any) -> str:
    # Python refuses to write integers of thousands of digits.
    text = "an integer of many digits" if isinstance(value, int) and abs(value) > 1e300 else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
