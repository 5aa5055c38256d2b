"""The actions of an environment by name, and what a policy's answer means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import gymnasium

from rllava_core.errors import ConfigError
from rllava_core.mdp.messages import Action
from rllava_gymnasium.config import GymnasiumConfig, normalised


@dataclass(frozen=True)
class ActionSet:
    """What is offered to the policy.

    numbers: the environment's action numbers by name, in the order in which they are offered.
    """

    numbers: Mapping[str, int]

    @classmethod
    def of(cls, environment: gymnasium.Env[Any, Any], config: GymnasiumConfig) -> ActionSet:
        """Raises ConfigError for an action space that is not discrete, and for names that do not fit it."""
        space = environment.action_space
        if not isinstance(space, gymnasium.spaces.Discrete):
            raise ConfigError(
                f"task.environment.id: the action space of {config.id!r} is {_described(space)}; supported is "
                "Discrete, into which a wrapper listed under task.environment.wrappers may turn it"
            )
        first, count = int(space.start), int(space.n)
        if count < 2:
            raise ConfigError(f"task.environment.id: {config.id!r} has a single action, so there is nothing to choose")
        existing = range(first, first + count)
        if isinstance(config.actions, Mapping):
            for name, number in config.actions.items():
                if number not in existing:
                    raise ConfigError(
                        f"task.environment.actions.{name}: {config.id!r} has no action {number}; its actions are "
                        f"{first} to {existing[-1]}"
                    )
            return cls(dict(config.actions))
        names = config.actions or _own_names(environment, existing)
        if len(names) != count:
            raise ConfigError(
                f"task.environment.actions: {len(names)} names, but {config.id!r} has {count} actions, {first} to "
                f"{existing[-1]}; name each in order, or offer some of them as a mapping of names to numbers"
            )
        return cls(dict(zip(names, existing, strict=True)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.numbers)

    def number(self, action: Action) -> int | None:
        """The environment's number of a choice or of the action that a text names; None for a text that names none."""
        if action.choice is not None:
            return self.numbers[self.names[action.choice]]
        said = normalised(action.text)
        return next((number for name, number in self.numbers.items() if normalised(name) == said), None)


def _own_names(environment: gymnasium.Env[Any, Any], existing: range) -> tuple[str, ...]:
    """Many environments list their actions in an IntEnum `actions`; it does not count where a wrapper offers others."""
    enum = getattr(environment.unwrapped, "actions", None)
    if isinstance(enum, type) and issubclass(enum, IntEnum) and sorted(enum) == list(existing):
        return tuple(member.name for member in sorted(enum))
    return tuple(map(str, existing))


def _described(space: gymnasium.Space[Any]) -> str:
    kind = " (continuous)" if isinstance(space, gymnasium.spaces.Box) else ""
    return f"{' '.join(str(space).split())}{kind}"
