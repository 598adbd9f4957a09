"""The same weights in every test; Lightning's advice is not what is tested."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    for item in items:
        if "faults" in item.path.parts:
            advice = "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
            item.add_marker(pytest.mark.filterwarnings(advice), append=False)
