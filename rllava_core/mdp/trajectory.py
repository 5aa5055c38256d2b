"""Trajectories: the one record that training reads. Token in, token out.

The tokens that were sampled are the tokens that are trained on, never re-tokenised text. A trajectory is a list of
segments: the prompt, then alternately actions and further observations, each with its own images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image


@dataclass(frozen=True)
class ContextSegment:
    """What the environment showed, rendered to tokens: the prompt, or an observation of a later turn.

    tokens: token ids, image placeholders included.
    images: the pictures behind the placeholders, in order.
    text: the messages as a person reads them, for the trajectory sample.
    """

    tokens: tuple[int, ...]
    images: tuple[Image, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class ActionSegment:
    """What the policy did in one turn.

    tokens: the token ids sampled, end of turn included; for a choice, the token ids of the chosen entry.
    logprobs: float32, the behaviour policy's log-prob of each decision: one a token, or one for a choice.
    choice, choices: the index chosen and the token ids of every entry; None for free text.
    ended: the policy ended its turn itself (always so for a choice).
    text: decoded, without the end-of-turn token.
    """

    tokens: tuple[int, ...]
    logprobs: NDArray[np.float32]
    text: str
    ended: bool = True
    choice: int | None = None
    choices: tuple[tuple[int, ...], ...] | None = None

    @property
    def decisions(self) -> int:
        """How many things the policy decided in this turn: every token, or one choice."""
        return len(self.tokens) if self.choice is None else 1


Segment = ContextSegment | ActionSegment


@dataclass(frozen=True)
class Trajectory:
    """One episode.

    group: number of the group in its batch; the trajectories of a group share example and seed.
    segments: prompt, action, observation, action, …; the first is context, and every turn ends with an action.
    rewards: the environment's reward of each turn.
    scores: unweighted reward functions by name; `score` is their weighted sum.
    info: what the environment said with the last transition.
    """

    example: Example | None
    seed: int
    group: int
    segments: tuple[Segment, ...]
    rewards: tuple[float, ...]
    terminated: bool
    truncated: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)
    score: float = 0.0
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For messages: the example, or the seed of an environment without examples."""
        return self.example.name if self.example is not None else f"episode with seed {self.seed}"

    @property
    def prompt(self) -> ContextSegment:
        first = self.segments[0]
        assert isinstance(first, ContextSegment)
        return first

    @property
    def actions(self) -> tuple[ActionSegment, ...]:
        return tuple(segment for segment in self.segments if isinstance(segment, ActionSegment))

    @property
    def decisions(self) -> int:
        """Number of decisions of all turns."""
        return sum(action.decisions for action in self.actions)

    @property
    def answer(self) -> str:
        """Text of the last action, which is what rewards of one-step tasks judge."""
        return self.actions[-1].text

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the environment's rewards plus the weighted reward functions."""
        return sum(self.rewards) + self.score

    @property
    def behaviour_logprobs(self) -> NDArray[np.float32]:
        """[decisions] float32 of all turns."""
        return np.concatenate([action.logprobs for action in self.actions])


def group_sizes(trajectories: Sequence[Trajectory]) -> dict[int, int]:
    """How many trajectories each group has."""
    sizes: dict[int, int] = {}
    for trajectory in trajectories:
        sizes[trajectory.group] = sizes.get(trajectory.group, 0) + 1
    return sizes
