"""Fixtures shared by all tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """Small inputs and what each measure gives on them, computed by plain numpy code."""
    return json.loads((Path(__file__).parent / "golden.json").read_text())
