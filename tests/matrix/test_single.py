"""Every monitor and every mixin in every row of the matrix that takes one process."""

from __future__ import annotations

import math
import re
import warnings
from functools import cache

import pytest
import torch
from torch.utils.data import TensorDataset

from grok_callbacks import EverySteps, Probe
from grok_callbacks._compat import MisconfigurationException
from tests.callbacks._all_monitors import ALL_MONITORS
from tests.matrix._environments import ENVIRONMENTS, STEPS, Start, whole
from tests.matrix._monitors import LOGGED, MISSING, REFUSED, all_monitors, found_by, keys, mixins

pytestmark = [
    # A measure may have no value for an untrained model; that is not what is looked at here.
    pytest.mark.filterwarnings("ignore:.*; said once"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    # Dynamo itself looks at the gradient of what a compiled part of a model is given.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

SIZE = 16


@cache
def both_ends(row):
    """Weights before and after the row's training with nothing of ours."""
    start = Start()
    module, _ = ENVIRONMENTS[row].fit([start])
    return start.weights, whole(module)


def plain(row):
    """Weights after the row's training with nothing of ours."""
    return both_ends(row)[1]


@cache
def watched(row):
    """Weights after the same with all monitors, and the Recorder of these."""
    environment = ENVIRONMENTS[row]
    settings = {"schedule": EverySteps(STEPS), "probe": Probe(size=SIZE), "on_error": "raise"}
    monitors = all_monitors(environment.on_tokens, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*; said once")
        module, _ = environment.fit(monitors)
    return dict(module.state_dict()), monitors[0]._recorder


@cache
def apart(row):
    """What the monitors find in the bare network with the same weights, in a loop of one's own."""
    environment = ENVIRONMENTS[row]
    train, validation = (TensorDataset(*environment.data(count, seed)) for count, seed in ((24, 1), (8, 2)))
    if row == "iterable data":
        train = train[:SIZE]
    probe = Probe(size=SIZE, train=train, validation=None if environment.validation is None else validation)
    monitors = all_monitors(environment.on_tokens, on_error="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return found_by(environment.apart(both_ends(row), monitors, probe))


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
    recorder = watched(row)[1]
    assert recorder.switched_off == []
    found, expected = found_by(recorder)[column], apart(row)[column]
    missing = MISSING.get((row, column), set())
    assert missing <= keys(expected)
    assert STEPS in {step for _, step in found}
    assert found == pytest.approx(
        {at: v for at, v in expected.items() if at[0] not in missing}, rel=1e-9, abs=1e-12, nan_ok=True
    )
    assert sum(map(math.isfinite, found.values())) >= 0.7 * len(found)


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
    logged = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("grok/")}
    if column in LOGGED:
        assert logged[LOGGED[column]].isfinite()
    else:
        assert not logged


@pytest.mark.parametrize("row", ENVIRONMENTS)
def test_mixins_set_to_nothing_are_nothing(row):
    environment = ENVIRONMENTS[row]
    idle = [idle for _, idle in mixins(environment.on_tokens).values() if idle is not None]
    module, _ = environment.fit(mixins=idle)
    weights = module.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in plain(row).items())
