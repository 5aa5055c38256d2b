"""The numbers of a step: of its trajectories, its updates and its phases."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from rllava_core.mdp.rewards import succeeded
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.training.build import Task


def describe(trajectories: Sequence[Trajectory], task: Task) -> dict[str, float]:
    """Metrics of a step's trajectories, all but timings."""
    returns = np.array([trajectory.episode_return for trajectory in trajectories])
    groups = np.array([trajectory.group for trajectory in trajectories])
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    reasons = Counter(trajectory.truncation for trajectory in trajectories if trajectory.truncation is not None)
    # A group whose returns are all equal teaches a group-relative algorithm nothing.
    uniform = [float(np.ptp(returns[groups == group]) == 0) for group in np.unique(groups)]
    return {
        "reward/mean": float(returns.mean()),
        "reward/std": float(returns.std()),
        **{
            f"reward/{reward.name}": float(np.mean([trajectory.scores[reward.name] for trajectory in trajectories]))
            for reward in task.rewards
        },
        "rollout/success_rate": float(np.mean([succeeded(trajectory, task.primary) for trajectory in trajectories])),
        "rollout/uniform_groups": float(np.mean(uniform)),
        "rollout/action_tokens": float(
            np.mean([sum(len(action.tokens) for action in trajectory.actions) for trajectory in trajectories])
        ),
        "rollout/cut_share": float(np.mean([not turn.action.ended for turn in turns])),
        "rollout/unparsable_share": float(np.mean([not turn.parsed for turn in turns])),
        "rollout/turns": len(turns) / len(trajectories),
        "rollout/truncated_share": float(np.mean([trajectory.truncated for trajectory in trajectories])),
        **{f"rollout/truncated_by_{reason}": count / len(trajectories) for reason, count in sorted(reasons.items())},
    }


def mean(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of an iteration."""
    columns: dict[str, list[float]] = defaultdict(list)
    for update in updates:
        for name, value in update.items():
            columns[name].append(value)
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    return {**means, "policy/updates": float(len(updates))}


class Clock:
    """Seconds of each phase, as `time/…` metrics."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{name}"] = now - self._last
        self._last = now
