"""Batches keep decisions and their columns together, however they are split."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from rllava_core.algorithms.protocol import Batch
from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Trajectory


def numbered(trajectories: list[Trajectory]) -> Batch:
    """A batch whose column numbers the decisions."""
    count = sum(trajectory.decisions for trajectory in trajectories)
    return Batch(tuple(trajectories), {"number": torch.arange(count), "pair": torch.zeros(count, 2)})


@pytest.fixture
def trajectories(make: Any) -> list[Trajectory]:
    lengths = [(3,), (1,), (5, 2), (0,), (0, 0, 4)]
    return [make.trajectory(group, turns, seed=seed) for group in range(4) for seed, turns in enumerate(lengths)]


@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(6), torch.zeros(()), torch.zeros(1, 5)])
def test_a_column_of_another_length_is_refused_by_name(make: Any, wrong: torch.Tensor) -> None:
    trajectory = make.trajectory(turns=(3, 2))
    with pytest.raises(TrainingError, match=r"column 'advantages' .* for 5 decisions"):
        Batch((trajectory,), {"good": torch.zeros(5, 3), "advantages": wrong})


def test_a_choice_counts_as_one_decision(make: Any) -> None:
    batch = numbered([make.trajectory(turns=(0, 3, 0))])
    assert len(batch.number) == 5


def test_columns_are_attributes_and_others_are_none(make: Any) -> None:
    batch = numbered([make.trajectory()])
    assert batch.number.tolist() == [0, 1]
    assert not hasattr(batch, "advantages")
    with pytest.raises(AttributeError, match="no column 'advantages'; it has number, pair"):
        _ = batch.advantages
    assert copy.deepcopy(batch).number.tolist() == [0, 1]


def cost(trajectories: tuple[Trajectory, ...]) -> int:
    """Tokens of distinct prompts, and of all that follows them."""
    prompts = {trajectory.prompt.tokens for trajectory in trajectories}
    rest = [segment.tokens for trajectory in trajectories for segment in trajectory.turns[-1].context[1:]]
    last = [trajectory.actions[-1].tokens for trajectory in trajectories]
    # Of a choice of several tokens, all but the last are read once more, along a path of their own.
    paths = [
        choice[:-1] for trajectory in trajectories for action in trajectory.actions for choice in action.choices or ()
    ]
    return sum(map(len, [*prompts, *rest, *last, *paths]))


@pytest.mark.parametrize("tokens", [1, 7, 10, 23, 50, 10**6])
def test_micro_batches_are_whole_trajectories_with_their_own_rows(trajectories: list[Trajectory], tokens: int) -> None:
    batch = numbered(trajectories)
    parts = list(batch.split(tokens))

    assert [trajectory for part in parts for trajectory in part.trajectories] == trajectories
    assert torch.cat([part.number for part in parts]).tolist() == list(range(len(batch.number)))
    for part in parts:
        assert len(part.number) == len(part.pair) == sum(trajectory.decisions for trajectory in part.trajectories)
        assert cost(part.trajectories) <= tokens or len(part.trajectories) == 1
    for part, following in itertools.pairwise(parts):  # each is as large as it may be
        assert cost((*part.trajectories, following.trajectories[0])) > tokens


def test_a_prompt_that_is_shared_counts_once(make: Any) -> None:
    group = [make.trajectory(turns=(2,), prompt=10, seed=seed) for seed in range(5)]

    def sizes(tokens: int) -> list[int]:
        return [len(part.trajectories) for part in numbered(group).split(tokens)]

    assert sizes(14) == [2, 2, 1]
    assert sizes(15) == [2, 2, 1]
    assert sizes(16) == [3, 2]
    assert sizes(20) == [5]


def test_what_a_window_shows_again_counts_again_and_once_for_all(make: Any) -> None:
    """Turns that see only the last observation are as many beginnings, which others may share."""
    whole = make.trajectory(turns=(2, 2, 2), prompt=10)
    windows = replace(whole, turns=tuple(replace(turn, context=(turn.observation,)) for turn in whole.turns))
    # The prompt of 10, one equal observation of 3 for both later turns, and three answers of 2.
    size = 10 + 3 + 3 * 2

    def sizes(tokens: int, count: int = 3) -> list[int]:
        return [len(part.trajectories) for part in numbered([windows] * count).split(tokens)]

    assert sizes(size) == [1, 1, 1]
    assert sizes(size + 5) == [1, 1, 1]
    assert sizes(size + 6) == [2, 1]
    assert sizes(size + 12) == [3]


def test_a_batch_of_nothing_splits_into_nothing() -> None:
    assert list(Batch((), {}).split(10)) == []
