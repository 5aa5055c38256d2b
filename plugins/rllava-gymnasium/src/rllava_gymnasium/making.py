"""From a config to a Gymnasium environment that renders frames, or to the error that says why there is none."""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

# Frames are rendered, never shown: without these, pygame looks for a display, which servers lack, greets on standard
# output, and swallows SIGTERM, so that `kill` would not end a run. Whoever has set them keeps them.
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")
os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator

from rllava_core.config.problems import did_you_mean
from rllava_core.errors import ConfigError, describe
from rllava_gymnasium.config import GymnasiumConfig
from rllava_gymnasium.finding import registered, wrapper_class

GymEnv = gymnasium.Env[Any, Any]


def make(config: GymnasiumConfig) -> tuple[GymEnv, int | None]:
    """The environment in its wrappers, and the turns after which its episodes are truncated, if it is known.

    Raises ConfigError that names the key, for everything that makes the environment unusable.
    """
    spec = registered(config.id)
    creator = _creator(spec)
    _require_frames(config.id, getattr(creator, "metadata", None))
    environment = _made(spec, creator, config)
    _require_frames(config.id, environment.metadata)
    for index, entry in enumerate(config.wrappers):
        where = f"task.environment.wrappers.{index}"
        wrapper = wrapper_class(entry.wrapper, where)
        try:
            environment = wrapper(environment, **copy.deepcopy(entry.arguments))
        except Exception as error:
            refused = _refused_argument(error, wrapper, entry.arguments)
            what = f".{refused}" if refused else f": {entry.wrapper!r} around {config.id!r} {describe(error)}"
            raise ConfigError(f"{where}{what}") from error
    if environment.render_mode != "rgb_array":
        raise ConfigError(
            f"task.environment: {config.id!r} was asked for frames (rgb_array), but its render mode is "
            f"{environment.render_mode!r}"
        )
    return environment, spec.max_episode_steps if config.turn_limit is None else config.turn_limit


def _creator(spec: EnvSpec) -> Any:
    """The class or function that makes the environment, imported."""
    if not isinstance(spec.entry_point, str):
        return spec.entry_point
    try:
        return load_env_creator(spec.entry_point)
    except Exception as error:
        raise ConfigError(f"task.environment.id: importing what {spec.id!r} needs {describe(error)}") from error


def _require_frames(identifier: str, metadata: object) -> None:
    """Raises ConfigError where an environment says that it renders something, but not rgb_array."""
    if not isinstance(metadata, Mapping):  # a function that makes environments has none
        return
    modes = list(metadata.get("render_modes") or ())
    if "rgb_array" not in modes:
        raise ConfigError(
            f"task.environment.id: {identifier!r} does not render rgb_array, so there is no frame to show (it renders "
            f"{', '.join(map(str, modes)) or 'nothing'})"
        )


def _made(spec: EnvSpec, creator: Any, config: GymnasiumConfig) -> GymEnv:
    try:
        return gymnasium.make(
            spec,
            max_episode_steps=config.turn_limit,
            # It warns about matters of taste, on every worker's standard error.
            disable_env_checker=True,
            render_mode="rgb_array",
            # Some environments work on the lists that they are given.
            **copy.deepcopy(config.kwargs),
        )
    except Exception as error:
        refused = _refused_argument(error, creator, config.kwargs)
        if refused:
            raise ConfigError(f"task.environment.kwargs.{refused}") from error
        raise ConfigError(f"task.environment: making {config.id!r} {describe(error)}{_given(config.kwargs)}") from error


def _given(arguments: Mapping[str, Any]) -> str:
    return f", with the kwargs {dict(arguments)!r}" if arguments else ""


def _refused_argument(error: Exception, creator: Any, given: Mapping[str, Any]) -> str | None:
    """`name: unknown …` where the error says that an argument of the config is not one; None for other errors."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
    if match is None or match[1] not in given:
        return None
    known = _arguments_of(creator)
    hint = f" (known: {', '.join(known)})" if known else ""
    return f"{match[1]}: {creator.__name__} takes no such argument{did_you_mean(match[1], known)}{hint}"


def _arguments_of(creator: Any) -> list[str]:
    """Names of the keyword arguments, those of the base classes included, to which `**kwargs` hands them on."""
    functions = [vars(base).get("__init__") for base in creator.__mro__] if isinstance(creator, type) else [creator]
    names: dict[str, None] = {}
    for function in functions:
        if not inspect.isfunction(function):
            continue
        parameters = list(inspect.signature(function).parameters.values())
        names |= {one.name: None for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)}
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):
            break
    return [name for name in names if name not in ("self", "env", "render_mode")]
