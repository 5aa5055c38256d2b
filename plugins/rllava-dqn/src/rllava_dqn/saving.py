"""A replay as tensors: each thing that its transitions share once, and no Python list with an entry a transition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment
from rllava_dqn.replay import Record, Replay
from rllava_dqn.sharing import Held

NONE = -1


def replay_state(replay: Replay) -> dict[str, Any]:
    """Everything that `restore_replay` needs. Things have numbers, and those that are made of others name these."""
    records = replay.records
    contexts = _Numbered(held for record in records for held in (record.context, record.final) if held is not None)
    segments = _Numbered(chain((part for held in contexts for part in held.parts), (r.action for r in records)))
    shown = [held for held in segments if isinstance(held.value, ContextSegment)]
    done = [held for held in segments if isinstance(held.value, ActionSegment)]
    segments = _Numbered([*shown, *done])
    # Pictures of one size are one tensor, so they are numbered size by size.
    sizes = _by_size(part for held in shown for part in held.parts[1:])
    images = _Numbered(chain.from_iterable(sizes))
    choices = _Numbered(held.parts[1] for held in done)
    tokens = _Numbered(chain((held.parts[0] for held in segments), (part for held in choices for part in held.parts)))
    return {
        "first": replay.first,
        "greatest": replay.greatest,
        "transitions": {
            "context": _array(contexts[record.context] for record in records),
            "action": _array(segments[record.action] for record in records),
            "final": _array(NONE if record.final is None else contexts[record.final] for record in records),
            "reward": _array((record.reward for record in records), np.float64),
            "discount": _array((record.discount for record in records), np.float64),
            "seed": _array(record.seed for record in records),
            "priority": torch.from_numpy(replay.priorities),
        },
        "contexts": _ragged([[segments[part] for part in held.parts] for held in contexts]),
        "segments": {
            "tokens": _array(tokens[held.parts[0]] for held in segments),
            "images": _ragged([[images[part] for part in held.parts[1:]] for held in shown]),
            "choices": _array(choices[held.parts[1]] for held in done),
            "choice": _array(held.value.choice for held in done),
            "ended": _array(held.value.ended for held in done),
            "logprobs": _ragged([held.value.logprobs.tolist() for held in done], np.float32),
        },
        "choices": _ragged([[tokens[part] for part in held.parts] for held in choices]),
        "tokens": _ragged([held.value for held in tokens]),
        "images": [torch.from_numpy(np.stack([held.value.pixels for held in same])) for same in sizes],
    }


def restore_replay(replay: Replay, state: Mapping[str, Any]) -> None:
    """Fill an empty replay with what `replay_state` returned; the oldest stay out where its limits are narrower."""
    tokens = _rows(state["tokens"])
    choices = [tuple(tokens[number] for number in row) for row in _rows(state["choices"])]
    # Copies: a view would keep all pictures of its size in memory for as long as one of them is needed.
    images = [_image(pixels.copy()) for same in state["images"] for pixels in same.numpy()]
    parts = state["segments"]
    segment_tokens = [tokens[number] for number in parts["tokens"].tolist()]
    shown = [
        ContextSegment(ids, tuple(images[number] for number in row))
        for ids, row in zip(segment_tokens, _rows(parts["images"]), strict=False)
    ]
    done = [
        ActionSegment(ids, np.array(logprobs, np.float32), "", bool(ended), choice, choices[offered])
        for ids, logprobs, ended, choice, offered in zip(
            segment_tokens[len(shown) :],
            _rows(parts["logprobs"]),
            *(parts[name].tolist() for name in ("ended", "choice", "choices")),
            strict=True,
        )
    ]
    shelf = replay.shelf
    segments = [*map(shelf.segment, shown), *map(shelf.segment, done)]
    contexts = [shelf.context(tuple(segments[number] for number in row)) for row in _rows(state["contexts"])]
    columns = state["transitions"]
    records = [
        Record(contexts[context], segments[action], reward, discount, None if final == NONE else contexts[final], seed)
        for context, action, reward, discount, final, seed in zip(
            *(columns[name].tolist() for name in ("context", "action", "reward", "discount", "final", "seed")),
            strict=True,
        )
    ]
    replay.first = replay.end = state["first"]
    replay.greatest = state["greatest"]
    replay.extend(records, columns["priority"].numpy())


class _Numbered:
    """Distinct things, numbered as they come."""

    def __init__(self, things: Iterable[Held]) -> None:
        self._numbers: dict[Held, int] = {}
        for held in things:
            self._numbers.setdefault(held, len(self._numbers))

    def __getitem__(self, held: Held) -> int:
        return self._numbers[held]

    def __iter__(self) -> Iterator[Held]:
        return iter(self._numbers)


def _by_size(images: Iterable[Held]) -> list[list[Held]]:
    sizes: dict[tuple[int, ...], list[Held]] = {}
    for held in _Numbered(images):
        sizes.setdefault(held.value.pixels.shape, []).append(held)
    return list(sizes.values())


def _image(pixels: Any) -> Image:
    pixels.flags.writeable = False
    return Image(pixels, "replay")


def _array(values: Iterable[float], dtype: DTypeLike = np.int64) -> Tensor:
    return torch.from_numpy(np.fromiter(values, dtype))


def _ragged(rows: Sequence[Sequence[float]], dtype: DTypeLike = np.int64) -> dict[str, Tensor]:
    """Rows of any length: all their values, and how many each has."""
    return {"values": _array(chain.from_iterable(rows), dtype), "lengths": _array(len(row) for row in rows)}


def _rows(ragged: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    values = tuple(ragged["values"].tolist())
    rows, start = [], 0
    for length in ragged["lengths"].tolist():
        rows.append(values[start : start + length])
        start += length
    return rows
