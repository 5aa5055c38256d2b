"""Options of the toy components; torch-free."""

from __future__ import annotations

from typing import Literal

from rllava_core.algorithms.config import PolicyGradientConfig
from rllava_core.config import Options


class ToyGradientConfig(PolicyGradientConfig):
    pass


class ColoursConfig(Options):
    """count: examples in all, every fourth held out. images: pictures of each example."""

    count: int = 40
    images: int = 1


class BrokenConfig(Options):
    """How the reward misbehaves, and on which call."""

    how: Literal["raises", "nan", "short", "text"] = "raises"
    call: int = 1
