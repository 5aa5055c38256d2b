"""Randomness is a function of (seed, step), so a resumed run has none to restore."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from rllava_core.training import seeds
from rllava_core.training.seeds import DataOrder, derive, seed_everything

STREAMS = (seeds.WEIGHTS, seeds.DATA, seeds.EPISODES, seeds.SAMPLING, seeds.GLOBAL, seeds.HELD_OUT, seeds.SWAP)


def test_a_seed_is_the_same_on_every_machine() -> None:
    """Written down once: a change would make every earlier run impossible to repeat or resume."""
    assert derive(0, seeds.DATA, 0) == 2918264622725855778
    assert derive(7, seeds.EPISODES, 3, 1) == 9203004175526977434


def test_streams_steps_and_seeds_never_share_a_seed() -> None:
    # Each stream has paths of one length; a zero at the end makes no difference.
    paths: list[tuple[int, ...]] = [(seed, stream, n) for seed in range(5) for stream in STREAMS for n in range(9)]
    paths += [(seed, seeds.EPISODES, step, number) for seed in range(5) for step in range(9) for number in range(1, 9)]
    derived = {derive(*path) for path in paths}

    assert len(STREAMS) == len(set(STREAMS))
    assert len(derived) == len(paths)
    assert all(0 <= value < 2**63 for value in derived)


def test_seeding_sets_every_global_state() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(2**40 + 5)
    first = draws()
    seed_everything(2**40 + 5)
    again = draws()
    seed_everything(2**40 + 6)
    other = draws()

    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_every_epoch_is_another_permutation_of_all_examples() -> None:
    examples = [f"example {number}" for number in range(20)]
    order = DataOrder(examples, seed=3)

    epochs = [order.take(20 * epoch, 20) for epoch in range(3)]

    assert all(sorted(epoch) == sorted(examples) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != DataOrder(examples, seed=4).take(0, 20)


@pytest.mark.parametrize("count", [1, 3, 7, 45])
def test_what_is_taken_depends_on_its_place_alone(count: int) -> None:
    """In any portions, in any order, also where a portion spans epochs or is larger than the data set."""
    examples = list(range(10))
    whole = DataOrder(examples, seed=1).take(0, 90)

    order = DataOrder(examples, seed=1)
    portions = {start: order.take(start, count) for start in reversed(range(0, 90 - count, count))}

    assert all(taken == whole[start : start + count] for start, taken in portions.items())
