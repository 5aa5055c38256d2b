"""Fixtures for tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _toy_config(toy_config: Path) -> None:
    """Every command finds `toy.yaml` in the current folder."""
