"""The contract of an environment: `reset` and `step`, with Gymnasium's meaning."""

from __future__ import annotations

from typing import Protocol

from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action, Observation, Transition


class Environment(Protocol):
    """One episode at a time. The target of an `environment` component, called with its config and the task section.

    The policy sees the observations as user turns of one conversation; its actions are the assistant's turns.
    """

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        """Begin an episode. The same seed and example give the same episode; a group shares both.

        example: an entry of the task's data set; None for an environment that makes its own tasks from the seed.
        """
        ...

    def step(self, action: Action) -> Transition:
        """Carry out the action. Called only while the episode is neither terminated nor truncated."""
        ...
