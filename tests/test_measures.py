"""The table of measures knows every key that a monitor says it logs, and agrees with the monitors on question and source."""

from __future__ import annotations

import re

import pytest

from grok_callbacks.measures import MEASURES, QUESTIONS, Chart, chart_of, group_by_chart
from tests.test_package import every_monitor


def keys_in(doc):
    return re.findall(r"`grok/([\w/]+)", doc)


@pytest.mark.parametrize("monitor", every_monitor(), ids=lambda cls: cls.__name__)
def test_every_family_of_a_monitor_is_in_the_table(monitor):
    families = {key.split("/")[0] for key in keys_in(monitor.__doc__)} - {"circuit_complexity_std", "lmn_standard_error"}
    assert families
    for family in families:
        measure = MEASURES[family]
        assert measure.question == monitor.question
        numbers = {source.arxiv for source in measure.sources if source.arxiv} - {"2201.02177"}
        assert numbers <= set(re.findall(r"\d{4}\.\d{5}", monitor.__doc__)), "the docstring names the same source"


@pytest.mark.parametrize("family", MEASURES)
def test_measures_are_explained(family):
    measure = MEASURES[family]
    assert measure.question in QUESTIONS
    assert measure.meaning.endswith(".")
    assert 40 < len(measure.meaning) < 320
    assert measure.sources or family in ("forecast", "truncation")


@pytest.mark.parametrize(("title", "quantities"), [
    ("Description length (bits)", ["bits", "bits_0.1", "total_bits", "total_bits_estimate", "naive_bits"]),
    ("Bound on the error rate", ["bound", "bound_estimate"]), ("Loss of the coarse model", ["train_loss", "validation_loss"]),
    ("Rate-distortion complexity", ["of_a_later_version"]),
])  # fmt: skip
def test_quantities_of_one_size_share_a_chart(title, quantities):
    assert {chart_of("complexity", quantity) for quantity in quantities} == {Chart("complexity", title)}


def test_error_bars_and_other_keys_have_no_chart():
    keys = [
        "grok/robustness/pmi_se/fc",
        "grok/lmn_standard_error/fc",
        "grok/circuit_complexity_std/fc",
        "val_acc",
        "grok",
        "grokking/x",
    ]
    assert group_by_chart(keys) == {}
    # Not an error bar: a layer of this name.
    assert group_by_chart(["grok/norm/block.conv_se"]) == {
        Chart("norm", "Weight norm"): {"block.conv_se": "grok/norm/block.conv_se"}
    }
