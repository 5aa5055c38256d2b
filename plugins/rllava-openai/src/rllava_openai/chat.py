"""Conversations as an endpoint takes them: messages of text and of images, which are sent without loss."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message, TextPart
from rllava_core.mdp.trajectory import ContextSegment, Segment

Detail = str | None


def conversation(context: Sequence[Segment]) -> tuple[Message, ...]:
    """The messages of a context; what the policy did is what the assistant said."""
    messages: list[Message] = []
    for segment in context:
        if isinstance(segment, ContextSegment):
            messages += segment.messages
        else:
            messages.append(Message("assistant", (TextPart(segment.text),)))
    return tuple(messages)


def as_sent(messages: Sequence[Message], detail: Detail = None) -> list[dict[str, Any]]:
    """The `messages` of a request, images as PNG data URLs."""
    return _chat(messages, data_url, detail)


def as_known(messages: Sequence[Message], detail: Detail = None) -> list[dict[str, Any]]:
    """The same with the digest of each image in its place: what a request is looked up by."""
    return _chat(messages, lambda image: f"sha256:{image.digest}", detail)


def data_url(image: Image) -> str:
    """A PNG, which holds the pixels bit by bit."""
    buffer = io.BytesIO()
    image.to_pil().save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _chat(messages: Sequence[Message], show: Callable[[Image], str], detail: Detail) -> list[dict[str, Any]]:
    return [{"role": _role(message), "content": _content(message, show, detail)} for message in messages]


def _role(message: Message) -> str:
    # A message of an endpoint's tool answers a call of it, and there are no such calls here: environments read text.
    return "user" if message.role == "tool" else message.role


def _content(message: Message, show: Callable[[Image], str], detail: Detail) -> str | list[dict[str, Any]]:
    """One text where there are no images, as some servers want it; parts in reading order otherwise."""
    if not any(isinstance(part, ImagePart) for part in message.parts):
        return "".join(part.text for part in message.parts if isinstance(part, TextPart))
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
        else:
            source = {"url": show(part.image)} | ({} if detail is None else {"detail": detail})
            content.append({"type": "image_url", "image_url": source})
    return content
