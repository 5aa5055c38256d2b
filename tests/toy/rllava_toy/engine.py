"""An engine with a model of its own: it looks at the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rllava_core.config import Options
from rllava_core.engines.protocol import AnswerSetup
from rllava_core.mdp.messages import ImagePart
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment
from rllava_core.policy.sampling import Request
from rllava_toy.task import COLOURS

NOTHING = np.zeros(0, np.float32)


class Oracle:
    """Names the colour of the last picture of a conversation, as it is in its messages."""

    def __init__(self, config: Options, setup: AnswerSetup) -> None:
        assert setup.temperature > 0

    def generate(self, requests: Sequence[Request], seed: int | None, behaviour: Any = None) -> list[Any]:
        return [[self._answer(request)] * request.count for request in requests]

    def forget(self) -> None:
        return

    def _answer(self, request: Request) -> ActionSegment:
        last = request.context[-1]
        assert isinstance(last, ContextSegment)
        assert not last.tokens
        [*_, picture] = [
            part.image for message in last.messages for part in message.parts if isinstance(part, ImagePart)
        ]
        mean = picture.pixels.mean(axis=(0, 1))
        colour = min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))
        if request.choices is None:
            return ActionSegment((), NOTHING, colour)
        index = request.choice_texts.index(colour)
        return ActionSegment(request.choices[index], NOTHING, colour, choice=index, choices=request.choices)
