"""The toy in float64 on one CPU, and trajectories of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from rllava_core.config import TrainingSection
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.local_train import LocalTrainEngine
from rllava_core.engines.protocol import TrainSetup
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, conversation
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Head, Policy
from rllava_core.testing.tiny import END, IMAGE, START, TinyAdapter


class PreciseTinyAdapter(TinyAdapter):
    """The toy in float64."""

    def load(self) -> Any:
        return super().load().double()

    def collate(self, features: Sequence[Any]) -> dict[str, Tensor]:
        return {name: values.double() for name, values in super().collate(features).items()}


class Workbench:
    """Makes policies, engines and trajectories."""

    def forget_the_precision(self) -> None:
        """Accelerate keeps one mixed precision a process."""
        AcceleratorState._reset_state(True)

    def policy(self, seed: int = 0, heads: Mapping[str, Head] | None = None, precise: bool = True) -> Policy:
        torch.manual_seed(seed)
        adapter = (PreciseTinyAdapter if precise else TinyAdapter)(ModelConfig(from_scratch="tiny"))
        policy = Policy(adapter, adapter.load(), heads)
        return policy.double() if precise else policy

    def engine(
        self,
        policy: Policy | None = None,
        copies: Mapping[str, Policy] | None = None,
        config: LocalTrainConfig | None = None,
        **training: Any,
    ) -> LocalTrainEngine:
        policy = policy or self.policy()
        section = TrainingSection(steps=1, **{"max_grad_norm": None, **training})
        setup = TrainSetup(policy, copies or {}, MediaStore(policy.adapter), section)
        return LocalTrainEngine(config or LocalTrainConfig(device="cpu"), setup)

    def picture(self, height: int = 8, width: int = 8, seed: int = 0) -> Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.from_array(pixels)

    def context(self, text: str, image: Image | None = None) -> ContextSegment:
        count = 0 if image is None else image.size[0] * image.size[1] // 16
        tokens = (START, *[IMAGE] * count, *text.encode(), END, START)
        return ContextSegment(tokens, () if image is None else (image,))

    def text(self, answer: str) -> ActionSegment:
        return ActionSegment((*answer.encode(), END), np.full(len(answer) + 1, -4.0, np.float32), answer)

    def choice(self, index: int, *choices: str) -> ActionSegment:
        entries = tuple(tuple(choice.encode()) for choice in choices)
        recorded = np.array([-1.5], np.float32)
        return ActionSegment(entries[index], recorded, choices[index], choice=index, choices=entries)

    def episode(self, group: int, *segments: Segment, score: float = 0.0) -> Trajectory:
        return Trajectory(Example(f"example {group}"), 0, group, conversation(segments), True, score=score)

    def trajectories(self) -> list[Trajectory]:
        """Three groups: text with a picture, choices, and several turns with new pictures."""
        colour, digit = self.context("Colour?", self.picture()), self.context("A digit, which is it?")
        game, shown = self.context("Go", self.picture(12, 8, 1)), self.context("on", self.picture(4, 8, 2))
        digits = "0123456789"
        members: list[tuple[int, tuple[Segment, ...]]] = [
            (0, (colour, self.text("red"))),
            (0, (colour, self.text("dark green"))),
            (0, (colour, self.text("red"))),
            (1, (digit, self.choice(3, *digits))),
            (1, (digit, self.choice(7, *digits))),
            (1, (digit, self.choice(1, "one", "seven", "2"))),
            (2, (game, self.text("left"), shown, self.text("take"))),
            (2, (game, self.choice(1, "left", "right"), shown, self.text(""))),
            (2, (game, self.text("left"), shown, self.choice(0, "u", "d"))),
        ]
        scores = [1.0, 0.0, 0.3, 1.0, 0.0, -0.5, 2.0, 0.1, 0.7]
        return [
            self.episode(group, *segments, score=score)
            for (group, segments), score in zip(members, scores, strict=True)
        ]


@pytest.fixture
def bench() -> Iterator[Workbench]:
    workbench = Workbench()
    workbench.forget_the_precision()
    yield workbench
    workbench.forget_the_precision()
