"""DescriptionLength over updates and ranks gives the description length of all samples."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from grok_callbacks.functional import code_length, generalization_bound
from grok_callbacks.metrics import DescriptionLength
from tests.metrics._common import check_metric
from tests.metrics._ddp import metrics_on_two_ranks

BITS = 3000.0


def batches():
    generator = torch.Generator().manual_seed(0)
    sizes = (40, 1, 300)
    return [(torch.randn(n, 5, generator=generator), torch.randint(5, (n,), generator=generator), BITS) for n in sizes]


def expected(data, scale=1.0, delta=0.05):
    logits, targets = torch.cat([batch[0] for batch in data]), torch.cat([batch[1] for batch in data])
    data_bits = code_length(logits, targets) * scale
    risk = (logits.argmax(1) != targets).double().mean()
    return {
        "bits": torch.tensor(BITS),
        "data_bits": data_bits,
        "total_bits": BITS + data_bits,
        "risk": risk,
        "bound": generalization_bound(risk, BITS, len(targets), delta),
    }


def test_over_updates():
    check_metric(DescriptionLength, batches(), expected(batches()))


def test_of_a_part():
    """The targets' code is scaled to the training set; the bound counts the samples that were seen."""
    factory = partial(DescriptionLength, num_samples=3410, delta=0.2)
    check_metric(factory, batches(), expected(batches(), scale=10.0, delta=0.2))


def test_two_ranks():
    shares = batches()[:1], batches()[1:]
    for results in metrics_on_two_ranks({"length": (DescriptionLength, *shares)}):
        for name, value in expected(batches()).items():
            torch.testing.assert_close(results["length"][name].double(), value.double(), rtol=1e-12, atol=0)


def test_perfect_network():
    metric = DescriptionLength()
    metric.update(torch.eye(3).repeat(100, 1) * 1e3, torch.arange(3).repeat(100), bits=20)
    values = metric.compute()
    assert values["data_bits"] == 0
    assert values["total_bits"] == 20
    assert 0 < values["bound"] < 0.3


def test_before_any_sample():
    metric = DescriptionLength()
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), bits=20)
    assert all(value.isnan() for value in metric.compute().values())


@pytest.mark.parametrize("hostile", [math.nan, math.inf])
def test_not_finite(hostile):
    metric = DescriptionLength()
    metric.update(torch.full((4, 3), hostile), torch.zeros(4, dtype=torch.long), bits=20)
    metric.update(torch.ones(4, 3), torch.zeros(4, dtype=torch.long), bits=20)
    assert metric.compute()["total_bits"].isnan()
    metric.reset()
    metric.update(torch.ones(4, 3), torch.zeros(4, dtype=torch.long), bits=math.nan)
    values = metric.compute()
    assert values["bits"].isnan()
    assert values["bound"].isnan()
    assert values["data_bits"] > 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_samples"):
        DescriptionLength(num_samples=0)
    with pytest.raises(ValueError, match="delta"):
        DescriptionLength(delta=1.0)
    metric = DescriptionLength()
    with pytest.raises(ValueError, match="logits and targets"):
        metric.update(torch.ones(4, 3), torch.zeros(5, dtype=torch.long), bits=20)
    assert metric.bits == 0
    assert metric.count == 0


def test_plot():
    metric = DescriptionLength()
    metric.update(*batches()[0])
    figure, _ = metric.plot()
    assert figure is not None
