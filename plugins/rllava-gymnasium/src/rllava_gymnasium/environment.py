"""Any Gymnasium environment as a task for a vision-language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rllava_core.config import TaskSection
from rllava_core.errors import ConfigError, RllavaError, describe
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_gymnasium.actions import ActionSet
from rllava_gymnasium.config import GymnasiumConfig
from rllava_gymnasium.frames import image_of
from rllava_gymnasium.making import GymEnv, make
from rllava_gymnasium.wording import Wording


class Gymnasium:
    """Shows the rendered frame and the instruction; takes the name of an action.

    Rewards, `terminated` and `truncated` are those of the Gymnasium environment. Every transition has an observation,
    also the last one. Raises ConfigError that names the key for a config that cannot be played; to find that out, the
    constructor resets the environment and renders it once.
    """

    def __init__(self, config: GymnasiumConfig, task: TaskSection) -> None:
        _refuse_what_is_not_read(task)
        self._config = config
        self._environment, self._limit = make(config)
        self._actions = ActionSet.of(self._environment, config)
        self._wording = Wording(config.text, self._actions.names, repeat=task.history != "all")
        self._seed, self._turn = 0, 0
        self._observation: object = None
        self._success: dict[str, bool] = {}
        try:
            self._observation, _ = _reset(self._environment, 0)
            self._image = self._frame()
        except RllavaError:
            raise
        except Exception as error:
            raise ConfigError(f"task.environment: resetting and rendering {config.id!r} {describe(error)}") from error
        if task.dataset is None:  # otherwise its examples may say what the environment does not
            self._wording.check(self._observation)

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        """Begin the episode of a seed. The fields of an example may be named by `text`; it changes nothing else."""
        self._seed, self._turn, self._success = seed, 0, {}
        self._observation, _ = _reset(self._environment, seed)
        self._image = self._frame()
        fields: Mapping[str, Any] = {} if example is None else example.fields
        name = "" if example is None else example.name
        return self._shown(self._wording.begin(self._observation, self._image, fields, name))

    def step(self, action: Action) -> Transition:
        """Carry out the action. A text that names none costs the penalty and a turn; the environment stays as it was.

        info: the plain numbers, texts and truth values of the environment's own, and `success` as the config says.
        """
        number = self._actions.number(action)
        self._turn += 1
        # The environment counts its own steps, which unparsable turns are none of: without this, they would be free.
        out_of_turns = self._limit is not None and self._turn >= self._limit
        if number is None:
            message = self._wording.message(self._observation, self._image)
            penalty = self._config.unparsable_penalty
            return Transition(penalty, self._shown(message), False, out_of_turns, parsed=False, info=self._success)
        self._observation, reward, terminated, truncated, info = self._environment.step(number)
        self._image = self._frame()
        kept = plain(info)
        self._success = self._judged(kept, bool(terminated))
        return Transition(
            reward=float(reward),
            observation=self._shown(self._wording.message(self._observation, self._image)),
            terminated=bool(terminated),
            truncated=bool(truncated) or out_of_turns,
            info={**kept, **self._success},
        )

    def _judged(self, info: dict[str, Any], terminated: bool) -> dict[str, bool]:
        """`success`, where there is something to say about it; taken out of `info`."""
        said = [info.pop(name) for name in ("success", "is_success") if name in info]
        if self._config.success == "terminated":
            return {"success": terminated}
        return {"success": bool(said[0])} if said else {}

    def _frame(self) -> Image:
        source = f"{self._config.id}, seed {self._seed}, turn {self._turn}"
        return image_of(self._environment.render(), self._config.frame_size, source)

    def _shown(self, message: Message) -> Observation:
        return Observation((message,), self._actions.names if self._config.action_format == "choice" else None)


def plain(info: Mapping[str, Any]) -> dict[str, Any]:
    """What people and metrics can read of an info: texts, truth values, finite numbers.

    Arrays and objects are left out; NumPy's scalars become Python's.
    """
    values = {str(key): value.item() if isinstance(value, np.generic) else value for key, value in info.items()}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    }


def _reset(environment: GymEnv, seed: int) -> tuple[Any, dict[str, Any]]:
    try:
        return environment.reset(seed=seed)
    except (ValueError, OverflowError):
        if seed < 2**32:
            raise
        # NumPy's old generators, which some environments use, take 32 bits; the seeds of a run have 63.
        return environment.reset(seed=seed % 2**32)


def _refuse_what_is_not_read(task: TaskSection) -> None:
    """Raises ConfigError for keys that would be carried along to no effect, with what is meant instead."""
    if task.choices is not None:
        raise ConfigError("task.choices: environment 'gymnasium' has its own; name them with task.environment.actions")
    if task.prompt != TaskSection.model_fields["prompt"].default:
        raise ConfigError("task.prompt: environment 'gymnasium' does not read it; write task.environment.text")
