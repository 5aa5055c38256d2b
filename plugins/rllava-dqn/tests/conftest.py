"""Episodes made by hand, and a policy whose values are written in a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, Turn
from rllava_core.policy.policy import PolicyOutput
from rllava_core.testing.fixtures import fake_distribution as fake_distribution
from rllava_core.training.storage import load_tree, save_tree

CHOICES = 4


class Episodes:
    """Random ones. Every state is new: its tokens begin with a number that no other has."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.states = 0

    def state(self, size: tuple[int, int] = (4, 6)) -> ContextSegment:
        self.states += 1
        pixels = self.random.integers(0, 256, (*size, 3), dtype=np.uint8)
        return ContextSegment((1000 + self.states, 7, 7), (Image.from_array(pixels),))

    def action(self, choices: int = CHOICES) -> ActionSegment:
        choice = int(self.random.integers(choices))
        offered = tuple((40 + number, 3) for number in range(choices))
        logprob = np.array([-self.random.random()], np.float32)
        return ActionSegment(offered[choice], logprob, "abcdefgh"[choice], True, choice, offered)

    def __call__(
        self, turns: int, *, terminated: bool = False, history: str = "one", choices: int = CHOICES, score: float = 0.0
    ) -> Trajectory:
        """An episode of so many turns, which ends there in a terminal state or is cut there."""
        shown: tuple[Segment, ...] = ()
        made = []
        for number in range(turns + 1):
            state = self.state(size=(4, 6) if number % 2 else (8, 2))
            shown = (*shown, state) if history == "all" else (state,)
            if number < turns:
                action = self.action(choices)
                made.append(Turn(shown, action, float(self.random.normal()), info={"number": number}))
                shown = (*shown, action)
        return Trajectory(
            example=None,
            seed=self.states,
            group=0,
            turns=tuple(made),
            terminated=terminated,
            truncation=None if terminated else "turns",
            final=None if terminated else shown,
            score=score,
        )


def number_of(context: Sequence[Segment]) -> int:
    """Of the state that a context ends with."""
    return context[-1].tokens[0] - 1000


class TablePolicy:
    """Values in float64 by the number of a state; that of the copy in a table of its own.

    It remembers what it was asked, and how the copy was updated.
    """

    def __init__(self, outputs: dict[str, int] | None = None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = {"q": CHOICES} if outputs is None else outputs

        def table() -> dict[str, Tensor]:
            return {
                name: torch.randn(5000, size, generator=generator, dtype=torch.float64) for name, size in sizes.items()
            }

        self.own, self.copy = table(), table()
        self.evaluated: list[str | None] = []
        self.copied: list[tuple[str, float]] = []

    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        self.evaluated.append(copy)
        tables = self.own if copy is None else self.copy
        assert all(trajectory.decisions == 1 for trajectory in trajectories)
        states = [number_of(trajectory.turns[0].context) for trajectory in trajectories]
        finals = [None if one.final is None else number_of(one.final) for one in trajectories]
        nothing = torch.zeros(len(trajectories))
        return PolicyOutput(
            logprobs=nothing,
            entropies=nothing,
            heads={name: table[states] for name, table in tables.items()},
            final={
                name: torch.stack([torch.zeros_like(table[0]) if state is None else table[state] for state in finals])
                for name, table in tables.items()
            },
        )

    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        self.copied.append((copy, rate))
        for name, table in self.own.items():
            self.copy[name] = (1 - rate) * self.copy[name] + rate * table


@pytest.fixture
def episodes() -> Episodes:
    return Episodes()


@pytest.fixture
def through_the_disk(tmp_path: Path) -> Any:
    """`through_the_disk(state)`: what a checkpoint gives back of it."""

    def pass_through(state: dict[str, Any]) -> Any:
        save_tree(state, tmp_path / "state")
        return load_tree(tmp_path / "state")

    return pass_through
