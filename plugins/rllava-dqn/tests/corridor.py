"""A corridor of five places, seen as a picture that shows where one is; at its end there is a reward.

The tests of training install it as a plugin of its own, `rllava-corridor`, with the tiny model as `tiny`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rllava_core import ComponentSpec, hookimpl
from rllava_core.config import Options, TaskSection
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition

LENGTH = 5


@hookimpl
def rllava_models() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="tiny",
            summary="A model of a few thousand parameters.",
            target="rllava_core.testing.tiny:TinyAdapter",
            config="rllava_core.policy.config:ModelConfig",
            provides=frozenset({"heads"}),
        )
    ]


@hookimpl
def rllava_environments() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="corridor",
            summary="Walk to its end.",
            target="rllava_corridor:Corridor",
            provides=frozenset({"choices"}),
        )
    ]


class Corridor:
    def __init__(self, config: Options, task: TaskSection) -> None:
        self.place = 0

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        self.place = seed % 2
        return self._seen()

    def step(self, action: Action) -> Transition:
        self.place = max(0, self.place + (1 if action.text == "on" else -1))
        there = self.place == LENGTH - 1
        return Transition(float(there), self._seen(), terminated=there)

    def _seen(self) -> Observation:
        pixels: Any = np.zeros((4, 4 * LENGTH, 3), np.uint8)
        pixels[:, 4 * self.place : 4 * self.place + 4] = 255
        return Observation((Message.user(Image.from_array(pixels)),), choices=("back", "on"))
