"""Randomness as a function of (seed, step): nothing random has a state that a resumed run would have to restore."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

T = TypeVar("T")

# First words of the derivation, so that streams of different purpose never coincide.
WEIGHTS, DATA, EPISODES, SAMPLING, GLOBAL, HELD_OUT, SWAP, CHANCE = range(8)


def derive(seed: int, *path: int) -> int:
    """A 63-bit seed for one purpose: well mixed, and the same on every machine."""
    words = np.random.SeedSequence([seed, *path]).generate_state(2, np.uint64)
    return int(words[0] >> np.uint64(1))


def seed_everything(seed: int) -> None:
    """Set the global random states of Python, NumPy and torch, for components that use those."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class DataOrder(Generic[T]):
    """An endless sequence of the examples: every epoch a new permutation, known from the seed alone."""

    def __init__(self, examples: Sequence[T], seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self._epoch = -1
        self._permutation: list[int] = []

    def take(self, start: int, count: int) -> list[T]:
        """Entries number `start` to `start + count`."""
        return [self._entry(number) for number in range(start, start + count)]

    def _entry(self, number: int) -> T:
        epoch, place = divmod(number, len(self._examples))
        if epoch != self._epoch:
            generator = np.random.default_rng(derive(self._seed, DATA, epoch))
            self._permutation = generator.permutation(len(self._examples)).tolist()
            self._epoch = epoch
        return self._examples[self._permutation[place]]
