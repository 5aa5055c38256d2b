"""The text beside a frame: filled in from what the environment says, and shown again only where that helps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rllava_core.errors import ConfigError, DataError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message, TextPart
from rllava_core.mdp.single_turn import fill
from rllava_gymnasium.config import DEFAULT_TEXT

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")  # as `fill` reads it


class Wording:
    """Makes the user message of each turn of one episode after the other.

    template: see `GymnasiumConfig.text`.
    actions: names of the actions.
    repeat: show the text in every turn; otherwise only in the first one and where it has changed since, because the
        policy sees the turns before.
    """

    def __init__(self, template: str, actions: Sequence[str], repeat: bool) -> None:
        self.template = template
        self.repeat = repeat
        self._actions = ", ".join(actions)
        self._named = [match[1] for match in _PLACEHOLDER.finditer(template) if match[1] is not None]
        self._example: Mapping[str, Any] = {}
        self._shown: object = None

    def check(self, observation: object) -> None:
        """Raises ConfigError for a template that no observation like this one can fill."""
        unknown = self._unknown(self._fields(observation))
        if unknown:
            known = ", ".join(f"{{{name}}}" for name in (*self._fields(observation), "image"))
            raise ConfigError(
                f"task.environment.text: names {{{unknown[0]}}}, which this environment does not say; it may name: "
                f"{known}"
            )
        if self._named.count("image") > 1:
            raise ConfigError("task.environment.text: names {image} more than once, but a turn has one frame")

    def begin(self, observation: object, image: Image, example: Mapping[str, Any], name: str) -> Message:
        """The first message of an episode. Raises DataError for a field that neither it nor the example has.

        example: fields of the example that the episode is about, and its name, for messages.
        """
        self._example, self._shown = example, None
        fields = self._fields(observation)
        unknown = self._unknown(fields)
        if unknown:
            raise DataError(
                f"{name}: task.environment.text names {{{unknown[0]}}}; environment and example have: "
                f"{', '.join(sorted(fields))}"
            )
        return self.message(observation, image)

    def message(self, observation: object, image: Image) -> Message:
        """A later message of the episode."""
        # What an environment says only in some turns is empty in the others.
        fields = dict.fromkeys(self._named, "") | self._fields(observation)
        parts = fill(self.template, fields, [image], where=image.source)
        text = [part for part in parts if isinstance(part, TextPart)]
        if text == self._shown and not self.repeat:
            return Message("user", (ImagePart(image),))
        self._shown = text
        return Message("user", parts)

    def _fields(self, observation: object) -> dict[str, Any]:
        own = texts_of(observation)
        fields = {**self._example, "actions": self._actions, **own}
        if self.template == DEFAULT_TEXT:  # nobody asked for it, so it need not be there
            fields.setdefault("instruction", "")
        return fields

    def _unknown(self, fields: Mapping[str, Any]) -> list[str]:
        return [name for name in self._named if name != "image" and name not in fields]


def texts_of(observation: object) -> dict[str, str]:
    """The texts of an observation by their keys, and as `instruction` all of them, a line each.

    An observation that is a text is the instruction itself; one without any text has no fields.
    """
    if isinstance(observation, str):
        return {"instruction": str(observation)}
    if not isinstance(observation, Mapping):
        return {}
    own = {str(key): str(value) for key, value in observation.items() if isinstance(value, str)}
    return {"instruction": "\n".join(own.values()), **own} if own else {}
