"""One question, one answer: visual question answering as a one-step environment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel

from rllava_core.errors import DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, ImagePart, Message, Observation, Part, TextPart, Transition


class Task(Protocol):
    """What this environment reads of the config's task section."""

    @property
    def prompt(self) -> str: ...

    @property
    def choices(self) -> tuple[str, ...] | None: ...


class SingleTurn:
    """Shows an example's images and question, takes one answer, and ends. Reward functions judge the answer."""

    def __init__(self, config: BaseModel, task: Task) -> None:
        self.prompt = task.prompt
        self.choices = task.choices

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        """The example as one user message. Raises DataError if the prompt names a field that the example lacks."""
        if example is None:
            raise DataError("environment 'single_turn' needs examples: set task.dataset")
        images = [source.load() for source in example.images]
        choices = self.choices if example.choices is None else example.choices
        message = Message("user", fill(self.prompt, example.fields, images, where=example.name))
        return Observation((message,), choices)

    def step(self, action: Action) -> Transition:
        return Transition(reward=0.0, observation=None, terminated=True)


_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def fill(
    template: str, fields: Mapping[str, Any], images: Sequence[Image], where: str, template_name: str = "task.prompt"
) -> tuple[Part, ...]:
    """A prompt template with `{field}` replaced by the example's value and `{image}` by its next image.

    Without `{image}`, all images come first. Raises DataError for an unknown field or a wrong number of `{image}`.

    where, template_name: the example and the template, for messages.
    """
    slots = sum(1 for match in _PLACEHOLDER.finditer(template) if match[1] == "image")
    if slots not in (0, len(images)):
        raise DataError(
            f"{where}: {template_name} has {slots} {{image}} placeholders, the example has {len(images)} images"
        )
    parts: list[Part] = [] if slots else [ImagePart(image) for image in images]
    waiting = iter(images)
    text, end = "", 0
    for match in _PLACEHOLDER.finditer(template):
        text += template[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            text += match[0][0]
        elif match[1] == "image":
            parts += [*_text(text), ImagePart(next(waiting))]
            text = ""
        elif match[1] in fields:
            text += str(fields[match[1]])
        else:
            known = ", ".join(sorted(fields)) or "none"
            raise DataError(f"{where}: {template_name} names {{{match[1]}}}, the example has the fields: {known}")
    return (*parts, *_text(text + template[end:]))


def _text(text: str) -> list[Part]:
    return [TextPart(text)] if text else []
