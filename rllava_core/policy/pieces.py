"""Runs of tokens with their images and positions: what the prefixes and branches of a batch are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ContextSegment, Segment
from rllava_core.policy.adapter import Features, ModelAdapter
from rllava_core.policy.checks import check_context
from rllava_core.policy.media import MediaStore

_Run = tuple[tuple[int, ...], tuple[Image, ...]]


@dataclass(frozen=True, eq=False)
class Piece:
    """A run of tokens. Equal if tokens and images are: whoever compares pieces knows that they start at one position.

    images, ends: the content of each image, in order, and where in the run the segment that shows it ends.
    features: of each image, as `MediaStore.shown` has it.
    positions: [axes, T] int64.
    start, next_position: where it starts, and where what follows it does.
    """

    tokens: tuple[int, ...]
    images: tuple[str, ...]
    features: tuple[Features, ...]
    positions: NDArray[np.int64]
    start: int
    next_position: int
    ends: tuple[int, ...] = ()

    def position(self, offset: int) -> int:
        """Position of the token at `offset`: on a segment's border or between text tokens, where all axes agree."""
        return self.next_position if offset >= len(self.tokens) else int(self.positions[:, offset].min())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Piece) and self.tokens == other.tokens and self.images == other.images

    def __hash__(self) -> int:
        return hash((self.tokens, self.images))


class Pieces:
    """Makes pieces, equal ones once: the members of a group repeat each other's prompts and answers.

    Only what was shown is asked of the adapter. What was sampled is text, which counts up on all axes
    (`ModelAdapter.positions`).
    """

    def __init__(self, adapter: ModelAdapter, media: MediaStore) -> None:
        self._adapter = adapter
        self._media = media
        self._known: dict[object, Piece] = {}
        self._counted: dict[tuple[int, int], NDArray[np.int64]] = {}

    @cached_property
    def axes(self) -> int:
        """How many numbers say where a token is."""
        return len(self._adapter.positions(self._adapter.end_of_turn[:1], (), 0))

    def of(self, segments: Sequence[Segment], start: int, name: str, unread: int = 0) -> Piece:
        """Segments one after another, the last `unread` tokens left out, which are an action's. `name`: for messages.

        Raises InvariantError for one that must not be trained on.
        """
        runs = [(segment.tokens, _images(segment)) for segment in segments]
        if unread:
            runs[-1] = (runs[-1][0][:-unread], ())
        key = (start, tuple(runs))
        if key not in self._known:
            self._known[key] = self._made(segments, runs, start, name)
        return self._known[key]

    def text(self, tokens: tuple[int, ...], start: int) -> Piece:
        """Tokens that were sampled, or that could have been."""
        return Piece(tokens, (), (), self._counting(start, len(tokens)), start, start + len(tokens))

    def continued(self, piece: Piece, offset: int, tokens: tuple[int, ...]) -> Piece:
        """The beginning of a piece, up to where a segment begins, and tokens that could have been sampled there."""
        position, kept = piece.position(offset), sum(end <= offset for end in piece.ends)
        return Piece(
            piece.tokens[:offset] + tokens,
            piece.images[:kept],
            piece.features[:kept],
            np.concatenate([piece.positions[:, :offset], self._counting(position, len(tokens))], axis=1),
            piece.start,
            position + len(tokens),
            piece.ends[:kept],
        )

    def padded(self, rows: Sequence[Sequence[Piece]]) -> tuple[Tensor, Tensor, Tensor]:
        """Pieces beside each other in rows: tokens [N, T], mask [N, T], positions [axes, N, T]."""
        tokens = padded([[token for piece in row for token in piece.tokens] for row in rows], self._adapter.pad_token)
        lengths = np.array([sum(len(piece.tokens) for piece in row) for row in rows], dtype=np.int64)
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        positions = np.zeros((self.axes, *tokens.shape), dtype=np.int64)
        placed = [piece.positions for row in rows for piece in row]
        if placed:
            positions[:, mask] = np.concatenate(placed, axis=1)
        return torch.from_numpy(tokens), torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(positions)

    def collated(self, pieces: Iterable[Piece]) -> dict[str, Tensor]:
        """The images of all pieces, in order, as the model's keyword arguments."""
        return self._media.collated([item for piece in pieces for item in piece.features])

    def _made(
        self,
        segments: Sequence[Segment],
        runs: Sequence[tuple[tuple[int, ...], tuple[Image, ...]]],
        start: int,
        name: str,
    ) -> Piece:
        features: list[Features] = []
        positions: list[NDArray[np.int64]] = []
        position, length, ends = start, 0, []
        for segment, (tokens, images) in zip(segments, runs, strict=True):
            length += len(tokens)
            ends += [length] * len(images)
            if isinstance(segment, ContextSegment):
                preprocessed = self._media.features(images)
                check_context(segment, preprocessed, self._adapter, name)
                features += self._media.shown(images)
                positions.append(self._adapter.positions(tokens, preprocessed, position).numpy())
                position = int(positions[-1].max()) + 1
            else:
                positions.append(self._counting(position, len(tokens)))
                position += len(tokens)
        return Piece(
            tuple(chain.from_iterable(tokens for tokens, _ in runs)),
            tuple(image.digest for _, images in runs for image in images),
            tuple(features),
            positions[0] if len(positions) == 1 else np.concatenate(positions, axis=1),
            start,
            position,
            tuple(ends),
        )

    def _counting(self, start: int, count: int) -> NDArray[np.int64]:
        """[axes, count], counting up from `start` on all axes."""
        if (start, count) not in self._counted:
            self._counted[start, count] = np.tile(np.arange(start, start + count, dtype=np.int64), (self.axes, 1))
        return self._counted[start, count]


def padded(rows: Sequence[Sequence[int]], padding: int) -> NDArray[np.int64]:
    """[N, T] rows of different lengths, padded on the right."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    found = np.full((len(rows), lengths.max(initial=0)), padding, dtype=np.int64)
    found[np.arange(found.shape[1]) < lengths[:, None]] = list(chain.from_iterable(rows))
    return found


def _images(segment: Segment) -> tuple[Image, ...]:
    return segment.images if isinstance(segment, ContextSegment) else ()
