"""What a forecast looks at: numbers without a scale, from a run's history since it memorised."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from grok_callbacks.history import Series

__all__ = ["FEATURES", "MODES", "Feature", "Measure", "Mode", "extract", "measured_keys", "phrase"]

#: What a forecast may look at: the training data alone, or the answers to validation inputs as well. Labels of validation
#: samples are looked at in neither.
Mode = Literal["train", "inputs"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: How a measure's curve becomes one number: its value; its value relative to that before training; its change since the run
#: memorised; its change over the later half of that time, on the logarithmic axis.
View = Literal["level", "start", "since", "recent"]

#: Values measured within this factor of a step are averaged, since single ones are noisy.
_WINDOW = 1.25

#: Differences of logarithms beyond this, as of a loss that has reached zero, say no more than this does.
_LARGEST = 20.0
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Measure:
    """A measured quantity and how it is compared.

    Args:
        name: Its name in features.
        key: Its key after the prefix; with a slash at the end, all keys that begin so (one for each layer) are averaged.
        words: What it is called in sentences.
        views: Which numbers are made of it.
        is_ratio: Compare by logarithms of ratios, otherwise by differences.
        mode: The mode from which on it is read.
    """

    name: str
    key: str
    words: str
    views: tuple[View, ...]
    is_ratio: bool = True
    mode: Mode = "train"


_MEASURES = (
    Measure("norm", "norm", "the weight norm", ("start", "since", "recent")),
    Measure("loss", "loss/train", "the training loss", ("start", "since", "recent")),
    Measure("lmn", "lmn/", "the linear mapping number", ("start", "since", "recent")),
    Measure("circuit_complexity", "circuit_complexity/", "circuit complexity", ("level", "since", "recent")),
    Measure("spectral_entropy", "spectral_entropy/", "the weights' spectral entropy", ("start", "since", "recent"),
            is_ratio=False),
    Measure("weight_entropy", "weight_entropy/", "weight entropy", ("start", "since", "recent")),
    Measure("sparsity", "sparsity/", "activation sparsity", ("level", "since", "recent"), is_ratio=False),
    Measure("train_representation", "representation/entropy", "the representation's entropy on training data",
            ("level", "since", "recent"), is_ratio=False),
    Measure("prediction_entropy", "representation/prediction_entropy", "the entropy of predictions on validation inputs",
            ("start", "since", "recent"), mode="inputs"),
    Measure("confidence", "representation/confidence", "the confidence on validation inputs",
            ("level", "since", "recent"), is_ratio=False, mode="inputs"),
    Measure("churn", "representation/churn", "the share of changed answers to validation inputs",
            ("level", "since", "recent"), is_ratio=False, mode="inputs"),
    Measure("validation_representation", "representation/entropy", "the representation's entropy on validation inputs",
            ("level", "since", "recent"), is_ratio=False, mode="inputs"),
)  # fmt: skip


@dataclass(frozen=True)
class Feature:
    """One number of a forecast: a measure under one view."""

    name: str
    words: str
    mode: Mode
    measure: Measure | None = None
    view: View | None = None


def _features() -> dict[str, Feature]:
    features = [Feature("time", "the time since memorising", "train")]
    for measure in _MEASURES:
        features += [Feature(f"{measure.name}.{view}", measure.words, measure.mode, measure, view) for view in measure.views]
    features.append(Feature("doubt.level", "the doubt about validation inputs over the training loss", "inputs"))
    return {feature.name: feature for feature in features}


#: All features by name.
FEATURES: dict[str, Feature] = _features()


def extract(
    history: Mapping[str, Series], step: int, memorized_step: int, mode: Mode = "inputs", prefix: str = "grok"
) -> dict[str, float]:
    """All features of a mode at a step.

    Nothing that was measured later than ``step`` is read, nor any label of a validation sample. Layers are averaged and no name
    of a layer or a task plays a part.

    Args:
        history: What has been measured.
        step: The step to forecast at.
        memorized_step: When the run memorised.
        mode: Whether the answers to validation inputs are looked at.
        prefix: What the monitors' keys begin with.

    Returns:
        Each feature by name; NaN where what it needs was not measured.

    Raises:
        ValueError: If ``step`` lies before ``memorized_step``, or there is no such mode.

    Cost:
        A few microseconds a series.

    Example:
        >>> from grok_callbacks import History
        >>> history = History()
        >>> for step, norm in [(0, 10.0), (100, 20.0), (400, 5.0)]:
        ...     history.add(step, {"grok/norm": norm})
        >>> features = extract(history, step=400, memorized_step=100, mode="train")
        >>> {name: round(value, 3) for name, value in features.items() if value == value}
        {'time': 1.386, 'norm.start': -0.693, 'norm.since': -1.386, 'norm.recent': -1.386}
    """
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {list(MODES)}, got {mode!r}.")
    if step < memorized_step:
        raise ValueError(f"`step` {step} lies before `memorized_step` {memorized_step}.")
    begin = max(memorized_step, 1)
    values = {"time": math.log(max(step, 1) / begin)}
    for measure in _MEASURES:
        if measure.mode == "train" or mode == "inputs":
            layers = [_views(measure, series, step, begin) for series in _series_of(measure, history, prefix)]
            for view in measure.views:
                values[f"{measure.name}.{view}"] = _mean(layer[view] for layer in layers)
    if mode == "inputs":
        values["doubt.level"] = _doubt(history, step, begin, prefix)
    return values


def measured_keys(mode: Mode, prefix: str = "grok") -> tuple[str, ...]:
    """The keys that a mode reads, for measures with a layer in their key what the key begins with.

    Example:
        >>> measured_keys("train")[:3]
        ('grok/norm', 'grok/loss/train', 'grok/lmn/')
    """
    read = [measure for measure in _MEASURES if measure.mode == "train" or mode == "inputs"]
    return tuple(dict.fromkeys(f"{prefix}/{measure.key}" for measure in read))


def phrase(name: str, value: float) -> str:
    """A feature in words.

    Example:
        >>> phrase("lmn.since", -0.198)
        'the linear mapping number has fallen 18% since memorising'
    """
    feature = FEATURES[name]
    if name == "time":
        return f"{math.exp(value):.1f} times as many steps as memorising took have passed"
    if feature.measure is None or feature.view is None or feature.view == "level":
        shown = math.exp(value) if feature.measure is None or feature.measure.is_ratio else value
        return f"{feature.words} is {shown:.2g}"
    when = _WHEN[feature.view]
    verb = "risen" if value > 0 else "fallen"
    if not feature.measure.is_ratio:
        return f"{feature.words} has {verb} by {abs(value):.2g} {when}"
    factor = math.exp(abs(value))
    if factor >= 2:
        return f"{feature.words} has {verb} {factor:.2g}-fold {when}"
    return f"{feature.words} has {verb} {abs(math.expm1(value)):.0%} {when}"


_WHEN = {"start": "since the start of training", "since": "since memorising", "recent": "in the later half of that time"}


def _series_of(measure: Measure, history: Mapping[str, Series], prefix: str) -> list[Series]:
    key = f"{prefix}/{measure.key}"
    if key.endswith("/"):
        return [series for name, series in history.items() if name.startswith(key)]
    # One key means two things: the representation is that of validation inputs exactly where there are answers to them.
    if measure.key == "representation/entropy":
        is_unseen = f"{prefix}/representation/prediction_entropy" in history
        if is_unseen != (measure.mode == "inputs"):
            return []
    return [history[key]] if key in history else []


def _views(measure: Measure, series: Series, step: int, begin: int) -> dict[View, float]:
    scale: Callable[[float], float] = _logarithm if measure.is_ratio else float

    def mean(low: float, high: float) -> float:
        first, last = bisect_left(series.steps, low), bisect_right(series.steps, high)
        # Where measurements are further apart than the window, the one before it holds.
        return _mean(scale(value) for value in series.values[first if first < last else max(last - 1, 0) : last])

    half_way = math.sqrt(begin * step)
    now = mean(max(begin, step / _WINDOW), step)
    memorized = mean(begin, min(begin * _WINDOW, step))
    half = mean(max(begin, half_way / math.sqrt(_WINDOW)), min(half_way * math.sqrt(_WINDOW), step))
    start = scale(series.values[0]) if series.steps and series.steps[0] == 0 else math.nan
    values: dict[View, float] = {"level": now, "start": now - start, "since": now - memorized, "recent": now - half}
    return {view: max(-_LARGEST, min(_LARGEST, value)) if value == value else value for view, value in values.items()}  # noqa: PLR0124


def _doubt(history: Mapping[str, Series], step: int, begin: int, prefix: str) -> float:
    """How much less sure the network is of unseen than of seen samples: a gap that needs no labels."""
    levels = []
    for key in (f"{prefix}/representation/prediction_entropy", f"{prefix}/loss/train"):
        if key not in history:
            return math.nan
        level = Measure("", "", "", ("level",))
        levels.append(_views(level, history[key], step, begin)["level"])
    return max(-_LARGEST, min(_LARGEST, levels[0] - levels[1]))


def _logarithm(value: float) -> float:
    # A loss can underflow to zero, which is little and not unknown.
    return math.log(max(value, _SMALLEST)) if value >= 0 else math.nan


def _mean(values: Iterable[float]) -> float:
    """Mean of the finite ones, NaN where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
