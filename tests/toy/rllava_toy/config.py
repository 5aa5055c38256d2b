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
