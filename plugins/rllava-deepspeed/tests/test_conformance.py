"""One process alone has nothing to share, and keeps the contract of engines as the local one does."""

from __future__ import annotations

from types import MappingProxyType

from rllava_core.testing import EngineConformance


class TestDeepSpeedTrainEngine(EngineConformance):
    component = "deepspeed"
    role = "train"
    options = MappingProxyType({"device": "cpu"})
