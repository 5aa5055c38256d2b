"""Pictures, examples and episodes for tests of rewards, environments and data sets.

Tokens are bytes and no model has seen them: the episodes are for code that reads trajectories, not for a policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message
from rllava_core.mdp.trajectory import (
    ActionSegment,
    ContextSegment,
    Segment,
    Trajectory,
    Truncation,
    Turn,
    conversation,
)

END_OF_TURN = 256
"""The one token that is no byte."""

ANSWERS = ("7", "42", "365")
"""Right answers of the examples: numbers, which rewards of text and of numbers can both judge."""

UNICODE = "Größe: 4½ m² \N{RIGHT-TO-LEFT OVERRIDE}קטן 猫 \N{CAT FACE}\N{ZERO WIDTH JOINER} e\N{COMBINING ACUTE ACCENT}"
LONG = "and so on, " * 2000
NONSENSE = '}]{"<answer>\x00\\boxed{\n%s {question} 1e'

ODD_NUMBERS = ("nan", "inf", "-1e999", "9" * 5000, "1/0", "²", "٣", "0x", "1,2,3", "--5")
"""Answers that look like numbers, of which a careless reader makes an exception or a number that is not finite."""


def picture(number: int = 0, *, width: int = 8, height: int = 8) -> Image:
    """A picture of noise, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.from_array(pixels, f"picture {number}")


def example(number: int = 0) -> Example:
    """A question about one picture, with a right answer."""
    answer = ANSWERS[number % len(ANSWERS)]
    return Example(f"sample:{number}", {"question": f"What is number {number}?"}, (picture(number),), answer)


def examples() -> tuple[Example, ...]:
    """One for each of `ANSWERS`."""
    return tuple(example(number) for number in range(len(ANSWERS)))


def episode(
    example: Example | None,
    *answers: str,
    group: int = 0,
    score: float = 0.0,
    ended: bool = True,
    choices: tuple[str, ...] | None = None,
    info: Mapping[str, Any] | None = None,
) -> Trajectory:
    """An episode with one turn for each answer, in which the environment rewarded nothing.

    score: weighted sum of reward functions, which is then its return.
    ended: off for a last answer that was cut at the token limit.
    choices: what every answer was chosen from; None for free text.
    """
    question = "?" if example is None else str(example.fields.get("question", "?"))
    segments: list[Segment] = []
    for turn, answer in enumerate(answers):
        images = example.images if example is not None and turn == 0 else ()
        segments.append(
            ContextSegment(_tokens(question), tuple(image.load() for image in images), (Message.user(question),))
        )
        segments.append(_action(answer, ended or turn < len(answers) - 1, choices))
    return Trajectory(
        example=example,
        seed=group,
        group=group,
        turns=_with_info(conversation(segments), info or {}),
        terminated=ended,
        truncation=None if ended else "environment",
        score=score,
    )


def answering(
    trajectory: Trajectory, answer: str, *, ended: bool = True, choices: tuple[str, ...] | None = None
) -> Trajectory:
    """The same episode with another last answer. ended: off for an answer that was cut at the token limit."""
    last = replace(trajectory.turns[-1], action=_action(answer, ended, choices))
    truncation: Truncation | None = None if ended else "environment"
    return replace(trajectory, turns=(*trajectory.turns[:-1], last), terminated=ended, truncation=truncation)


def _with_info(turns: tuple[Turn, ...], info: Mapping[str, Any]) -> tuple[Turn, ...]:
    return (*turns[:-1], replace(turns[-1], info=dict(info)))


def _action(text: str, ended: bool, choices: tuple[str, ...] | None) -> ActionSegment:
    if choices is None:
        tokens = (*_tokens(text), *([END_OF_TURN] if ended else []))
        return ActionSegment(tokens, np.full(len(tokens), -0.5, np.float32), text, ended)
    return ActionSegment(
        _tokens(text),
        np.full(1, -np.log(len(choices)), np.float32),
        text,
        choice=choices.index(text),
        choices=tuple(_tokens(choice) for choice in choices),
    )


def _tokens(text: str) -> tuple[int, ...]:
    return tuple(text.encode())
