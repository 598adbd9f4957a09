"""Lightning's advice on worker counts, missing loaders and shuffling is not what these tests are about."""

from __future__ import annotations

from pathlib import Path

import pytest

_ADVICE = (
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore::lightning_fabric.utilities.warnings.PossibleUserWarning",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for advice in _ADVICE:
                item.add_marker(pytest.mark.filterwarnings(advice), append=False)
