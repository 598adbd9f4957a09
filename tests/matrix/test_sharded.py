"""Models sharded by FSDP2 on two ranks, in a loop of one's own: the same values, the same training, no hang."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from grok_callbacks import NormMonitor, Recorder
from tests.matrix._monitors import LEFT_OUT
from tests.matrix._sharded import NETS, everything, make, measure
from tests.metrics._ddp import run_on_two_ranks

# A measure may have no value for an untrained model; that is not what is looked at here.
pytestmark = pytest.mark.filterwarnings("ignore:.*; said once")


@pytest.fixture(scope="module")
def two():
    return run_on_two_ranks(everything)


@pytest.mark.parametrize("name", NETS)
def test_all_monitors_find_what_they_find_in_one_piece(two, name):
    alone = measure(name, make(name))
    first, second = (result[f"measured {name}"] for result in two)
    assert set(alone) == set(first) | {LEFT_OUT}
    assert "grok/forecast/probability" in first
    assert first == pytest.approx(second, nan_ok=True, rel=0, abs=0)
    assert first == pytest.approx({key: alone[key] for key in first}, nan_ok=True, rel=1e-6, abs=1e-9)
    assert sum(math.isfinite(value) for value in first.values()) > 0.9 * len(first)


@pytest.mark.parametrize("accumulate", [False, True])
def test_training_stays_the_same_to_the_last_bit(two, accumulate):
    for result in two:
        losses, weights = result[f"alone {accumulate}"]
        watched_losses, watched_weights = result[f"watched {accumulate}"]
        assert losses == watched_losses
        assert all(torch.equal(weights[key], watched_weights[key]) for key in weights)
        assert len(result[f"keys {accumulate}"]) > 50


def test_ranks_may_make_different_numbers_of_passes(two):
    model = make("mlp")
    inputs = NETS["mlp"][1]()[0][:16]
    with torch.no_grad():
        plain = model(inputs).sum()
        model.net[0].weight.zero_()
        pruned = model(inputs).sum()
    # One pass of rank 0 and three of rank 1 are summed, then that sum of both, and what rank 0 added.
    expected = float(2 * 4 * plain + pruned)
    assert [result["uneven"] for result in two] == pytest.approx([expected, expected], rel=1e-5)


@pytest.mark.parametrize("how", ["in a pass", "on a rank", "gradient"])
def test_a_monitor_that_fails_leaves_training_and_the_others_alone(two, how):
    losses, weights = two[0]["alone False"]
    for result in two:
        (failed_losses, failed_weights), switched_off, others = result[how]
        assert [label.split("(")[0] for label in switched_off] == ["Failing"]
        assert others == 2
        assert failed_losses == losses
        assert all(torch.equal(weights[key], failed_weights[key]) for key in weights)


def test_a_pass_holds_one_part_and_the_rest_of_the_model_at_a_time(two):
    parts = {name: sum(p.nbytes for p in module.parameters()) for name, module in make("transformer").named_modules()}
    layers = [parts[f"encoder.layers.{number}"] for number in (0, 1)]
    for result in two:
        assert result["peak"]["grok/peak"] == parts[""] - min(layers)
        assert result["peak"]["grok/left"] == 0


def test_flat_shards_are_refused():
    for marks, match in (({"_fsdp_flattened": True}, "FSDP1"), ({"ds_id": 1, "ds_status": 2}, "ZeRO stage 3")):
        model = nn.Linear(2, 2)
        for name, value in marks.items():
            setattr(model.weight, name, value)
        with pytest.raises(ValueError, match=match):
            Recorder(model, [NormMonitor()]).record(0)
