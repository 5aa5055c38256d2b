"""The options of the environment. Imports neither gymnasium nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rllava_core.config import Options

DEFAULT_TEXT = "{instruction}"

RESERVED: Mapping[str, str] = {
    "id": "it is an option of its own",
    "render_mode": "frames are always rendered as rgb_array",
    "max_episode_steps": "write turn_limit beside kwargs instead",
    "disable_env_checker": "the environment is made without gymnasium's checker",
}
"""Arguments of `gymnasium.make` that `kwargs` may not hold, and why."""

LARGEST_SIDE = 4096
"""Pixels; no vision tower reads more, and a slip of the finger should not fill the memory."""


class Wrapper(BaseModel):
    """One entry of `wrappers`, written as `module:Class` or as `{wrapper: module:Class, argument: value, …}`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    wrapper: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="`module:Class` of a gymnasium.Wrapper")

    @model_validator(mode="before")
    @classmethod
    def _accept_a_bare_name(cls, value: Any) -> Any:
        return {"wrapper": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the class beside the environment that it wraps."""
        return dict(self.model_extra or {})


class GymnasiumConfig(Options):
    """`task: {environment: {name: gymnasium, …}}`"""

    id: str = Field(
        min_length=1,
        description="of the environment, with its version; `module:Id` imports a module that registers it",
    )
    kwargs: dict[str, Any] = Field(default={}, description="arguments of the environment, for gymnasium.make")
    wrappers: tuple[Wrapper, ...] = Field(
        default=(),
        description="wrappers of gymnasium, innermost first: `module:Class`, or {wrapper: `module:Class`, argument: …}",
    )
    frame_size: tuple[int, int] | None = Field(
        default=None,
        description="what frames are resized to: [width, height] in pixels, or one number for a square; null: as "
        "rendered",
    )
    turn_limit: int | None = Field(
        default=None,
        ge=1,
        description="turns after which an episode is truncated, in place of the limit that the environment is "
        "registered with; null: that one",
    )
    actions: tuple[str, ...] | dict[str, int] | None = Field(
        default=None,
        description="a name for each action, in order; or a mapping of names to action numbers, which may offer only "
        "some; null: the environment's own names, or the numbers",
    )
    action_format: Literal["choice", "text"] = Field(
        default="choice",
        description="choice: the policy picks a name; text: it writes one, and anything else is unparsable",
    )
    unparsable_penalty: float = Field(
        default=-0.1,
        le=0,
        allow_inf_nan=False,
        description="reward of a text that names no action; the environment does not move then",
    )
    text: str = Field(
        default=DEFAULT_TEXT,
        description="what is shown beside the frame: {instruction} is the text of the environment's observation, "
        "{actions} the names, {image} the place of the frame (otherwise it comes first); other fields are the texts of "
        "the observation, by their keys, and the fields of an example",
    )
    success: Literal["auto", "terminated"] = Field(
        default="auto",
        description="auto: what the environment's info says as `success` or `is_success`, if anything; terminated: an "
        "episode that terminates has succeeded",
    )

    @field_validator("kwargs")
    @classmethod
    def _no_reserved_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value.keys() & RESERVED.keys():
            raise ValueError(f"cannot hold {name!r}: {RESERVED[name]}")
        return value

    @field_validator("frame_size", mode="before")
    @classmethod
    def _one_number_is_a_square(cls, value: Any) -> Any:
        sides = [value, value] if isinstance(value, int) else value
        if sides is None:
            return None
        if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(map(_is_a_side, sides)):
            raise ValueError(
                f"expected a number of pixels from 1 to {LARGEST_SIDE}, [width, height] of such numbers, or null"
            )
        return tuple(sides)

    @field_validator("actions", mode="before")
    @classmethod
    def _names_of_actions(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, (list, tuple, dict)):
            raise ValueError("expected a list of names, or a mapping of names to action numbers")
        names = [_as_text(name) for name in value]
        same = [normalised(name) for name in names]
        if len(names) < 2 or "" in same or len(set(same)) < len(same):
            raise ValueError("needs at least two names that differ in more than case, white space and a full stop")
        if not isinstance(value, dict):
            return tuple(names)
        numbers = list(value.values())
        if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
            raise ValueError("expected a whole number after each name: the environment's number of the action")
        if len(set(numbers)) < len(numbers):
            raise ValueError("gives two names to one action")
        return dict(zip(names, numbers, strict=True))


def normalised(text: str) -> str:
    """A name or an answer as it is compared: without case, surrounding white space and one full stop at the end."""
    return text.strip().removesuffix(".").strip().casefold()


def _is_a_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_SIDE


def _as_text(name: Any) -> str:
    if isinstance(name, bool):
        raise ValueError(f"YAML reads yes, no, on, off, true and false as {name}; put the names in quotes")
    if not isinstance(name, (str, int, float)):
        raise ValueError(f"expected names, found {name!r}")
    return str(name)
