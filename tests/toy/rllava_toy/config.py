"""Options of the toy components; torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rllava_core.algorithms.config import PolicyGradientConfig
from rllava_core.config import Options


class ToyGradientConfig(PolicyGradientConfig):
    pass


class ColoursConfig(Options):
    """Options of the data set `colours`."""

    count: int = Field(default=40, description="examples in all, every fourth held out")
    images: int = Field(default=1, description="pictures of each example")


class BrokenConfig(Options):
    """Options of the reward `broken`."""

    how: Literal["raises", "nan", "short", "text"] = Field(default="raises", description="how it misbehaves")
    call: int = Field(default=1, description="from which call on")


How = Literal[
    "well",
    "raises",
    "data_error",
    "exits",
    "dies",
    "killed",
    "hangs",
    "spins",
    "wrong_type",
    "nan",
    "no_observation",
    "unsendable",
    "unreadable",
    "differs",
]


class MisbehavingConfig(Options):
    """Options of the environment `misbehaving`; an example's fields `how` and `at` go before them."""

    how: How = Field(default="well", description="how it misbehaves; differs: every process shows something else")
    at: int = Field(default=3, description="in which step, from 1; 0: in the reset; -1: while it is made")
    seeds: tuple[int, ...] | None = Field(default=None, description="in which episodes; null: in all")
    length: int = Field(default=5, description="steps of an episode")
    size: int = Field(default=8, description="of its pictures, in pixels")
