"""The run's config: sections, YAML files, `section.key=value` overrides, and errors that name the key.

A section that chooses a component (`model`, `algorithm`, `task.environment`, …) holds the component's name and, beside
it, the component's own options, which the component's own config model validates. Every section refuses unknown keys.
"""

from rllava_core.config.reading import read_yaml
from rllava_core.config.resolving import Resolved, ResolvedConfig, load
from rllava_core.config.sections import (
    ComponentSection,
    EngineSection,
    ModelSection,
    Options,
    RewardSection,
    RunConfig,
    TaskSection,
    TrainingSection,
)

__all__ = [
    "ComponentSection",
    "EngineSection",
    "ModelSection",
    "Options",
    "Resolved",
    "ResolvedConfig",
    "RewardSection",
    "RunConfig",
    "TaskSection",
    "TrainingSection",
    "load",
    "read_yaml",
]
