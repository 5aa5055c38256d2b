"""The conformance kit, for the tests of a plugin: public, and imported by nobody who does not ask for it.

- One suite a kind, to subclass in a plugin's tests: `RewardConformance`, `EnvironmentConformance`, …
- One function a kind, without pytest and without installing anything: `check_reward(MyReward)`, …
- `rllava_core.testing.tiny`: a vision-language model of a few thousand parameters.
- `rllava_core.testing.samples`: pictures, examples and episodes to try rewards and environments on.
- `rllava_core.testing.fixtures`: pytest fixtures that fake installed distributions in a temporary directory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rllava_core.testing.algorithms import AlgorithmConformance, check_algorithm
    from rllava_core.testing.conformance import Conformance, ConformanceError
    from rllava_core.testing.datasets import DatasetConformance, check_dataset
    from rllava_core.testing.engines import (
        EngineConformance,
        check_answering_engine,
        check_rollout_engine,
        check_train_engine,
    )
    from rllava_core.testing.environments import EnvironmentConformance, check_environment
    from rllava_core.testing.models import ModelAdapterConformance, check_model_adapter
    from rllava_core.testing.rewards import RewardConformance, check_reward

__all__ = [
    "AlgorithmConformance",
    "Conformance",
    "ConformanceError",
    "DatasetConformance",
    "EngineConformance",
    "EnvironmentConformance",
    "ModelAdapterConformance",
    "RewardConformance",
    "check_algorithm",
    "check_answering_engine",
    "check_dataset",
    "check_environment",
    "check_model_adapter",
    "check_reward",
    "check_rollout_engine",
    "check_train_engine",
]

# Imported when asked for: the suites of rewards, environments and data sets work without torch.
_HOMES = {
    "algorithms": ("AlgorithmConformance", "check_algorithm"),
    "conformance": ("Conformance", "ConformanceError"),
    "datasets": ("DatasetConformance", "check_dataset"),
    "engines": ("EngineConformance", "check_answering_engine", "check_rollout_engine", "check_train_engine"),
    "environments": ("EnvironmentConformance", "check_environment"),
    "models": ("ModelAdapterConformance", "check_model_adapter"),
    "rewards": ("RewardConformance", "check_reward"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"rllava_core.testing.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
