"""Playing an environment without a policy, and comparing what it showed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from rllava_core.mdp.environment import Environment
from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action, Observation, Transition
from rllava_core.testing.conformance import ConformanceError
from rllava_core.testing.values import content, shortened

Start = tuple[int, Example | None]
"""Seed and example."""


@dataclass(frozen=True)
class Player:
    """Acts in place of a policy; a function of turn and observation, so that an episode can be played again.

    actions: what may be done at an observation.
    repeated: number of the action that it always takes; None for one that mixes them.
    """

    actions: Callable[[Observation], Sequence[Action]]
    repeated: int | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return "mixed actions" if self.repeated is None else f"action number {self.repeated} alone"

    def act(self, observation: Observation, turn: int) -> Action:
        """The action of this turn."""
        actions = self.actions(observation)
        place = int(np.random.default_rng(turn).integers(2**32)) if self.repeated is None else self.repeated
        return actions[place % len(actions)]


def episode(environment: Environment, start: Start, player: Player, turns: int) -> Iterator[Observation | Transition]:
    """The observation of the reset and then the transitions, of an episode that is left after so many turns."""
    seed, example = start
    observation = _observation(environment.reset(seed=seed, example=example), "reset")
    yield observation
    for turn in range(turns):
        transition: object = environment.step(player.act(observation, turn))
        if not isinstance(transition, Transition):
            raise ConformanceError(f"step returned {shortened(transition)}; expected a Transition")
        if transition.observation is not None:
            observation = _observation(transition.observation, f"action {turn + 1}")
        yield transition
        if transition.done or transition.observation is None:
            return


def told(event: Observation | Transition) -> dict[str, object]:
    """What must be the same when an episode is played again: everything but `info`, which may hold a duration."""
    if isinstance(event, Observation):
        return {"messages": content(event.messages), "choices": content(event.choices)}
    seen = {} if event.observation is None else told(event.observation)
    return {
        **seen,
        "reward": event.reward,
        "terminated": event.terminated,
        "truncated": event.truncated,
        "parsed": event.parsed,
        "success": event.info.get("success"),
    }


def difference(first: Sequence[dict[str, object]], second: Sequence[dict[str, object]]) -> str | None:
    """Where two episodes part; None if they are the same."""
    for number, (one, other) in enumerate(zip(first, second, strict=False)):
        names = [name for name in one | other if one.get(name) != other.get(name)]
        if names:
            when = f"after action {number}" if number else "at the reset"
            return f"two episodes differ {when} in {', '.join(names)}"
    if len(first) != len(second):
        return f"one episode has {len(first) - 1} turns and another {len(second) - 1}"
    return None


@contextmanager
def disturbed(seed: int) -> Iterator[None]:
    """Other states of `random` and `numpy.random`; the old ones come back at the end."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _observation(value: object, when: str) -> Observation:
    if not isinstance(value, Observation):
        raise ConformanceError(f"{when} gave {shortened(value)}; expected an Observation")
    return value
