"""Where environments run: many episodes at once, begun together and acted in together.

`LocalEnvironments` runs them in this process; `WorkerEnvironments` in `workers.py` in processes of their own, where one
that raises, hangs or dies ends its own episode and no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, get_args

import numpy as np

from rllava_core.errors import RllavaError, TrainingError, describe
from rllava_core.mdp.environment import Environment, Failure, Start
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, ImagePart, Message, Observation, Role, TextPart, Transition

_ROLES = get_args(Role)


class EnvironmentPool(Protocol):
    """Environments by the number of their episode.

    What comes back has been checked against the contract, and depends on starts and actions alone: not on where the
    environments run, and not on which is ready first.
    """

    def reset(self, starts: Sequence[Start]) -> list[Observation | Failure]:
        """Begin one episode for each start, numbered in this order; earlier episodes are forgotten.

        Raises the errors of configuration and data (those with exit code 2) that an environment raises here, and what
        goes wrong in making one: a RllavaError as itself, anything else as a TrainingError.
        """
        ...

    def step(self, actions: Mapping[int, Action]) -> dict[int, Transition | Failure]:
        """Act in these running episodes; the answers come in the order of the actions.

        An episode that is terminated, truncated or failed is no longer running. Raises ValueError for one that is not.
        """
        ...

    def close(self) -> None:
        """End what runs. May be called again; the pool is of no use afterwards."""
        ...


class LocalEnvironments:
    """Environments in this process, where the first that misbehaves ends the run.

    Never returns a Failure: `reset` and `step` raise TrainingError that names the episode for what an environment
    raises or wrongly returns. A RllavaError passes as it is.
    """

    def __init__(self, make: Callable[[], Environment]) -> None:
        self._make = make
        self._environments: list[Environment] = []
        self._running: dict[int, Start] = {}

    def reset(self, starts: Sequence[Start]) -> list[Observation | Failure]:
        while len(self._environments) < len(starts):
            self._environments.append(make_environment(self._make))
        self._running = dict(enumerate(starts))
        observations: list[Observation | Failure] = []
        for number, start in enumerate(starts):
            with _playing(start):
                observations.append(begin(self._environments[number], start))
        return observations

    def step(self, actions: Mapping[int, Action]) -> dict[int, Transition | Failure]:
        require_running(actions, self._running)
        transitions: dict[int, Transition | Failure] = {}
        for number, action in actions.items():
            with _playing(self._running[number]):
                transition = act(self._environments[number], action)
            if transition.done:
                del self._running[number]
            transitions[number] = transition
        return transitions

    def close(self) -> None:
        self._environments.clear()
        self._running.clear()


class ContractError(Exception):
    """What an environment returned is not what its contract says: `step() returned a dict; expected a Transition`."""


def make_environment(make: Callable[[], Environment]) -> Environment:
    """A new environment. What it raises becomes a TrainingError, unless it is a message for the user already."""
    try:
        return make()
    except RllavaError:
        raise
    except (Exception, SystemExit) as error:
        raise TrainingError(f"making an environment {describe(error)}") from error


def begin(environment: Environment, start: Start) -> Observation:
    """Reset the environment. Raises ContractError, and whatever its code raises."""
    observation: object = environment.reset(seed=start.seed, example=start.example)
    return _checked_observation(observation, "reset() returned ")


def act(environment: Environment, action: Action) -> Transition:
    """Step the environment; the reward is a float afterwards. Raises ContractError, and whatever its code raises."""
    transition: object = environment.step(action)
    if not isinstance(transition, Transition):
        raise ContractError(f"step() returned {_shown(transition)}; expected a Transition")
    returned = "step() returned a Transition with"
    for name in ("terminated", "truncated", "parsed"):
        value: object = getattr(transition, name)
        # A NumPy bool is refused too: in JSON and in `is True` it is not one.
        _require(isinstance(value, bool), f"{returned} {name}=", value, "True or False")
    _require(_is_finite(transition.reward), f"{returned} reward=", transition.reward, "a finite number")
    info: object = transition.info
    named = isinstance(info, Mapping) and all(isinstance(key, str) for key in info)
    _require(named, f"{returned} info=", info, "a mapping from str, {} for nothing")
    if transition.observation is not None or not transition.terminated:
        # Also of an episode that was cut: the value of where it was left stands for the rest of it.
        _checked_observation(transition.observation, f"{returned} observation=")
    return transition if type(transition.reward) is float else replace(transition, reward=float(transition.reward))


def require_running(asked: Iterable[int], running: Container[int]) -> None:
    """Raises ValueError if an episode that is acted in has ended, failed or never begun."""
    idle = [number for number in asked if number not in running]
    if idle:
        raise ValueError(
            f"step() was called for episode {idle[0]}, which is not running: it has not begun, has ended or has failed"
        )


@contextmanager
def _playing(start: Start) -> Iterator[None]:
    """What an environment's code does wrong becomes an error that names the episode."""
    try:
        yield
    except ContractError as error:
        raise TrainingError(f"{start.name}: the environment's {error}") from None
    except TrainingError as error:
        raise TrainingError(f"{start.name}: {error}") from error
    except RllavaError:
        raise
    except (Exception, SystemExit) as error:
        raise TrainingError(f"{start.name}: the environment {describe(error)}") from error


def _checked_observation(observation: object, what: str) -> Observation:
    if not isinstance(observation, Observation):
        raise ContractError(f"{what}{_shown(observation)}; expected an Observation")
    what = f"{what}an Observation with"
    _check_entries(observation.messages, Message, f"{what} messages=")
    for message in observation.messages:
        _require(message.role in _ROLES, f"{what} a message of the role ", message.role, f"one of {', '.join(_ROLES)}")
        _check_entries(message.parts, TextPart | ImagePart, f"{what} a message of parts=")
        for part in message.parts:
            if isinstance(part, TextPart):
                _require(isinstance(part.text, str), f"{what} a TextPart of ", part.text, "a str")
            else:
                _require(isinstance(part.image, Image), f"{what} an ImagePart of ", part.image, "an Image")
    choices: object = observation.choices
    texts = isinstance(choices, tuple) and choices and all(isinstance(text, str) and text for text in choices)
    _require(choices is None or texts, f"{what} choices=", choices, "None or a tuple of texts that are not ''")
    return observation


def _check_entries(entries: object, kind: Any, what: str) -> None:
    """A tuple of at least one `kind`, a class or a union of classes."""
    good = isinstance(entries, tuple) and entries and all(isinstance(entry, kind) for entry in entries)
    names = " or ".join(entry.__name__ for entry in get_args(kind) or [kind])
    _require(good, what, entries, f"a tuple of at least one {names}")


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float | np.integer | np.floating) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _require(holds: object, what: str, value: object, expected: str) -> None:
    # The value is put into words only for a message: that of an image takes longer than many an environment's step.
    if not holds:
        raise ContractError(f"{what}{_shown(value)}; expected {expected}")


def _shown(value: object) -> str:
    """A value in a message, with its type: `nan (float)`; where it is long, `a dict`."""
    if value is None:
        return "None"
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - somebody else's __repr__; its type says enough
        text = ""
    kind = type(value).__name__
    return f"{text} ({kind})" if 0 < len(text) <= 60 and text.isprintable() else f"a {kind}"
