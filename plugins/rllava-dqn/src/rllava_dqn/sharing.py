"""What the states of a replay share is held once, and freed with the last of its holders. No torch.

An image is shown in the state that a turn led to and in the state of the next one, and with the whole history in every
later turn; prompts repeat in every turn, and small worlds come back to the same view. All of them are told by their
content, so that also equal states of different episodes are one object.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ContextSegment, Segment

ENTRY_BYTES = 280
OBJECT_BYTES = 300
MENTION_BYTES = 16
"""What CPython takes, about: for each thing on the shelf; for an image, a segment or an action, beside its content; and
for each mention of one thing in another. A test holds the sum to what is really allocated."""


@dataclass(slots=True, eq=False)
class Held:
    """A value with the number of its holders.

    key: its content, where what it is made of is told by identity.
    parts: what it is made of, which it holds.
    size: bytes, without those of its parts.
    """

    value: Any
    key: Hashable
    parts: tuple[Held, ...]
    size: int
    holders: int = 0


class Shelf:
    """Images, segments and whole contexts, each once. Nothing on it is left without a holder by its user.

    bytes: of everything on it: the pixels of images, 8 for each token id, 16 for each mention of one thing in another,
        and an allowance for the objects themselves.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._held: dict[Hashable, Held] = {}
        # Equal numbers as one object: of a large vocabulary, each takes four times the place that it has in the tuple.
        self._numbers: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    @property
    def images(self) -> list[Image]:
        """In the order in which they came."""
        return [held.value for held in self._held.values() if isinstance(held.value, Image)]

    def context(self, parts: tuple[Held, ...]) -> Held:
        """A context of these segments."""
        return self._find(parts, parts, MENTION_BYTES * len(parts), lambda: tuple(segment.value for segment in parts))

    def segment(self, segment: Segment) -> Held:
        """An equal one; of what was shown without the text, which is for people, who do not read a replay."""
        tokens = self._tokens(segment.tokens)
        if isinstance(segment, ContextSegment):
            images = tuple(self._image(image) for image in segment.images)
            return self._find(
                ("context", tokens, *images),
                (tokens, *images),
                MENTION_BYTES * len(images) + OBJECT_BYTES,
                lambda: ContextSegment(tokens.value, tuple(image.value for image in images)),
            )
        assert segment.choices is not None, "transitions() refuses free text"
        choices = self._choices(segment.choices)
        return self._find(
            ("action", segment.choice, segment.ended, segment.logprobs.tobytes(), tokens, choices),
            (tokens, choices),
            OBJECT_BYTES,
            lambda: segment,
        )

    def hold(self, held: Held) -> Held:
        """One more holder."""
        held.holders += 1
        return held

    def let_go(self, held: Held) -> None:
        """One holder less; what has none left goes, and lets go of its parts."""
        held.holders -= 1
        if held.holders == 0:
            del self._held[held.key]
            self.bytes -= held.size
            for part in held.parts:
                self.let_go(part)

    def _image(self, image: Image) -> Held:
        return self._find(image.digest, (), image.pixels.nbytes + OBJECT_BYTES, lambda: image)

    def _tokens(self, tokens: tuple[int, ...]) -> Held:
        known = self._held.get(("tokens", tokens))
        if known is not None:
            return known
        same = self._numbers.setdefault
        tokens = tuple(map(same, tokens, tokens))
        return self._find(("tokens", tokens), (), 8 * len(tokens), lambda: tokens)

    def _choices(self, choices: tuple[tuple[int, ...], ...]) -> Held:
        parts = tuple(self._tokens(choice) for choice in choices)
        return self._find(
            ("choices", *parts), parts, MENTION_BYTES * len(parts), lambda: tuple(part.value for part in parts)
        )

    def _find(self, key: Hashable, parts: tuple[Held, ...], content: int, make: Callable[[], Any]) -> Held:
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = Held(make(), key, parts, content + ENTRY_BYTES)
            self.bytes += held.size
            for part in parts:
                self.hold(part)
        return held
