"""A cache that grows in place holds what `DynamicCache` would, and no continuation sees another's tokens."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2Config

from rllava_core.policy.memory import GrowingLayer, give_back, growing_cache, selected

LAYERS, HEADS, SIZE = 2, 2, 4


def config(**options: object) -> Qwen2Config:
    return Qwen2Config(num_hidden_layers=LAYERS, **options)


def add(cache: DynamicCache, new: list[tuple[Tensor, Tensor]]) -> None:
    for layer, (keys, values) in enumerate(new):
        cache.update(keys, values, layer)


def random_tokens(rows: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    return [tuple(torch.randn(2, rows, HEADS, tokens, SIZE).unbind()) for _ in range(LAYERS)]


def contents(cache: DynamicCache) -> list[Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


@pytest.mark.parametrize("seed", range(8))
def test_every_continuation_holds_what_a_concatenated_cache_would(seed: int) -> None:
    """Any of the caches so far is continued, in its rows or in others, grows, and gives some of it back."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    pairs = [(growing_cache(config()), DynamicCache(config=config()))]
    for cache in pairs[0]:
        torch.manual_seed(seed)
        add(cache, random_tokens(3, 5))
    for _ in range(60):
        origin = chance.choice(pairs)
        count = len(origin[1].layers[0].keys)
        rows = torch.arange(count)
        if chance.random() < 0.3:
            rows = torch.tensor([chance.randrange(count) for _ in range(chance.randint(1, 4))])
        pair = (selected(origin[0], rows, count), selected(origin[1], rows, count))
        for _ in range(chance.randint(0, 4)):
            new = random_tokens(len(rows), chance.randint(1, 40))
            removed = chance.choice([0, 0, new[0][0].shape[2]])
            for cache in pair:
                add(cache, new)
                give_back(cache, removed)
        pairs.append(pair)
        for growing, plain in pairs:
            assert growing.get_seq_length() == plain.get_seq_length()
            for found, expected in zip(contents(growing), contents(plain), strict=True):
                assert torch.equal(found, expected)


def test_what_is_there_is_not_copied() -> None:
    """Of 100 turns of one conversation, each with a look ahead that is given back, few move to another room."""
    cache = growing_cache(config())
    add(cache, random_tokens(3, 50))
    rooms = set()
    for _ in range(100):
        ahead = selected(cache, torch.arange(3), 3)
        add(ahead, random_tokens(3, 4))
        give_back(ahead, 4)
        cache = selected(cache, torch.arange(3), 3)
        add(cache, random_tokens(3, 5))
        rooms.add(cache.layers[0].keys.data_ptr())
    assert len(rooms) <= 12  # each is a quarter longer than what it took over: 50 · 1.25¹² > 50 + 100 · 5


def test_only_plain_layers_grow_in_place() -> None:
    mixed = config(layer_types=["full_attention", "sliding_attention"], use_sliding_window=True, sliding_window=8)
    plain, sliding = growing_cache(mixed).layers
    assert isinstance(plain, GrowingLayer)
    assert not isinstance(sliding, GrowingLayer)
