"""What a forecast looks at: numbers without a scale, from a run's history since it memorised."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from grok_callbacks.history import Series

__all__ = ["FEATURES", "MODES", "Feature", "Measure", "Mode", "extract", "measured_keys", "phrase"]

#: What a forecast may look at: the training data alone, the answers to validation inputs as well, or their labels, too.
Mode = Literal["train", "inputs", "labels"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: How a measure's curve becomes one number: its value; its value relative to that before training; its change since the run
#: memorised; its change over the later half of that time, on the logarithmic axis; its mean since memorising; its distance from
#: its highest value since memorising.
View = Literal["level", "start", "since", "recent", "mean", "peak"]

#: What is compared: logarithms of values, the values themselves, or logarithms of what they lack of one.
Scale = Literal["logarithm", "value", "complement"]

#: How several layers make one number.
Reduction = Literal["mean", "first", "lowest", "spread"]

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
        key: Its key after the prefix; with a slash at the end, all keys that begin so, one for each layer.
        words: What it is called in sentences.
        views: Which numbers are made of it.
        scale: What of it is compared.
        mode: The mode from which on it is read.
        layers: How several layers make one number.
    """

    name: str
    key: str
    words: str
    views: tuple[View, ...]
    scale: Scale = "logarithm"
    mode: Mode = "train"
    layers: Reduction = "mean"


_MEASURES = (
    Measure("norm", "norm", "the weight norm", ("since", "recent", "peak")),
    Measure("norm_spread", "norm/", "the unevenness of the layers' norms", ("start",), layers="spread"),
    Measure("loss", "loss/train", "the training loss", ("start", "since", "recent")),
    Measure("lmn", "lmn/", "the linear mapping number", ("start", "since", "recent")),
    Measure("circuit_complexity", "circuit_complexity/", "circuit complexity", ("level", "since")),
    Measure("lowest_complexity", "circuit_complexity/", "the lowest layer's circuit complexity", ("level",), layers="lowest"),
    Measure("spectral_entropy", "spectral_entropy/", "the weights' spectral entropy", ("start", "since"), "value"),
    Measure("sparsity", "sparsity/", "activation sparsity", ("level", "start"), "value"),
    Measure(
        "train_representation", "representation/entropy", "the representation's entropy on training data",
        ("level", "since"), "value",
    ),
    Measure("perturbed_entropy", "robustness/pe", "the outputs' entropy under noise", ("level", "start"), "value"),
    Measure("entropy_difference", "robustness/ed", "what noise adds to the outputs' entropy", ("level",), "value"),
    Measure(
        "half_loss", "truncation/loss/0.5", "the training loss with weights cut to half of their squared norm",
        ("level", "since", "recent"),
    ),
    Measure(
        "cut_loss", "truncation/loss/0.7", "the training loss with weights cut to 70% of their squared norm",
        ("level", "since"),
    ),
    Measure(
        "half_accuracy", "truncation/accuracy/0.5", "training accuracy with weights cut to half of their squared norm",
        ("since",), "value",
    ),
    Measure(
        "cut_accuracy", "truncation/accuracy/0.7", "training accuracy with weights cut to 70% of their squared norm",
        ("since",), "value",
    ),
    Measure("coherence", "gradient_coherence/", "the coherence of gradients", ("level", "since"), "value"),
    Measure(
        "first_coherence", "gradient_coherence/", "the coherence of the first layer's gradients", ("level",), "value",
        layers="first",
    ),
    Measure(
        "answer_entropy", "representation/answer_entropy", "the evenness of answers to validation inputs",
        ("level", "since"), "value", "inputs",
    ),
    Measure(
        "prediction_entropy", "representation/prediction_entropy", "the entropy of predictions on validation inputs",
        ("start", "since", "recent"), mode="inputs",
    ),
    Measure(
        "doubt", "representation/confidence", "the doubt about validation inputs",
        ("level", "since", "recent"), "complement", "inputs",
    ),
    Measure(
        "churn", "representation/churn", "the share of changed answers to validation inputs",
        ("level", "mean"), "value", "inputs",
    ),
    Measure(
        "validation_representation", "representation/entropy", "the representation's entropy on validation inputs",
        ("level", "since"), "value", "inputs",
    ),
    Measure("validation_loss", "loss/validation", "the validation loss", ("start", "since", "recent", "peak"), mode="labels"),
    Measure(
        "class_distance", "representation/class_distance_ratio", "the distance of the classes on validation inputs",
        ("since",), mode="labels",
    ),
    Measure("validation_accuracy", "accuracy/validation", "validation accuracy", ("since",), "value", "labels"),
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
    return {feature.name: feature for feature in features}


#: All features by name.
FEATURES: dict[str, Feature] = _features()


def extract(
    history: Mapping[str, Series], step: int, memorized_step: int, mode: Mode = "inputs", prefix: str = "grok"
) -> dict[str, float]:
    """All features of a mode at a step.

    Nothing that was measured later than ``step`` is read. No name of a layer or a task plays a part: where a measure has
    several layers, their mean, lowest value or spread is taken.

    Args:
        history: What has been measured.
        step: The step to forecast at.
        memorized_step: When the run memorised.
        mode: Whether the answers to validation inputs are looked at, and whether their labels are.
        prefix: What the monitors' keys begin with.

    Returns:
        Each feature by name; NaN where what it needs was not measured.

    Raises:
        ValueError: If ``step`` lies before ``memorized_step``, or there is no such mode.

    Cost:
        About a millisecond for a network of ten layers.

    Example:
        >>> from grok_callbacks import History
        >>> history = History()
        >>> for step, norm in [(0, 10.0), (100, 20.0), (400, 5.0)]:
        ...     history.add(step, {"grok/norm": norm})
        >>> features = extract(history, step=400, memorized_step=100, mode="train")
        >>> {name: round(value, 3) for name, value in features.items() if value == value}
        {'time': 1.386, 'norm.since': -1.386, 'norm.recent': -1.386, 'norm.peak': -1.386}
    """
    _require_mode(mode)
    if step < memorized_step:
        raise ValueError(f"`step` {step} lies before `memorized_step` {memorized_step}.")
    begin = max(memorized_step, 1)
    values = {"time": math.log(max(step, 1) / begin)}
    for measure in _read_by(mode):
        layers = [_views(measure, series, step, begin) for series in _series_of(measure, history, prefix)]
        for view in measure.views:
            values[f"{measure.name}.{view}"] = _REDUCTIONS[measure.layers]([layer[view] for layer in layers])
    return values


def measured_keys(mode: Mode, prefix: str = "grok") -> tuple[str, ...]:
    """The keys that a mode reads, for measures with a layer in their key what the key begins with.

    Example:
        >>> measured_keys("train")[:3]
        ('grok/norm', 'grok/norm/', 'grok/loss/train')
    """
    _require_mode(mode)
    return tuple(dict.fromkeys(f"{prefix}/{measure.key}" for measure in _read_by(mode)))


def phrase(name: str, value: float) -> str:
    """A feature in words.

    Example:
        >>> phrase("lmn.since", -0.198)
        'the linear mapping number has fallen 18% since memorising'
    """
    feature = FEATURES[name]
    measure, view = feature.measure, feature.view
    if measure is None or view is None:
        return f"{math.exp(value):.1f} times as many steps as memorising took have passed"
    is_ratio = measure.scale != "value"
    if view in ("level", "mean"):
        when = " on average since memorising" if view == "mean" else ""
        return f"{measure.words} is {math.exp(value) if is_ratio else value:.2g}{when}"
    if measure.layers == "spread":
        return f"{measure.words} has grown to a factor of {math.exp(value):.2g} {_WHEN[view]}"
    verb = "risen" if value > 0 else "fallen"
    if not is_ratio:
        return f"{measure.words} has {verb} by {abs(value):.2g} {_WHEN[view]}"
    factor = math.exp(abs(value))
    if factor >= 2:
        return f"{measure.words} has {verb} {factor:.2g}-fold {_WHEN[view]}"
    return f"{measure.words} has {verb} {abs(math.expm1(value)):.0%} {_WHEN[view]}"


_WHEN = {
    "start": "since the start of training",
    "since": "since memorising",
    "recent": "in the later half of the time since memorising",
    "peak": "from its highest value since memorising",
}


def _require_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {list(MODES)}, got {mode!r}.")


def _read_by(mode: Mode) -> list[Measure]:
    return [measure for measure in _MEASURES if MODES.index(measure.mode) <= MODES.index(mode)]


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
    scale = _SCALES[measure.scale]
    steps, values = series.steps, series.values

    def mean(low: float, high: float) -> float:
        first, last = bisect_left(steps, low), bisect_right(steps, high)
        # Where measurements are further apart than the window, the one before it holds.
        return _mean([scale(value) for value in values[first if first < last else max(last - 1, 0) : last]])

    half_way = math.sqrt(begin * step)
    since = [scale(value) for value in values[bisect_left(steps, begin) : bisect_right(steps, step)]]
    now = mean(max(begin, step / _WINDOW), step)
    views: dict[View, float] = {"level": now}
    for view in measure.views:
        if view == "start":
            views[view] = now - scale(values[0]) if steps[:1] == [0] and values[0] else math.nan
        elif view == "since":
            views[view] = now - mean(begin, min(begin * _WINDOW, step))
        elif view == "recent":
            views[view] = now - mean(max(begin, half_way / math.sqrt(_WINDOW)), min(half_way * math.sqrt(_WINDOW), step))
        elif view == "mean":
            views[view] = _mean(since)
        elif view == "peak":
            views[view] = now - max((value for value in since if math.isfinite(value)), default=math.nan)
    return {view: max(-_LARGEST, min(_LARGEST, value)) if math.isfinite(value) else math.nan for view, value in views.items()}


def _logarithm(value: float) -> float:
    # A loss can underflow to zero, which is little and not unknown.
    return math.log(max(value, _SMALLEST)) if value >= 0 else math.nan


_SCALES: dict[Scale, Callable[[float], float]] = {
    "logarithm": _logarithm,
    "value": float,
    "complement": lambda value: _logarithm(1.0 - value) if value <= 1 else math.nan,
}


def _mean(values: Iterable[float]) -> float:
    """Mean of the finite ones, NaN where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _first(values: Iterable[float]) -> float:
    return next((value for value in values if math.isfinite(value)), math.nan)


def _lowest(values: Iterable[float]) -> float:
    return min((value for value in values if math.isfinite(value)), default=math.nan)


def _spread(values: Iterable[float]) -> float:
    """Standard deviation of the finite ones, NaN for fewer than two."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.pstdev(finite) if len(finite) > 1 else math.nan


_REDUCTIONS: dict[Reduction, Callable[[Iterable[float]], float]] = {
    "mean": _mean,
    "first": _first,
    "lowest": _lowest,
    "spread": _spread,
}
