"""What the processes of a run do once for all of them, and what they must have in common."""

from __future__ import annotations

from collections.abc import Sequence

from rllava_core.config import RunConfig
from rllava_core.engines.world import World, together
from rllava_core.errors import ConfigError
from rllava_core.mdp.rewards import WeightedReward, scores_of, with_scores
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.plugins import Registry


def agree(world: World, config: RunConfig, registry: Registry) -> None:
    """Raises ConfigError, in every process, unless all run the same config with the same plugins."""
    own = {plugin.distribution: str(plugin.version) for plugin in registry.plugins if plugin.usable}
    found = world.gathered((own, config.to_yaml()))
    first, first_config = found[0]
    for rank, (other, other_config) in enumerate(found):
        problem = None
        if other != first:
            problem = (
                f"process {rank} of {world.size} has other plugins than process 0: {_listed(other)}; process 0: "
                f"{_listed(first)}. Install the same versions everywhere, and set RLLAVA_PLUGINS alike"
            )
        if other_config != first_config:
            lines = set(other_config.splitlines()).symmetric_difference(first_config.splitlines())
            shown = "; ".join(line.strip() for line in sorted(lines)[:4])
            problem = f"process {rank} of {world.size} has another config than process 0: {shown}"
        if problem is not None:
            error = ConfigError(problem)
            error.everywhere = True
            raise error


def score_once(world: World, trajectories: Sequence[Trajectory], rewards: Sequence[WeightedReward]) -> list[Trajectory]:
    """Trajectories with their scores, which the first process asks for: rewards may be dear, or judge a whole."""

    [found, *_] = together(world, lambda: scores_of(trajectories, rewards) if world.rank == 0 else {})
    return with_scores(trajectories, found, rewards)


def _listed(plugins: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(plugins.items())) or "none"
