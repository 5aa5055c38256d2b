"""Credit by turns: what an action is judged by in an episode of several turns."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rllava_core.algorithms.policy_gradient import Rollouts
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, conversation
from rllava_grpo.algorithm import GRPO
from rllava_grpo.config import GRPOConfig

Episode = tuple[int, list[float]]
"""Group, and the reward of each turn."""


def played(episodes: Sequence[Episode], decisions: int = 2, score: float = 0.0) -> Rollouts:
    trajectories = []
    for group, rewards in episodes:
        action = ActionSegment(tuple(range(decisions)), np.full(decisions, -1, np.float32), "")
        segments: list[Segment] = [ContextSegment((1,)), action] * len(rewards)
        turns = conversation(segments, rewards)
        trajectories.append(Trajectory(None, 0, group, turns, terminated=True, score=score))
    return Rollouts.of(trajectories)


def advantages(episodes: Sequence[Episode], score: float = 0.0, **options: Any) -> list[float]:
    found: torch.Tensor = GRPO(GRPOConfig(**options)).advantages(played(episodes, score=score))
    return found.tolist()


def test_by_episode_every_turn_is_judged_by_the_whole_return() -> None:
    """Returns 3 and 1: ±1 from their mean, for each trajectory."""
    assert advantages([(0, [1.0, 2.0]), (0, [1.0])], scale="none") == [1.0, -1.0]


def test_by_turn_what_came_before_does_not_count() -> None:
    """From turn 1 on 3 and 1, mean 2; from turn 2 on 2 and 1, mean 1.5."""
    found = advantages([(0, [1.0, 2.0]), (0, [0.0, 1.0])], scale="none", credit="turn")
    assert found == [1.0, 0.5, -1.0, -0.5]


def test_a_turn_that_only_one_episode_reached_is_compared_with_nothing() -> None:
    assert advantages([(0, [0.0, 5.0]), (0, [1.0])], scale="none", credit="turn") == [2.0, 0.0, -2.0]


def test_reward_functions_are_earned_by_the_last_turn() -> None:
    found = advantages([(0, [0.0, 0.0]), (0, [1.0, 0.0])], score=2.0, scale="none", credit="turn")
    assert found == [-0.5, 0.0, 0.5, 0.0]


def test_with_a_discount_the_sooner_reward_is_the_better() -> None:
    """By hand, with 0.5: both earn 1, in turn 2 and in turn 3: returns 0.5 and 0.25."""
    episodes: list[Episode] = [(0, [0.0, 1.0]), (0, [0.0, 0.0, 1.0])]
    assert advantages(episodes, scale="none") == [0.0, 0.0]
    assert advantages(episodes, scale="none", gamma=0.5) == [0.125, -0.125]
    assert advantages(episodes, scale="none", gamma=0.5, credit="turn") == [0.125, 0.25, -0.125, -0.25, 0.0]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_turns_equal_a_loop_in_float64(scale: str, seed: int, gamma: float) -> None:
    generator = random.Random(seed)
    episodes = [
        (group, [round(generator.uniform(-2, 2), 3) for _ in range(generator.randint(1, 5))])
        for group in range(3)
        for _ in range(generator.randint(2, 5))
    ]
    to_go = [
        [math.fsum(gamma**k * reward for k, reward in enumerate(rewards[turn:])) for turn in range(len(rewards))]
        for _, rewards in episodes
    ]
    centred: list[float] = []
    deviations: list[float] = []
    for (group, rewards), own in zip(episodes, to_go, strict=True):
        for turn in range(len(rewards)):
            peers = [
                other[turn]
                for (label, _), other in zip(episodes, to_go, strict=True)
                if label == group and len(other) > turn
            ]
            mean = math.fsum(peers) / len(peers)
            centred.append(own[turn] - mean)
            squares = math.fsum((value - mean) ** 2 for value in peers)
            deviations.append(math.sqrt(squares / max(1, len(peers) - 1)))
    if scale == "group":
        expected = [value / (deviation + 1e-4) for value, deviation in zip(centred, deviations, strict=True)]
    elif scale == "batch":
        mean = math.fsum(centred) / len(centred)
        whole = math.sqrt(math.fsum((value - mean) ** 2 for value in centred) / (len(centred) - 1))
        expected = [value / (whole + 1e-4) for value in centred]
    else:
        expected = centred
    found = advantages(episodes, scale=scale, credit="turn", gamma=gamma)
    assert found == pytest.approx(expected, abs=1e-5)


def test_every_decision_of_a_turn_has_its_advantage() -> None:
    rollouts = played([(0, [1.0, 2.0]), (0, [0.0, 1.0])], decisions=3)
    algorithm = GRPO(GRPOConfig(scale="none", credit="turn"))
    [batch] = list(algorithm.prepare(rollouts.trajectories, None))  # type: ignore[arg-type]
    assert batch.advantages.tolist() == [1.0] * 3 + [0.5] * 3 + [-1.0] * 3 + [-0.5] * 3
