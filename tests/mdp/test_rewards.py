"""Scoring trajectories: sums, and the reward and example that an error names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rllava_core.errors import RewardError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.rewards import WeightedReward, reports, score, succeeded
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Trajectory, conversation


def episode(
    answer: str = "7",
    name: str = "train.jsonl:1",
    rewards: Sequence[float] = (0.0,),
    info: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Trajectory:
    """One of as many turns as rewards; `info` comes with the last of them."""
    turn = (ContextSegment((1, 2)), ActionSegment((3,), np.zeros(1, np.float32), text=answer))
    *earlier, last = conversation(turn * len(rewards), rewards)
    values: dict[str, Any] = {
        "example": Example(name=name, answer="7"),
        "seed": 0,
        "group": 0,
        "turns": (*earlier, replace(last, info=info or {})),
        "terminated": True,
    }
    return Trajectory(**(values | changes))


def reward(function: Callable[[Sequence[Trajectory]], Any], name: str = "mine", weight: float = 1.0) -> WeightedReward:
    return WeightedReward(name, weight, function)


def constant(*values: Any) -> WeightedReward:
    return reward(lambda trajectories: list(values))


def length(trajectories: Sequence[Trajectory]) -> list[float]:
    return [float(len(trajectory.answer)) for trajectory in trajectories]


def test_scores_are_reported_by_name_and_summed_by_weight() -> None:
    batch = [episode("seven"), episode("7")]
    right = reward(lambda trajectories: [t.answer == "7" for t in trajectories], name="right", weight=2.0)
    scored = score(batch, [right, reward(length, name="length", weight=-0.1)])
    assert [dict(trajectory.scores) for trajectory in scored] == [
        {"right": 0.0, "length": 5.0},
        {"right": 1.0, "length": 1.0},
    ]
    assert [trajectory.score for trajectory in scored] == pytest.approx([-0.5, 1.9])
    assert batch[0].scores == {}, "the trajectories given are left as they were"


def test_a_reward_is_called_once_with_the_whole_batch() -> None:
    calls = []

    def count(trajectories: Sequence[Trajectory]) -> list[float]:
        calls.append(len(trajectories))
        return [0.0] * len(trajectories)

    score([episode()] * 3, [reward(count)])
    assert calls == [3]


def test_without_rewards_the_score_is_zero() -> None:
    assert score([episode()], [])[0].score == 0.0


@pytest.mark.parametrize("values", [(np.float32(0.5),), (np.array(0.5),), (1,), (True,)])
def test_anything_that_is_a_number_counts(values: tuple[Any, ...]) -> None:
    assert score([episode()], [constant(*values)])[0].score == float(values[0])


def test_arrays_and_generators_are_lists_too() -> None:
    assert score([episode()] * 2, [reward(lambda batch: np.ones(len(batch)))])[1].score == 1.0
    assert score([episode()] * 2, [reward(lambda batch: (1.0 for _ in batch))])[1].score == 1.0


def test_a_reward_that_raises_is_named_with_the_example() -> None:
    def fails(trajectories: Sequence[Trajectory]) -> list[float]:
        return [1 / len(trajectory.answer) for trajectory in trajectories]

    batch = [episode("7"), episode("", name="train.jsonl:2"), episode("7", name="train.jsonl:3")]
    with pytest.raises(RewardError, match=r"'mine' raised ZeroDivisionError: .*example train\.jsonl:2, answer ''"):
        score(batch, [reward(fails)])


def test_a_generator_that_raises_is_named_with_the_example() -> None:
    batch = [episode("7"), episode("", name="train.jsonl:2")]
    with pytest.raises(RewardError, match=r"example train\.jsonl:2"):
        score(batch, [reward(lambda trajectories: (1 / len(t.answer) for t in trajectories))])


def test_a_reward_that_raises_only_on_the_batch_says_so() -> None:
    def fails(trajectories: Sequence[Trajectory]) -> list[float]:
        if len(trajectories) > 1:
            raise KeyError("batch")
        return [0.0]

    with pytest.raises(RewardError, match="on a batch of 2, but on none of them alone"):
        score([episode(), episode()], [reward(fails)])


def test_a_reward_s_own_message_is_passed_on_with_its_name() -> None:
    def fails(trajectories: Sequence[Trajectory]) -> list[float]:
        raise RewardError("the judge does not answer")

    with pytest.raises(RewardError, match=r"^reward 'mine': the judge does not answer$"):
        score([episode()], [reward(fails)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(RewardError, match=r"'mine' returned (nan|-?inf) for example train\.jsonl:2, .*finite"):
        score([episode(), episode(name="train.jsonl:2")], [constant(0.0, value)])


@pytest.mark.parametrize("value", [None, "1.0", b"1", [1.0, 2.0], 1j, 10**400])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(RewardError, match=r"'mine' returned .* for example train\.jsonl:1, .*must return a number"):
        score([episode()], [constant(value)])


@pytest.mark.parametrize("values", [(), (1.0,), (1.0, 1.0, 1.0)])
def test_another_number_of_values_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(RewardError, match=rf"'mine' returned {len(values)} values for 2 trajectories"):
        score([episode(), episode()], [constant(*values)])


@pytest.mark.parametrize("value", [None, 1.0])
def test_a_reward_that_returns_no_list_is_told_so(value: Any) -> None:
    with pytest.raises(RewardError, match=rf"'mine' returned {value} for 1 trajectories; it must return a list"):
        score([episode()], [reward(lambda trajectories: value)])


def test_success_is_what_the_environment_says() -> None:
    assert succeeded(episode(info={"success": True}, scores={"right": 0.0}), "right")
    assert not succeeded(episode(info={"success": False}, scores={"right": 1.0}, rewards=(5.0,)), "right")


def test_else_success_is_a_primary_reward_of_one() -> None:
    assert succeeded(episode(scores={"right": 1.0, "format": 0.0}), "right")
    assert succeeded(episode(scores={"right": 1.0 - 1e-9}), "right")
    assert not succeeded(episode(scores={"right": 0.9, "format": 1.0}, score=1.9), "right")


def test_else_success_is_a_positive_return() -> None:
    assert succeeded(episode(rewards=(-1.0, 2.0)), None)
    assert not succeeded(episode(rewards=(0.0,)), None)
    assert not succeeded(episode(rewards=(1.0, -2.0)), None)


class Counting:
    """A reward that says what it has cost."""

    def __init__(self, **said: Any) -> None:
        self.said = said

    def __call__(self, trajectories: Sequence[Trajectory], /) -> list[float]:
        return [0.0] * len(trajectories)

    def report(self) -> Mapping[str, Any]:
        return self.said


def test_a_reward_may_say_more_of_itself() -> None:
    rewards = [reward(Counting(calls=2, cost=np.float32(0.5)), name="judge"), reward(length), reward(Counting())]
    assert reports(rewards) == {"reward/judge/calls": 2.0, "reward/judge/cost": 0.5}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"cost": float("nan")}, r"^reward 'mine': report\(\) says that cost is nan; it must be finite$"),
        ({"cost": "much"}, r"^reward 'mine': report\(\) raised ValueError: .*; it must return numbers by name$"),
    ],
)
def test_what_it_says_must_be_numbers(said: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        reports([reward(Counting(**said))])
