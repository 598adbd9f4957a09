"""Every monitor and every mixin in every row of the matrix that takes one process."""

from __future__ import annotations

import math
import re
import warnings
from functools import cache

import pytest
import torch
from torch.utils.data import TensorDataset

from grok_callbacks import EverySteps, Probe, Recorder
from grok_callbacks._compat import MisconfigurationException
from tests.callbacks._all_monitors import ALL_MONITORS
from tests.matrix._environments import ENVIRONMENTS, STEPS
from tests.matrix._monitors import LOGGED, REFUSED, STATEFUL, all_monitors, mixins

pytestmark = [
    # A measure may have no value for an untrained model; that is not what is looked at here.
    pytest.mark.filterwarnings("ignore:.*; said once"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Dynamo itself looks at the gradient of what a compiled part of a model is given.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

SIZE = 16


@cache
def plain(row):
    """Weights after the row's training with nothing of ours."""
    return {name: value.clone() for name, value in ENVIRONMENTS[row].fit()[0].state_dict().items()}


@cache
def watched(row):
    """Weights and monitors after the same with all monitors."""
    environment = ENVIRONMENTS[row]
    settings = {"schedule": EverySteps(STEPS), "probe": Probe(size=SIZE), "on_error": "raise"}
    monitors = all_monitors(environment.on_tokens, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*; said once")
        module, _ = environment.fit(monitors)
    return dict(module.state_dict()), {type(monitor).__name__: monitor for monitor in monitors}


@cache
def of_the_twin(row):
    """What the monitors find in the network in one piece with the weights at the end, in a loop of one's own."""
    environment = ENVIRONMENTS[row]
    train, validation = (TensorDataset(*environment.data(count, seed)) for count, seed in ((24, 1), (8, 2)))
    if row == "iterable data":
        train = train[:SIZE]
    probe = Probe(size=SIZE, train=train, validation=None if environment.validation is None else validation)
    monitors = all_monitors(environment.on_tokens, on_error="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Recorder(environment.twin(plain(row)), monitors, probe).record(STEPS)


@pytest.mark.parametrize("row", ENVIRONMENTS)
def test_training_is_the_same_with_all_monitors(row):
    weights, _ = watched(row)
    expected = plain(row)
    assert list(weights) == list(expected)
    for name, value in expected.items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("column", ALL_MONITORS)
@pytest.mark.parametrize("row", ENVIRONMENTS)
def test_every_monitor_finds_what_it_finds_in_the_bare_network(row, column):
    monitor = watched(row)[1][column]
    recorder = monitor._recorder
    assert recorder.switched_off == []
    keys = recorder.keys_of(monitor)
    if not keys:
        # It concludes from what others measure, and there is nothing yet to conclude.
        assert "analyse" in vars(type(monitor))
        return
    assert all(recorder.history[key].steps[-1] == STEPS for key in keys if not any(part in key for part in STATEFUL))
    reference = of_the_twin(row)
    compared = [key for key in keys if key in reference and not any(part in key for part in STATEFUL)]
    assert compared or "analyse" in vars(type(monitor))
    values = {key: recorder.history[key].values[-1] for key in compared}
    assert values == pytest.approx({key: reference[key] for key in compared}, rel=1e-9, abs=1e-12, nan_ok=True)
    assert sum(math.isfinite(value) for value in values.values()) >= 0.7 * len(values)


def test_no_key_of_the_bare_network_is_missing():
    for row in set(ENVIRONMENTS) - {"iterable data"}:
        found = next(iter(watched(row)[1].values())).history
        assert {key for key in of_the_twin(row) if "onset" not in key} <= set(found), row


@pytest.mark.parametrize("column", mixins(False))
@pytest.mark.parametrize("row", ENVIRONMENTS)
def test_every_mixin_trains_or_says_why_not(row, column):
    environment = ENVIRONMENTS[row]
    mixin, _ = mixins(environment.on_tokens)[column]
    if (row, column) in REFUSED:
        with pytest.raises(MisconfigurationException, match=f"^{column}.*{re.escape(REFUSED[row, column])}"):
            environment.fit(mixins=[mixin])
        return
    module, trainer = environment.fit(mixins=[mixin])
    assert trainer.global_step == STEPS
    weights = module.state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert any(not torch.equal(value, weights[name]) for name, value in plain(row).items())
    assert set(weights) == set(plain(row))
    if column in LOGGED:
        assert trainer.callback_metrics[LOGGED[column]].isfinite()


@pytest.mark.parametrize("row", ENVIRONMENTS)
def test_mixins_set_to_nothing_are_nothing(row):
    environment = ENVIRONMENTS[row]
    idle = [idle for _, idle in mixins(environment.on_tokens).values() if idle is not None]
    module, _ = environment.fit(mixins=idle)
    weights = module.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain(row).items())
