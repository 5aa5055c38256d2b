"""What the numbers of a step say of its trajectories."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Trajectory, Truncation, Turn
from rllava_core.training.build import Task
from rllava_core.training.episodes import Limits
from rllava_core.training.metrics import describe


def turn(reward: float, tokens: int = 1, ended: bool = True, parsed: bool = True, success: bool = False) -> Turn:
    action = ActionSegment(tuple(range(tokens)), np.zeros(tokens, np.float32), "x", ended)
    return Turn((ContextSegment((1,)),), action, reward, parsed, {"success": success})


def played(group: int, *turns: Turn, truncation: Truncation | None = None) -> Trajectory:
    return Trajectory(None, 0, group, turns, terminated=truncation is None, truncation=truncation)


def test_a_step_is_described_by_what_its_trajectories_are() -> None:
    trajectories = [
        played(0, turn(0.25, 2), turn(0.75, 1, parsed=False, success=True)),
        played(0, turn(1.0, 3, ended=False)),
        played(1, turn(0.0), turn(0.5, parsed=False), turn(-0.5, 4, parsed=False), truncation="turns"),
        played(1, turn(1.0, 2), turn(2.0, 2), truncation="failure"),
        played(1, turn(0.0, 5), truncation="turns"),
    ]
    limits = Limits(max_new_tokens=1, max_turns=1, max_episode_tokens=None, history="all")
    nothing: Any = None
    task = Task(environments=nothing, examples=lambda split: None, rewards=(), limits=limits)

    described = describe(trajectories, task)

    assert described == pytest.approx(
        {
            "reward/mean": 1.0,
            "reward/std": np.std([1, 1, 0, 3, 0]),
            "rollout/success_rate": 0.2,
            "rollout/uniform_groups": 0.5,
            "rollout/action_tokens": 21 / 5,  # of all turns of an episode
            "rollout/cut_share": 1 / 9,  # of turns
            "rollout/unparsable_share": 3 / 9,
            "rollout/turns": 9 / 5,
            "rollout/truncated_share": 3 / 5,
            "rollout/truncated_by_failure": 1 / 5,
            "rollout/truncated_by_turns": 2 / 5,
        }
    )
