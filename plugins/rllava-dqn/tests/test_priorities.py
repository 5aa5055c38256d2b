"""The sum tree against running sums."""

from __future__ import annotations

import numpy as np
import pytest

from rllava_dqn.priorities import SumTree


@pytest.mark.parametrize("places", [1, 2, 3, 7, 8, 9, 100])
def test_an_amount_is_found_where_the_running_sum_exceeds_it(places: int) -> None:
    random = np.random.default_rng(places)
    numbers = random.random(places) * (random.random(places) < 0.7)
    numbers[random.integers(places)] = 1.0
    tree = SumTree(places)
    for place in random.permutation(places):
        tree[np.array([place])] = numbers[[place]]

    amounts = random.random(500) * tree.total * (1 - 1e-9)
    found = tree.find(amounts)

    assert tree.total == pytest.approx(numbers.sum())
    for amount, place in zip(amounts, found, strict=True):
        running = 0.0
        for expected in range(places):
            running += numbers[expected]
            if running > amount:
                break
        assert place == expected


def test_sums_follow_from_the_numbers_alone() -> None:
    random = np.random.default_rng(0)
    numbers = random.random(77) * 10.0 ** random.integers(-8, 8, 77)
    at_once, one_by_one = SumTree(77), SumTree(77)
    at_once[np.arange(77)] = numbers
    for place in random.permutation(77):
        one_by_one[np.array([place])] = random.random(1)
        one_by_one[np.array([place])] = numbers[[place]]

    assert at_once.total == one_by_one.total
    amounts = random.random(1000) * at_once.total
    assert (at_once.find(amounts) == one_by_one.find(amounts)).all()


def test_a_place_of_zero_is_never_found() -> None:
    """Even for the total itself, which rounding may give."""
    random = np.random.default_rng(0)
    for _ in range(200):
        tree = SumTree(16)
        numbers = random.random(16) * (random.random(16) < 0.3)
        numbers[random.integers(16)] = random.random()
        tree[np.arange(16)] = numbers
        edges = np.concatenate([[0.0], np.cumsum(numbers), [tree.total]])
        assert (numbers[tree.find(edges)] > 0).all()


def test_of_a_place_named_twice_the_last_number_counts() -> None:
    tree = SumTree(4)
    tree[np.array([1, 2, 1])] = np.array([5.0, 1.0, 3.0])
    assert tree.total == 4.0
    assert tree[np.array([0, 1, 2, 3])].tolist() == [0.0, 3.0, 1.0, 0.0]
