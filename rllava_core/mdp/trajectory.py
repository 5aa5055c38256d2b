"""Trajectories: the one record that training reads. Token in, token out.

The tokens that were sampled are the tokens that are trained on, never re-tokenised text. A trajectory is a list of
turns, each of which holds what the policy saw, as segments of tokens with their images, and the tokens that it sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rllava_core.mdp.environment import Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message


@dataclass(frozen=True)
class ContextSegment:
    """What the environment showed, rendered to tokens: the prompt, or an observation of a later turn.

    tokens: token ids, image placeholders included.
    images: the pictures behind the placeholders, in order.
    messages: what was rendered: for people, and for engines that are sent messages and not tokens.
    """

    tokens: tuple[int, ...]
    images: tuple[Image, ...] = ()
    messages: tuple[Message, ...] = ()

    @property
    def text(self) -> str:
        """The messages as a person reads them."""
        return "\n".join(
            f"{message.role}: "
            + "".join("[image]" if isinstance(part, ImagePart) else part.text for part in message.parts)
            for message in self.messages
        )


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
class Turn:
    """One step of an episode: what the policy saw, what it did, and what that brought.

    context: everything that the policy saw when it acted, in reading order. Where the whole history is seen, it is the
        context of the turn before, the action of the turn before, and one more `ContextSegment`, the very same objects;
        with a limited history it begins later.
    reward: the environment's.
    parsed: whether the environment could make sense of the action.
    info: what the environment said with the transition.
    """

    context: tuple[Segment, ...]
    action: ActionSegment
    reward: float = 0.0
    parsed: bool = True
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def observation(self) -> ContextSegment:
        """What the environment showed in this turn: the last segment of the context."""
        last = self.context[-1]
        assert isinstance(last, ContextSegment)
        return last


Truncation = Literal["environment", "turns", "tokens", "context", "failure", "unparsable"]
"""Why an episode was cut: by the environment itself, at `task.max_turns`, at `task.max_episode_tokens`, at the longest
sequence that the model can read, because the environment's process raised, hung or died, or because the last action was
none of the choices that were offered."""


@dataclass(frozen=True)
class Trajectory:
    """One episode.

    group: number of the group in its batch; the trajectories of a group share example and seed.
    turns: in order; at least one.
    terminated: the episode reached a terminal state, after which there is nothing to gain.
    truncation: why the episode was cut before that; None where it was not.
    final: the context of the turn that a truncated episode did not get; its value stands for what was cut off.
    outcome: the images of the last observation, whether or not the policy saw them; for people.
    scores: unweighted reward functions by name; `score` is their weighted sum, which the last turn earned.
    """

    example: Example | None
    seed: int
    group: int
    turns: tuple[Turn, ...]
    terminated: bool
    truncation: Truncation | None = None
    final: tuple[Segment, ...] | None = None
    outcome: tuple[Image, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    score: float = 0.0

    @property
    def name(self) -> str:
        """For messages: the example, or the seed of an environment without examples."""
        return Start(self.example, self.seed).name

    @property
    def truncated(self) -> bool:
        return self.truncation is not None

    @property
    def prompt(self) -> ContextSegment:
        """What the environment showed first."""
        return self.turns[0].observation

    @cached_property
    def actions(self) -> tuple[ActionSegment, ...]:
        return tuple(turn.action for turn in self.turns)

    @cached_property
    def decisions(self) -> int:
        """Number of decisions of all turns."""
        return sum(turn.action.decisions for turn in self.turns)

    @cached_property
    def parts(self) -> Parts:
        """Which of its tokens others may begin with, too."""
        begun: dict[object, int] = {}
        # Each choice of several tokens is read along a path of its own.
        own = sum(sum(map(len, action.choices)) - len(action.choices) for action in self.actions if action.choices)
        for stretch in stretches(self.turns):
            begun[tuple(map(_content, stretch.begin))] = sum(len(segment.tokens) for segment in stretch.begin)
            own += sum(len(segment.tokens) for segment in stretch.rest)
        return Parts(begun, own)

    @property
    def answer(self) -> str:
        """Text of the last action, which is what rewards of one-step tasks judge."""
        return self.turns[-1].action.text

    @property
    def info(self) -> Mapping[str, Any]:
        """What the environment said with the last transition."""
        return self.turns[-1].info

    @property
    def rewards(self) -> tuple[float, ...]:
        """The reward of each turn: the environment's, and with the last turn's the weighted reward functions."""
        rewards = [turn.reward for turn in self.turns]
        return (*rewards[:-1], rewards[-1] + self.score)

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the rewards."""
        return sum(self.rewards)

    @property
    def behaviour_logprobs(self) -> NDArray[np.float32]:
        """[decisions] float32 of all turns."""
        return np.concatenate([turn.action.logprobs for turn in self.turns])


def conversation(segments: Sequence[Segment], rewards: Sequence[float] = ()) -> tuple[Turn, ...]:
    """The turns of an episode whose whole history is seen: context, action, context, action, …

    rewards: of each turn; zeros if empty.
    """
    ends = [place for place, segment in enumerate(segments) if isinstance(segment, ActionSegment)]
    earned = rewards or [0.0] * len(ends)
    turns = []
    for place, reward in zip(ends, earned, strict=True):
        action = segments[place]
        assert isinstance(action, ActionSegment)
        turns.append(Turn(tuple(segments[:place]), action, reward))
    return tuple(turns)


@dataclass(frozen=True)
class Stretch:
    """Turns of which each sees what the one before it saw, and one more action and observation.

    begin: the context of the first of them.
    rest: action, observation, action, …: what follows it; ends with an action.
    """

    begin: tuple[Segment, ...]
    rest: tuple[Segment, ...]


def stretches(turns: Sequence[Turn]) -> list[Stretch]:
    """The fewest stretches that hold all turns in order: one where the whole history is seen, else up to one a turn."""
    found: list[Stretch] = []
    for turn in turns:
        seen = (*found[-1].begin, *found[-1].rest) if found else ()
        if found and len(turn.context) == len(seen) + 1 and all(map(is_, turn.context, seen)):
            found[-1] = Stretch(found[-1].begin, (*found[-1].rest, turn.context[-1], turn.action))
        else:
            found.append(Stretch(turn.context, (turn.action,)))
    return found


@dataclass(frozen=True)
class Parts:
    """begun: what each stretch of a trajectory begins with, and its tokens. own: the number of all other tokens."""

    begun: Mapping[object, int]
    own: int


def _content(segment: Segment) -> object:
    return segment.tokens, segment.images if isinstance(segment, ContextSegment) else ()


def group_sizes(trajectories: Sequence[Trajectory]) -> dict[int, int]:
    """How many trajectories each group has."""
    sizes: dict[int, int] = {}
    for trajectory in trajectories:
        sizes[trajectory.group] = sizes.get(trajectory.group, 0) + 1
    return sizes
