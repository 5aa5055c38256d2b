"""The environments of a run: made from its config, in this process or in others. Imports no torch, for workers import
this file too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from rllava_core.config.resolving import Resolved, ResolvedConfig
from rllava_core.config.sections import TaskSection
from rllava_core.mdp.environment import Environment
from rllava_core.mdp.pool import EnvironmentPool, LocalEnvironments
from rllava_core.mdp.workers import WorkerEnvironments


@dataclass(frozen=True)
class MakeEnvironment:
    """Makes the environments of a run; can be sent to another process, where the component is imported anew."""

    resolved: Resolved
    task: TaskSection

    def __call__(self) -> Environment:
        """A new environment. Raises PluginError for what its code did wrong."""
        return cast(Environment, self.resolved.create(self.task))


def environment_pool(resolved: ResolvedConfig) -> EnvironmentPool:
    """Where `task.workers` says that environments run."""
    task = resolved.run.task
    make = MakeEnvironment(resolved.environment, task)
    return WorkerEnvironments(make, task.workers, task.worker_timeout) if task.workers else LocalEnvironments(make)
