"""Episodes made by hand or drawn, and a policy that answers with drawn numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from rllava_core.algorithms.protocol import Batch
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, Turn
from rllava_core.policy.policy import PolicyOutput
from rllava_ppo.algorithm import PPO
from rllava_ppo.config import PPOConfig

SHOWN = ContextSegment((1,))
MOVES = ((5,), (6, 7), (8,))


def action(decisions: int | None) -> ActionSegment:
    """A text of so many tokens, or a choice for None."""
    if decisions is None:
        return ActionSegment(MOVES[1], np.full(1, -1, np.float32), "", choice=1, choices=MOVES)
    return ActionSegment(tuple(range(2, 2 + decisions)), np.full(decisions, -1, np.float32), "")


def episode(turns: Sequence[tuple[int | None, float]], *, terminated: bool = True, number: int = 0) -> Trajectory:
    """turns: decisions and reward of each. An episode that did not terminate was cut, and left in a further state."""
    context: tuple[Segment, ...] = ()
    made = []
    for decisions, reward in turns:
        context = (*context, SHOWN)
        made.append(Turn(context, action(decisions), reward))
        context = (*context, made[-1].action)
    cut: Any = {} if terminated else {"truncation": "turns", "final": (*context, SHOWN)}
    return Trajectory(None, number, number, tuple(made), terminated, **cut)


def random_episodes(seed: int) -> list[Trajectory]:
    """One to six episodes of one to six turns of one to five decisions, with zero rewards and others."""
    draw = np.random.default_rng(seed)
    episodes = []
    for number in range(int(draw.integers(1, 7))):
        turns: list[tuple[int | None, float]] = []
        for _ in range(int(draw.integers(1, 7))):
            decisions = None if draw.random() < 0.3 else int(draw.integers(1, 6))
            turns.append((decisions, float(np.float32(draw.normal())) if draw.random() < 0.7 else 0.0))
        episodes.append(episode(turns, terminated=bool(draw.random() < 0.5), number=number))
    return episodes


@dataclass
class FakePolicy:
    """Answers with drawn numbers in float64, the same for the same trajectory.

    seed: of the numbers. asked: the copies that were asked for, in order.
    """

    seed: int = 0
    values: Mapping[int, Sequence[float]] = field(default_factory=dict)
    final: Mapping[int, float] = field(default_factory=dict)
    asked: list[str | None] = field(default_factory=list)

    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        self.asked.append(copy)
        return self.output(trajectories, 0 if copy is None else 1)

    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        raise AssertionError("the reference policy stays as it is")

    def output(self, trajectories: Sequence[Trajectory], salt: int = 0) -> PolicyOutput:
        rows = [self._of(trajectory, salt) for trajectory in trajectories]
        logprobs, entropies, values = (np.concatenate(column) for column in list(zip(*rows, strict=True))[:3])
        final = [row[3] if not one.terminated else 0.0 for one, row in zip(trajectories, rows, strict=True)]
        return PolicyOutput(
            torch.from_numpy(logprobs),
            torch.from_numpy(entropies),
            {"value": torch.from_numpy(values)[:, None]},
            {"value": torch.tensor(final, dtype=torch.float64)[:, None]},
        )

    def _of(self, trajectory: Trajectory, salt: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        draw = np.random.default_rng([self.seed, trajectory.seed, salt])
        count = trajectory.decisions
        values = np.asarray(self.values.get(trajectory.seed, draw.normal(size=count)), np.float64)
        final = self.final.get(trajectory.seed, float(draw.normal()))
        return -draw.random(count) - 0.05, draw.random(count), values, final


class Workbench:
    """What the tests are made of."""

    episode = staticmethod(episode)
    random_episodes = staticmethod(random_episodes)
    policy = FakePolicy

    def algorithm(self, **options: Any) -> PPO:
        """With one minibatch in one pass, and advantages as they are, unless the options say otherwise."""
        return PPO(PPOConfig(**{"epochs": 1, "minibatches": 1, "whiten": False, **options}))

    def prepared(self, trajectories: Sequence[Trajectory], policy: FakePolicy | None = None, **options: Any) -> Batch:
        """The one batch of an iteration."""
        [batch] = self.algorithm(**options).prepare(trajectories, policy or FakePolicy())
        return batch


@pytest.fixture
def bench() -> Workbench:
    return Workbench()
