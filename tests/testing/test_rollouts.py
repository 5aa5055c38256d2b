"""What the suites train on is real: the tiny policy said it, and scores it the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rllava_core.algorithms.maths import group_std
from rllava_core.algorithms.policy_gradient import Rollouts
from rllava_core.testing.rollouts import (
    choice_scripts,
    conversation_scripts,
    demonstrate,
    pack,
    play,
    text_scripts,
    tiny_policy,
    with_scores,
)

SCRIPTS = [*text_scripts(), *choice_scripts(), *conversation_scripts(), *conversation_scripts(choices=True)]


def test_a_group_shares_its_prompt_and_differs_in_its_answers() -> None:
    trajectories = play(tiny_policy(), SCRIPTS, 4)

    assert [trajectory.group for trajectory in trajectories] == [group for group in range(10) for _ in range(4)]
    for group in range(10):
        members = trajectories[4 * group : 4 * group + 4]
        assert len({member.prompt for member in members}) == 1
    assert len({len(item.actions[0].tokens) for item in trajectories[:4]}) > 1
    assert {len(item.actions) for item in trajectories} == {1, 2, 3}
    assert {action.ended for item in trajectories for action in item.actions} == {True, False}
    rollouts = Rollouts.of(trajectories)
    assert (group_std(rollouts.returns, rollouts.group) > 0).all()


def test_log_probs_are_the_policy_s_own() -> None:
    policy = tiny_policy()
    trajectories = play(policy, SCRIPTS, 2)

    with torch.no_grad():
        logprobs = policy(pack(policy, trajectories)).logprobs.numpy()

    recorded = np.concatenate([trajectory.behaviour_logprobs for trajectory in trajectories])
    np.testing.assert_allclose(logprobs, recorded, rtol=0, atol=1e-5)


def test_choices_are_open_at_first() -> None:
    """Or nothing would be explored, and an algorithm that learns nothing would look like one that does."""
    policy = tiny_policy()
    chosen = play(policy, choice_scripts(), 30)

    for group in range(len(choice_scripts())):
        answers = {item.answer for item in chosen if item.group == group}
        assert len(answers) > 1


def test_the_same_seed_plays_the_same_and_another_one_another() -> None:
    def played(seed: int | None) -> list[str]:
        return [item.answer for item in play(tiny_policy(), SCRIPTS, 2, seed)]

    assert played(1) == played(1) != played(2)
    assert played(None) == played(None)


def test_demonstrations_hold_the_right_answers() -> None:
    trajectories = demonstrate(tiny_policy().adapter, SCRIPTS)

    assert [item.answer for item in trajectories[3:6]] == ["3", "green", "no!"]
    for trajectory in trajectories:
        assert (trajectory.behaviour_logprobs == 0).all()
        assert trajectory.score == 1
        assert trajectory.episode_return == pytest.approx(1 + 0.1 * (len(trajectory.turns) - 1))
    assert len({len(item.actions[0].tokens) for item in trajectories[:3]}) == 3


def test_scores_are_given_in_turn() -> None:
    """They are then the returns, also of several turns: checks of equal returns need them exactly so."""
    scored = with_scores(play(tiny_policy(), [*choice_scripts(), *conversation_scripts()], 2), [1.0, -2.0])
    assert [item.episode_return for item in scored] == [1.0, -2.0] * 5


def test_an_episode_that_is_not_answered_in_the_end_is_truncated_there() -> None:
    *_, whole, left = play(tiny_policy(), conversation_scripts())

    assert (whole.terminated, whole.truncation, whole.final) == (True, None, None)
    assert (left.terminated, left.truncation) == (False, "environment")
    assert left.final is not None
    assert left.final[:-1] == (*left.turns[-1].context, left.turns[-1].action)
    assert [item.rewards[:-1] for item in (whole, left)] == [(0.1, 0.1), (0.1,)]
