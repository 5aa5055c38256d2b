"""What a run computes: how many episodes of which lengths, as trajectories that the policy's own code can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, Turn
from rllava_core.planning.tracing import without_data
from rllava_core.policy.adapter import Features, ModelAdapter
from rllava_core.policy.media import MediaStore


@dataclass(frozen=True)
class Workload:
    """The sizes of a run's episodes.

    prompts: groups sampled a step.
    group_size: episodes of a group.
    image: width and height of each image in pixels; None for text alone.
    images: how many of them a turn shows.
    prompt_tokens: tokens of a turn's text, beside those of its images.
    answer_tokens: tokens of an answer.
    choices: how many choices there are; None for free text.
    turns: of an episode; each shows its images and its text.
    """

    prompts: int
    group_size: int
    image: tuple[int, int] | None
    images: int
    prompt_tokens: int
    answer_tokens: int
    choices: int | None = None
    turns: int = 1

    @property
    def episodes(self) -> int:
        return self.prompts * self.group_size


class PlannedMedia(MediaStore):
    """Features of images of one size: those of one grey image, with zeros for their values.

    bytes: of the features of one. encoded_bytes: of what frozen parts make of it.
    """

    def __init__(self, adapter: ModelAdapter, size: tuple[int, int] | None) -> None:
        super().__init__(adapter)
        self.bytes = self.encoded_bytes = 0
        self._features: Features = {}
        self._shown: Features = {}
        if size is not None:
            width, height = size
            grey = Image.from_array(np.full((height, width), 127, dtype=np.uint8), f"an image of {width}x{height}")
            found = adapter.preprocess(grey)
            self.bytes = sum(values.nbytes for values in found.values())
            self._features = {
                name: without_data(values) if values.is_floating_point() else values for name, values in found.items()
            }
            self._shown = self._features

    @property
    def one(self) -> Features:
        return self._features

    def show_encoded(self, encoded: Features) -> None:
        """From now on batches hold this for each image."""
        self.encode_by(lambda _: encoded)
        self._shown = encoded
        self.encoded_bytes = sum(values.nbytes for values in encoded.values())

    def features(self, images: Sequence[Image]) -> list[Features]:
        return [self._features for _ in images]

    def shown(self, images: Sequence[Image]) -> list[Features]:
        return [self._shown for _ in images]


class Episodes:
    """Writes trajectories of a workload's sizes.

    Prompts and answers differ from each other, as those of a run do; otherwise they would be read once.
    """

    def __init__(self, workload: Workload, adapter: ModelAdapter, media: PlannedMedia) -> None:
        self.workload = workload
        images = workload.images if workload.image is not None else 0
        shown = [_picture(number) for number in range(images)]
        rendered = adapter.render([Message.user(*shown, " ")], [media.one] * images)
        self._shown = rendered
        self._images = images
        forbidden = set(adapter.forbidden_tokens) | {adapter.pad_token, adapter.image_token, *adapter.end_of_turn}
        self._words = [token for token in adapter.encode("abcdefghijklmnop") if token not in forbidden]
        self._end = adapter.end_of_turn[0]
        placeholders = rendered.count(adapter.image_token)
        self.image_tokens = placeholders
        # The template's own words are part of the text's tokens.
        self._more = max(0, workload.prompt_tokens - (len(rendered) - placeholders))

    @property
    def prompt_length(self) -> int:
        """Tokens that one turn shows."""
        return len(self._shown) + self._more

    def context(self, group: int, turn: int = 0) -> ContextSegment:
        number = group * self.workload.turns + turn
        pictures = tuple(_picture(number * self._images + place) for place in range(self._images))
        return ContextSegment((*self._shown, *self._text(number, self._more)), pictures)

    def trajectory(self, group: int, member: int) -> Trajectory:
        workload = self.workload
        number = group * workload.group_size + member
        seen: tuple[Segment, ...] = ()
        turns = []
        for turn in range(workload.turns):
            # A group shares its first prompt; what an environment answers follows from what was said.
            shown = self.context(group) if turn == 0 else self.context(workload.prompts + number, turn)
            action = self._action(number * workload.turns + turn)
            turns.append(Turn((*seen, shown), action))
            seen = (*seen, shown, action)
        return Trajectory(None, group, group, tuple(turns), terminated=True)

    def trajectories(self, groups: int, members: int) -> list[Trajectory]:
        return [self.trajectory(group, member) for group in range(groups) for member in range(members)]

    def _action(self, number: int) -> ActionSegment:
        count = self.workload.choices
        if count is not None:
            choices = tuple((self._words[index % len(self._words)], self._end) for index in range(count))
            return ActionSegment(choices[0], np.zeros(1, np.float32), "", choice=0, choices=choices)
        length = self.workload.answer_tokens
        tokens = (*self._text(number, length - 1), self._end)
        return ActionSegment(tokens, np.zeros(length, np.float32), "")

    def _text(self, number: int, length: int) -> tuple[int, ...]:
        """A text of this many tokens that belongs to a number."""
        digits = []
        for _ in range(length):
            number, digit = divmod(number, len(self._words))
            digits.append(self._words[digit])
        return tuple(digits)


def _picture(number: int) -> Image:
    """An image with a content of its own. Its size is told by its features."""
    pixel = np.array([[[number % 256, number // 256 % 256, number // 65536]]], dtype=np.uint8)
    return Image.from_array(pixel, f"image {number}")
