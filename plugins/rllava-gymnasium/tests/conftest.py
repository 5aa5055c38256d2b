"""Environments made here and there: by the component's config, and small ones that misbehave in one way each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rllava_core.config import TaskSection
from rllava_core.mdp.messages import TextPart
from rllava_gymnasium.config import GymnasiumConfig
from rllava_gymnasium.environment import Gymnasium


class Dial(gymnasium.Env[Any, Any]):
    """A bar that is as long as the number of steps so far; ends after five. What it does can be set from outside."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}

    def __init__(self, render_mode: str | None = None, **settings: Any) -> None:
        self.render_mode = render_mode
        self.settings = settings
        self.action_space = settings.get("action_space", spaces.Discrete(3))
        self.observation_space = spaces.Discrete(100)
        self.actions = settings.get("actions")
        self.taken: list[int] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None and seed >= self.settings.get("seeds", 2**63):
            raise ValueError("Seed must be between 0 and 2**32 - 1")
        self.seed = seed
        self.taken = []
        return self._said(), {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.taken.append(action)
        done = len(self.taken) >= self.settings.get("length", 5)
        return self._said(), np.float32(0.5), np.bool_(done), False, dict(self.settings.get("info", {}))

    def render(self) -> Any:
        if "frame" in self.settings:
            return self.settings["frame"]
        pixels = np.zeros((8, 16, 3), np.uint8)
        pixels[:, : len(self.taken)] = 255
        return pixels

    def _said(self) -> Any:
        says = self.settings.get("says", 0)
        return says[min(len(self.taken), len(says) - 1)] if isinstance(says, list) else says


Make = Callable[..., Gymnasium]


@pytest.fixture
def make() -> Make:
    """`make("FrozenLake-v1", task={…}, option=value, …)`"""

    def make(id: str, task: dict[str, Any] | None = None, **options: Any) -> Gymnasium:
        return Gymnasium(GymnasiumConfig(id=id, **options), TaskSection.model_validate(task or {}))

    return make


@pytest.fixture
def dial() -> Iterator[Callable[..., str]]:
    """Registers a Dial with the settings and returns its id; `entry_point` and `limit` are for Gymnasium."""
    ids: list[str] = []

    def register(entry_point: Any = Dial, limit: int | None = None, **settings: Any) -> str:
        ids.append(f"Dial{len(ids)}-v0")
        gymnasium.register(ids[-1], entry_point=entry_point, max_episode_steps=limit, kwargs=settings)
        return ids[-1]

    yield register
    for identifier in ids:
        del gymnasium.registry[identifier]


@pytest.fixture
def texts() -> Callable[..., list[str]]:
    """The text parts of an observation."""

    def of(observation: Any) -> list[str]:
        return [part.text for message in observation.messages for part in message.parts if isinstance(part, TextPart)]

    return of
