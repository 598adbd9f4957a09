"""What has been measured so far: one series of steps and values for each key."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["History", "Series"]


@dataclass
class Series:
    """One curve: increasing steps, and a value at each. Write with :meth:`put`: checkpoints notice no other change."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    #: How often points were put.
    changes: int = field(default=0, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.steps)

    def put(self, step: int, value: float) -> None:
        """Add a point; a step that is there already is replaced, as after a resume."""
        self.changes += 1
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            self.values.append(value)
            return
        index = bisect_left(self.steps, step)
        if self.steps[index] == step:
            self.values[index] = value
        else:
            self.steps.insert(index, step)
            self.values.insert(index, value)

    def at(self, step: int) -> float:
        """The last value measured at ``step`` or before, NaN if there is none."""
        index = bisect_right(self.steps, step)
        return self.values[index - 1] if index else float("nan")

    def after(self, step: int) -> list[tuple[int, float]]:
        """The points later than ``step``."""
        # Most often there is none, or the last alone.
        if not self.steps or self.steps[-1] <= step:
            return []
        if len(self.steps) > 1 and self.steps[-2] <= step:
            return [(self.steps[-1], self.values[-1])]
        index = bisect_right(self.steps, step)
        return list(zip(self.steps[index:], self.values[index:], strict=True))

    def until(self, step: int) -> Series:
        """The points up to and with ``step``."""
        index = bisect_right(self.steps, step)
        return Series(self.steps[:index], self.values[:index])


class History(Mapping[str, Series]):
    """All series of a run by key, in the order in which the keys first came.

    Example:
        >>> history = History()
        >>> history.add(0, {"grok/norm": 10.0})
        >>> history.add(5, {"grok/norm": 8.0})
        >>> history.add(5, {"grok/norm": 7.0})
        >>> history["grok/norm"].steps, history["grok/norm"].values
        ([0, 5], [10.0, 7.0])
    """

    def __init__(self) -> None:
        self._series: dict[str, Series] = {}
        #: How often points were added: as long as it is the same, there is nothing new.
        self.additions = 0

    def __getitem__(self, key: str) -> Series:
        return self._series[key]

    def __contains__(self, key: object) -> bool:
        # Mapping's own asks by exception, which is slow where dozens of names are looked for every epoch.
        return key in self._series

    def __iter__(self) -> Iterator[str]:
        return iter(self._series)

    def __len__(self) -> int:
        return len(self._series)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Put one point on each of the named series."""
        self.additions += 1
        for key, value in values.items():
            series = self._series.get(key)
            if series is None:
                series = self._series[key] = Series()
            series.put(step, float(value))

    def merge(self, other: Mapping[str, Series]) -> None:
        """Put another history's points into this one; where both have a step, the other's value holds."""
        self.additions += 1
        for key, series in other.items():
            for step, value in zip(series.steps, series.values, strict=True):
                self._series.setdefault(key, Series()).put(step, value)

    def of(self, keys: Iterable[str]) -> History:
        """The series of these keys alone, shared with this history."""
        result = History()
        result._series = {key: self._series[key] for key in keys}
        return result

    def until(self, step: int) -> History:
        """The history as it was when ``step`` had just been measured: nothing later is in it."""
        result = History()
        result._series = {key: cut for key, series in self.items() if (cut := series.until(step)).steps}
        return result

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensors only, for a checkpoint."""
        return {
            key: {"steps": torch.tensor(series.steps), "values": torch.tensor(series.values, dtype=torch.float64)}
            for key, series in self.items()
        }

    @classmethod
    def from_state_dict(cls, state: Any) -> History:
        """The history that :meth:`state_dict` was taken of.

        Raises:
            ValueError: If ``state`` is not such a state.
        """
        result = cls()
        if not isinstance(state, Mapping):
            raise ValueError(f"`state` is no history: it is a {type(state).__name__}.")
        for key, series in state.items():
            if not (isinstance(key, str) and _is_series(series)):
                raise ValueError(f"`state` is no history: the series {key!r} has no steps with values.")
            points = zip(series["steps"].tolist(), series["values"].tolist(), strict=True)
            for step, value in points:
                result.add(step, {key: value})
        return result


def _is_series(state: Any) -> bool:
    if not (isinstance(state, Mapping) and set(state) == {"steps", "values"}):
        return False
    steps, values = state["steps"], state["values"]
    if not (isinstance(steps, torch.Tensor) and isinstance(values, torch.Tensor) and steps.shape == values.shape):
        return False
    # Without points torch gives the steps a floating type.
    return steps.ndim == 1 and values.is_floating_point() and (steps.dtype == torch.int64 or len(steps) == 0)
