"""What vLLM is to read: token ids, and the images behind their placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rllava_core.errors import InvariantError
from rllava_core.mdp.trajectory import ContextSegment, Segment
from rllava_core.policy.adapter import Features, ModelAdapter
from rllava_core.policy.media import MediaStore


@dataclass(frozen=True)
class Picture:
    """An image of a prompt.

    digest: its content hash, by which vLLM knows what it has read of it.
    features: what the trainer itself reads, so that both see the same pixels.
    offset, length: where its placeholders stand among the tokens.
    """

    digest: str
    features: Features
    offset: int
    length: int


@dataclass(frozen=True)
class Prompt:
    """tokens: never text, so that nothing is tokenised again; name: for messages."""

    tokens: tuple[int, ...]
    pictures: tuple[Picture, ...]
    name: str

    def followed_by(self, tokens: Sequence[int]) -> Prompt:
        """The same with more tokens behind it, which show no image."""
        return Prompt((*self.tokens, *tokens), self.pictures, self.name)


def prompt_of(context: Sequence[Segment], adapter: ModelAdapter, media: MediaStore, name: str) -> Prompt:
    """A conversation so far. Raises InvariantError where images and placeholders do not fit together."""
    tokens: list[int] = []
    pictures: list[Picture] = []
    for segment in context:
        if isinstance(segment, ContextSegment):
            pictures += _pictures(segment, len(tokens), adapter, media, name)
        tokens += segment.tokens
    return Prompt(tuple(tokens), tuple(pictures), name)


def _pictures(
    segment: ContextSegment, begin: int, adapter: ModelAdapter, media: MediaStore, name: str
) -> list[Picture]:
    found = []
    place = 0
    for image, features in zip(segment.images, media.features(segment.images), strict=True):
        length = adapter.feature_count(features)
        try:
            offset = segment.tokens.index(adapter.image_token, place)
        except ValueError:
            offset = len(segment.tokens)
        place = offset + length
        if segment.tokens[offset:place] != (adapter.image_token,) * length:
            raise InvariantError(
                f"{name}: the {length} placeholders of {image.source} do not stand side by side, and vLLM is told of "
                "an image by where its placeholders begin and how many they are; use engine.rollout: local"
            )
        found.append(Picture(image.digest, features, begin + offset, length))
    if adapter.image_token in segment.tokens[place:]:
        raise InvariantError(f"{name}: more image placeholders than the {len(found)} images have")
    return found
