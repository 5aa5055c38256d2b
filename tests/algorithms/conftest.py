"""Trajectories without a model: groups of given returns, answers of given lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rllava_core.mdp.examples import Example
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, conversation
from rllava_core.policy.policy import PolicyOutput


class Maker:
    """Makes trajectories and what a policy says of them."""

    def trajectory(
        self, group: int = 0, turns: Sequence[int] = (2,), score: float = 0.0, prompt: int = 4, seed: int = 0
    ) -> Trajectory:
        """turns: decisions of each turn; 0 stands for one choice of two tokens. prompt: its number of tokens."""
        generator = np.random.default_rng([group, seed])
        segments: list[Segment] = [ContextSegment(tuple(range(group * 50, group * 50 + prompt)))]
        for turn, decisions in enumerate(turns):
            if turn:
                segments.append(ContextSegment((1, 2, 3)))
            logprobs = -generator.random(decisions or 1).astype(np.float32) - 0.1
            if decisions == 0:
                segments.append(ActionSegment((7, 8), logprobs, "", choice=0, choices=((7, 8), (9,))))
            else:
                segments.append(ActionSegment(tuple(range(decisions)), logprobs, ""))
        rewards = [0.25] * len(turns)
        return Trajectory(Example(f"example {group}"), 0, group, conversation(segments, rewards), True, score=score)

    def output(self, trajectories: Sequence[Trajectory], seed: int = 0, shift: float = 0.0) -> PolicyOutput:
        """Log-probs near the behaviour policy's, and entropies, of all decisions."""
        generator = torch.Generator().manual_seed(seed)
        old = torch.tensor(np.concatenate([trajectory.behaviour_logprobs for trajectory in trajectories]))
        moved = old.double() + 0.5 * torch.randn(len(old), generator=generator, dtype=torch.float64) + shift
        entropies = torch.rand(len(old), generator=generator, dtype=torch.float64)
        return PolicyOutput(moved.requires_grad_(), entropies.requires_grad_(), {})


class Access:
    """A policy of fixed answers, and a record of what was asked."""

    def __init__(self, reference: PolicyOutput | None = None) -> None:
        self.reference = reference
        self.asked: list[Any] = []

    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        assert copy == "reference", "nothing here needs the policy's own log-probs"
        assert self.reference is not None
        self.asked.append(tuple(trajectories))
        return self.reference

    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        raise AssertionError("nothing here moves a copy")


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.fixture
def access() -> type[Access]:
    return Access
