"""The local engines keep the contract of engines, as anyone's must."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from rllava_core.testing import EngineConformance


@pytest.mark.usefixtures("bench")  # which forgets the precision of the tests before
class TestLocalTrainEngine(EngineConformance):
    component = "local"
    role = "train"
    options = MappingProxyType({"device": "cpu"})


class TestLocalRolloutEngine(EngineConformance):
    component = "local"
    role = "rollout"


class TestFewSequencesAtOnce(EngineConformance):
    """The limit bounds memory and changes no result."""

    component = "local"
    role = "rollout"
    options = MappingProxyType({"max_sequences": 3})


@pytest.mark.usefixtures("bench")
class TestOptimizerOnTheHost(EngineConformance):
    component = "local"
    role = "train"
    options = MappingProxyType({"device": "cpu", "optimizer_on_cpu": True, "offload_activations": True})


@pytest.mark.usefixtures("bench")
class TestNothingShared(EngineConformance):
    component = "local"
    role = "train"
    options = MappingProxyType({"device": "cpu", "prefix_sharing": False})
