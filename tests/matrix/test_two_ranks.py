"""Every monitor and every mixin in the rows of the matrix that take two processes."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.utils.data import TensorDataset

from grok_callbacks import Probe
from grok_callbacks._packing import unpack
from tests.callbacks._all_monitors import ALL_MONITORS
from tests.matrix._environments import STEPS
from tests.matrix._modules import features
from tests.matrix._monitors import MISSING, REFUSED, all_monitors, found_by, keys, mixins
from tests.matrix._ranks import ROWS, SIZE, WITH_MIXINS, everything
from tests.metrics._ddp import run_on_two_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    return run_on_two_ranks(everything, str(folder))


@pytest.fixture(scope="module")
def apart(two):
    """What the same monitors find in one process and in one piece, with the weights that the run began and ended with."""
    found = {}
    for row, environment in ROWS.items():
        train, validation = (TensorDataset(*features(count, seed)) for count, seed in ((24, 1), (8, 2)))
        monitors = [one for one in all_monitors(False, on_error="raise") if (row, type(one).__name__) not in REFUSED]
        weights = two[0][row]["start"], two[0][row]["watched"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[row] = found_by(environment.apart(weights, monitors, Probe(size=SIZE, train=train, validation=validation)))
    return found


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("row", ROWS)
def test_training_is_the_same_with_all_monitors(two, row):
    for result in two:
        assert same(result[row]["plain"], result[row]["watched"])
        assert result[row]["steps"] == [0, STEPS]
    assert same(two[0][row]["plain"], two[1][row]["plain"])


@pytest.mark.parametrize("column", ALL_MONITORS)
@pytest.mark.parametrize("row", ROWS)
def test_every_monitor_finds_what_it_finds_in_one_process(two, apart, row, column):
    if (row, column) in REFUSED:
        assert all(REFUSED[row, column] in result[row]["refused"][column] for result in two)
        return
    found, others = (result[row]["found"][column] for result in two)
    assert found == pytest.approx(others, rel=0, abs=0, nan_ok=True)
    expected, missing = apart[row][column], MISSING.get((row, column), set())
    assert missing <= keys(expected)
    assert STEPS in {step for _, step in found}
    # Sums over ranks are taken in another order.
    assert found == pytest.approx(
        {at: v for at, v in expected.items() if at[0] not in missing}, rel=1e-6, abs=1e-9, nan_ok=True
    )
    assert sum(map(math.isfinite, found.values())) >= 0.7 * len(found)


@pytest.mark.parametrize("row", WITH_MIXINS)
def test_mixins_set_to_nothing_are_nothing(two, row):
    assert all(same(result[row]["plain"], result[row]["idle"]) for result in two)


@pytest.mark.parametrize("column", mixins(False))
@pytest.mark.parametrize("row", WITH_MIXINS)
def test_every_mixin_trains_or_says_why_not(two, row, column):
    first, second = (result[row]["mixins"][column] for result in two)
    if (row, column) in REFUSED:
        assert first == second
        assert first.startswith(column)
        assert REFUSED[row, column] in first
        return
    assert same(first[0], second[0])
    assert not same(first[0], two[0][row]["plain"])
    assert all(value.isfinite().all() for value in first[0].values())
    assert all(math.isfinite(value) for value in first[1].values())


@pytest.mark.parametrize("row", ROWS)
def test_checkpoints_hold_the_measurements(two, folder, row):
    checkpoint = torch.load(folder / f"{list(ROWS).index(row)}.ckpt", weights_only=True)
    states = checkpoint["callbacks"]
    assert len(states) == sum((row, column) not in REFUSED for column in ALL_MONITORS)
    norm = next(state for label, state in states.items() if label.startswith("NormMonitor"))
    assert unpack(norm["recorder"]["history"])["grok/norm"]["steps"].tolist() == [0, STEPS]
