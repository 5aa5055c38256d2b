"""The contract of an environment: `reset` and `step`, with Gymnasium's meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action, Observation, Transition


class Environment(Protocol):
    """One episode at a time. The target of an `environment` component, called with its config and the task section.

    The policy sees the observations as user turns of one conversation; its actions are the assistant's turns. Where
    `task.history` is a number, it sees that many turns at most, and beside them the system messages of the first
    observation.
    """

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        """Begin an episode. The same seed and example give the same episode; a group shares both.

        example: an entry of the task's data set; None for an environment that makes its own tasks from the seed.
        """
        ...

    def step(self, action: Action) -> Transition:
        """Carry out the action. Called only while the episode is neither terminated nor truncated."""
        ...


@dataclass(frozen=True)
class Start:
    """Where an episode begins: an example, or a seed alone. The episodes of a group share it."""

    example: Example | None
    seed: int

    @property
    def name(self) -> str:
        """For messages."""
        return self.example.name if self.example is not None else f"episode with seed {self.seed}"


@dataclass(frozen=True)
class Failure:
    """What comes instead of an observation or a transition from an environment that raised, hung or died.

    what: `raised KeyError: …`, `did not answer for 30 s`, `its process was killed by signal 9`.
    """

    what: str
