"""What every metric of this package must withstand."""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

mpl.use("Agg")


def check_metric(
    metric_factory: Callable[[], Metric],
    batches: Sequence[Any],
    expected: Any,
    *,
    rtol: float = 1e-9,
    atol: float = 1e-12,
) -> None:
    """Assert that updates on ``batches`` (each a tensor or a tuple of arguments) give ``expected``, come what may.

    ``expected`` is what the function gives on the concatenated batches: a number, a tensor, or a dict of them. Checked
    are plain updates, forward, reset, clone, pickling, a saved and loaded state, ``half()`` on the metric and half
    inputs, a compute before any update, the class attributes every metric declares, and ``plot`` of a scalar result.
    """

    def same(metric: Metric, reference: Any = expected) -> None:
        _assert_close(metric.compute(), reference, rtol, atol)

    def updated(metric: Metric, data: Sequence[Any] = batches) -> Metric:
        for batch in data:
            metric.update(*as_arguments(batch))
        return metric

    metric = updated(metric_factory())
    same(metric)

    assert metric.is_differentiable is False
    assert metric.higher_is_better is None
    assert metric.full_state_update is False
    assert metric.distribution in {"replicated", "sharded", "split"}
    assert metric.sync_on_compute is (metric.distribution != "replicated")

    forwarded = metric_factory()
    for batch in batches:
        _assert_close(forwarded(*as_arguments(batch)), updated(metric_factory(), [batch]).compute(), rtol, atol)
    same(forwarded)

    clone = metric.clone()
    restored = pickle.loads(pickle.dumps(metric))
    metric.reset()
    same(updated(metric))
    same(clone)
    same(restored)
    # Half of the data before pickling and half after: the state that travels is the one that goes on.
    half_way = len(batches) // 2
    moved = pickle.loads(pickle.dumps(updated(metric_factory(), batches[:half_way])))
    same(updated(moved, batches[half_way:]))

    same(_through_checkpoint(metric, metric_factory()))

    same(updated(metric_factory().half()))
    same(metric.half())
    same(metric.float())
    halves = [tuple(_map_floating(argument, torch.float16) for argument in as_arguments(batch)) for batch in batches]
    widened = [tuple(_map_floating(argument, torch.float64) for argument in batch) for batch in halves]
    same(updated(metric_factory(), halves), updated(metric_factory(), widened).compute())

    _check_compute_before_update(metric_factory())
    if _is_scalar(expected):
        _check_plot(metric)


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """A batch as the positional arguments of ``update``: tuples are several, anything else is one."""
    return batch if isinstance(batch, tuple) else (batch,)


def _assert_close(actual: Any, reference: Any, rtol: float, atol: float) -> None:
    if isinstance(reference, dict):
        assert set(actual) == set(reference)
        for key, value in reference.items():
            _assert_close(actual[key], value, rtol, atol)
        return
    actual, reference = torch.as_tensor(actual), torch.as_tensor(reference)
    torch.testing.assert_close(actual.double(), reference.double(), rtol=rtol, atol=atol, equal_nan=True)


def _map_floating(argument: Any, dtype: torch.dtype) -> Any:
    """``argument`` with its floating tensors cast: a tensor, or a dict, list or tuple of them, or anything else."""
    if isinstance(argument, Tensor):
        return argument.to(dtype) if argument.is_floating_point() else argument
    if isinstance(argument, dict):
        return {key: _map_floating(value, dtype) for key, value in argument.items()}
    if isinstance(argument, (list, tuple)):
        return type(argument)(_map_floating(value, dtype) for value in argument)
    return argument


def _through_checkpoint(metric: Metric, fresh: Metric) -> Metric:
    """``fresh`` with the state of ``metric`` after a save and a safe load."""
    metric.persistent(True)
    buffer = io.BytesIO()
    torch.save(metric.state_dict(), buffer)
    buffer.seek(0)
    fresh.persistent(True)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    fresh._update_count = metric._update_count  # torchmetrics does not save it, and warns for its lack
    return fresh


def _check_compute_before_update(metric: Metric) -> None:
    """The usual warning, then a value or a clear ValueError: nothing obscure."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(ValueError):
            metric.compute()
    assert any("before" in str(warning.message) and "update" in str(warning.message) for warning in caught)


def _is_scalar(expected: Any) -> bool:
    values = expected.values() if isinstance(expected, dict) else [expected]
    return all(torch.as_tensor(value).ndim == 0 for value in values)


def _check_plot(metric: Metric) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, axes = metric.plot()
    assert figure is not None
    assert axes is not None
    plt.close("all")
