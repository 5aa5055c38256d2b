"""The conversation: messages of text and images; what the environment shows and what the policy does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rllava_core.mdp.images import Image

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class ImagePart:
    image: Image


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Message:
    """One turn of one speaker: text and images in the order in which they are read."""

    role: Role
    parts: tuple[Part, ...]

    @classmethod
    def user(cls, *parts: str | Image) -> Message:
        """A user message; strings become text parts, images image parts."""
        return cls("user", tuple(TextPart(part) if isinstance(part, str) else ImagePart(part) for part in parts))


@dataclass(frozen=True)
class Observation:
    """What the environment adds to the conversation.

    choices: the discrete action set, or None where the action is free text. It may differ from turn to turn.
    """

    messages: tuple[Message, ...]
    choices: tuple[str, ...] | None = None

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of all messages, in reading order."""
        return tuple(part.image for message in self.messages for part in message.parts if isinstance(part, ImagePart))


@dataclass(frozen=True)
class Action:
    """What the policy did.

    text: the decoded tokens without the end-of-turn token, or the chosen entry of `choices`.
    choice: index into the observation's `choices`; None for free text.
    ended: the policy ended its turn itself; False where it was cut at the token limit.
    """

    text: str
    choice: int | None = None
    ended: bool = True


@dataclass(frozen=True)
class Transition:
    """What the environment answers; the words have Gymnasium's meaning.

    terminated: the episode reached a terminal state of the task.
    truncated: the episode was cut from outside (a limit of time or turns); its future would have had value.
    observation: the next observation. A truncated episode has one too, for the value of the state that it was left
        in; when the episode is terminated, it may be None, and is only shown to people.
    parsed: whether the environment could make sense of the action; where it could not, `reward` is the penalty that
        it declares for that.
    info: for metrics and for people; `info["success"]`, where present, says whether the episode succeeded.
    """

    reward: float
    observation: Observation | None
    terminated: bool
    truncated: bool = False
    parsed: bool = True
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated
