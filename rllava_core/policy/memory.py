"""What a model keeps of what it has read: keys and values, which continuations add to and never change."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class Memory:
    """What the model keeps of N contexts that it has read, so that their continuations need not read them again.

    last: [N, H] hidden state at the end of each.
    cache: their keys and values.
    mask: [N, S] which entries of the cache are theirs.
    next_position: [N] where a continuation of each starts.
    """

    last: Tensor
    cache: DynamicCache
    mask: Tensor
    next_position: Tensor

    def continued(self, rows: Tensor) -> Memory:
        """These rows, with a cache that can be added to while this one stays as it is."""
        cache = selected(self.cache, rows, len(self.mask))
        return Memory(self.last[rows], cache, self.mask[rows], self.next_position[rows])


def selected(cache: DynamicCache, rows: Tensor, count: int) -> DynamicCache:
    """A cache of these rows of another of `count` rows, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    # Layers never change what they hold, so that of all rows, in their order, need not be copied.
    if not torch.equal(rows, torch.arange(count, device=rows.device)):
        chosen.batch_select_indices(rows)
    return chosen


def cache_argument(module: nn.Module) -> str:
    """The name by which a model takes keys and values: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in _arguments(type(module).forward) else "past_key_values"


@functools.cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache for sampling, without gradients: what is read is written behind what is there, which is not copied.

    `DynamicCache` concatenates, so that each turn of a conversation costs a copy of all before it. Only its plain
    layers are replaced.
    """
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer.empty() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def give_back(cache: DynamicCache, tokens: int) -> None:
    """The last `tokens` are not needed any more: what is added next may take their room."""
    if tokens:  # older transformers take 0 for the length to crop to
        cache.crop(-tokens)


class GrowingLayer(DynamicLayer):
    """Keys and values at the beginning of a room that may be longer.

    Copies of a layer share its room. Whichever grows first writes behind what both hold; the other then finds the place
    taken and moves to a room of its own, so no layer ever sees another's tokens.
    """

    _room: _Room | None = None

    @classmethod
    def empty(cls) -> GrowingLayer:
        return cls()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        length = self.get_seq_length()
        longer = length + key_states.shape[-2]
        if self._room is None or not self._room.free(length, longer):
            self._room = _Room.of(self.keys, self.values, key_states, longer)
        self.keys, self.values = self._room.write(key_states, value_states, length)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        length = self.get_seq_length()
        super().crop(tokens_to_remove)
        if self._room is not None and self._room.used == length:
            self._room.used = self.get_seq_length()

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        if length:
            assert self.keys is not None
            assert self.values is not None
            # Copied once, to where there is room for what will be added.
            self._room = _Room.for_tokens(len(indices), self.keys, length)
            self.keys, self.values = self._room.write_rows(self.keys, self.values, indices)


@dataclass
class _Room:
    """keys, values: [N, heads, capacity, size], of which the first `used` places are taken."""

    keys: Tensor
    values: Tensor
    used: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, like: Tensor, length: int) -> _Room:
        """Room for `length` tokens, of which some are there."""
        room = cls.for_tokens(len(like), like, length)
        if keys.numel():
            room.write(keys, values, 0)
        return room

    @classmethod
    def for_tokens(cls, rows: int, like: Tensor, length: int) -> _Room:
        """Empty, for `length` tokens and some more, so that growing costs a constant number of copies a token."""
        _, heads, _, size = like.shape
        capacity = length + max(32, length // 4)
        return cls(like.new_empty(rows, heads, capacity, size), like.new_empty(rows, heads, capacity, size), 0)

    def free(self, begin: int, end: int) -> bool:
        return self.used == begin and end <= self.keys.shape[-2]

    def write(self, keys: Tensor, values: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        self.used = begin + keys.shape[-2]
        self.keys[:, :, begin : self.used] = keys
        self.values[:, :, begin : self.used] = values
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def write_rows(self, keys: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """At the beginning, rows of others."""
        self.used = keys.shape[-2]
        chosen = self.keys[:, :, : self.used], self.values[:, :, : self.used]
        for source, target in zip((keys, values), chosen, strict=True):
            torch.index_select(source, 0, rows, out=target)
        return chosen
