"""The same weights in every test, and no advice of Lightning's on worker counts, missing loaders and shuffling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_ADVICE = (
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore::lightning_fabric.utilities.warnings.PossibleUserWarning",
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for advice in _ADVICE:
                item.add_marker(pytest.mark.filterwarnings(advice), append=False)
