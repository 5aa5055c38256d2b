"""Toy data, rewards and an environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rllava_core.config import Options, TaskSection
from rllava_core.mdp.examples import Example, Split
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_core.mdp.trajectory import Trajectory
from rllava_toy.config import BrokenConfig, ColoursConfig

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 200)}


class Colours:
    """Noisy patches of one colour, 8×8 or 12×8 pixels; the answer is the colour's name."""

    def __init__(self, config: ColoursConfig) -> None:
        generator = np.random.default_rng(0)
        self._examples = []
        for number in range(config.count):
            name = list(COLOURS)[number % 3]
            images = []
            for _ in range(config.images):
                shape = (8, 12 if number % 2 else 8, 3)
                noise = generator.integers(-30, 30, shape)
                images.append(Image.from_array((np.array(COLOURS[name]) + noise).astype(np.uint8), f"colour {number}"))
            self._examples.append(Example(f"colours:{number}", {"question": "Colour?"}, tuple(images), name))

    def examples(self, split: Split) -> Sequence[Example]:
        return [item for number, item in enumerate(self._examples) if (number % 4 == 0) == (split == "held_out")]


class Match:
    def __init__(self, config: Options) -> None:
        pass

    def __call__(self, trajectories: Sequence[Trajectory], /) -> list[float]:
        return [float(item.example is not None and item.answer == item.example.answer) for item in trajectories]


class Broken:
    """Right until call number `call`, then not."""

    def __init__(self, config: BrokenConfig) -> None:
        self.config = config
        self.calls = 0

    def __call__(self, trajectories: Sequence[Trajectory], /) -> Sequence[Any]:
        self.calls += 1
        good: list[Any] = [0.5] * len(trajectories)
        if self.calls < self.config.call:
            return good
        match self.config.how:
            case "raises":
                raise KeyError("nothing here")
            case "nan":
                return [float("nan"), *good[1:]]
            case "short":
                return good[1:]
            case "text":
                return ["good", *good[1:]]


class Brightness:
    """Needs no examples: a grey picture made from the seed; say whether it is dark or bright."""

    def __init__(self, config: Options, task: TaskSection) -> None:
        self.bright = False

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        generator = np.random.default_rng(seed)
        self.bright = bool(generator.integers(2))
        level = generator.integers(150, 250) if self.bright else generator.integers(0, 100)
        image = Image.from_array(np.full((8, 8), level, np.uint8))
        return Observation((Message.user(image, "?"),), ("dark", "bright"))

    def step(self, action: Action) -> Transition:
        right = action.text == ("bright" if self.bright else "dark")
        return Transition(1.0 if right else -1.0, None, terminated=True, info={"success": right})
