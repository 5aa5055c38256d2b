"""Targets equal loops over the formulas in float64, on random episodes that end in every way and place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import ActionSegment, Trajectory, Turn
from rllava_dqn.algorithm import DQN
from rllava_dqn.config import DQNConfig
from rllava_dqn.transitions import transitions

from .conftest import CHOICES, Episodes, TablePolicy, number_of


def naive_targets(
    episode: Trajectory, n: int, gamma: float, own: np.ndarray, copy: np.ndarray, double: bool
) -> list[float]:
    """y_t = r_t + γ r_{t+1} + … + γ^{m−1} r_{t+m−1} + γ^m Q'(s_{t+m}, a*), m = n or what is left of the episode."""
    states = [number_of(turn.context) for turn in episode.turns]
    if episode.final is not None:
        states.append(number_of(episode.final))
    rewards = [turn.reward for turn in episode.turns]
    rewards[-1] += episode.score
    targets = []
    for t in range(len(rewards)):
        y, m = 0.0, 0
        while m < n and t + m < len(rewards):
            y += gamma**m * rewards[t + m]
            m += 1
        over = t + m == len(rewards) and episode.terminated
        if not over:
            following = states[t + m]
            values = own[following] if double else copy[following]
            best = 0
            for choice in range(CHOICES):
                if values[choice] > values[best]:
                    best = choice
            y += gamma**m * copy[following][best]
        targets.append(y)
    return targets


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dueling", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(5))
def test_the_targets_of_a_batch_equal_the_formulas(seed: int, n: int, dueling: bool, double: bool) -> None:
    """Episodes of 1 to 7 turns, each length ending both ways: the end lies in every place within the n steps."""
    torch.manual_seed(seed)
    make = Episodes(seed)
    played = [
        make(length, terminated=terminated, history=history, score=float(make.random.normal()))
        for length in range(1, 8)
        for terminated in (True, False)
        for history in ("one", "all")
    ]
    turns = sum(len(episode.turns) for episode in played)
    gamma = float(make.random.uniform(0.5, 1.0))
    config = DQNConfig(
        gamma=gamma, n_steps=n, double=double, dueling=dueling, batch_size=turns, warmup_turns=0, updates_per_turn=0.01
    )
    policy = TablePolicy({"state_value": 1, "advantage": CHOICES} if dueling else {"q": CHOICES}, seed)
    algorithm = DQN(config)

    [batch] = algorithm.prepare(played, policy)

    def table(outputs: dict[str, torch.Tensor]) -> np.ndarray:
        """[states, choices] Q, one by one."""
        if not dueling:
            return outputs["q"].numpy()
        values, advantages = outputs["state_value"].numpy(), outputs["advantage"].numpy()
        return np.array(
            [[v[0] + a - sum(row) / len(row) for a in row] for v, row in zip(values, advantages, strict=True)]
        )

    own, copy = table(policy.own), table(policy.copy)
    expected = {
        number_of(turn.context): (target, turn.action.choice)
        for episode in played
        for turn, target in zip(episode.turns, naive_targets(episode, n, gamma, own, copy, double), strict=True)
    }
    # Priorities are equal and as many are drawn as there are: each once.
    assert sorted(number_of(one.turns[0].context) for one in batch.trajectories) == sorted(expected)
    for trajectory, target, action in zip(batch.trajectories, batch.targets, batch.actions, strict=True):
        y, choice = expected[number_of(trajectory.turns[0].context)]
        assert float(target) == pytest.approx(y, rel=1e-12, abs=1e-12)
        assert int(action) == choice


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_only_the_end_of_an_episode_shortens_a_transition(episodes: Episodes, n: int) -> None:
    for terminated in (True, False):
        episode = episodes(5, terminated=terminated)
        made = transitions(episode, n, 0.5)
        for t, transition in enumerate(made):
            m = min(n, 5 - t)
            at_the_end = t + m == 5
            assert transition.context is episode.turns[t].context
            assert transition.action is episode.turns[t].action
            assert transition.discount == (0 if at_the_end and terminated else 0.5**m)
            following = episode.final if at_the_end else episode.turns[t + m].context
            assert transition.final is following


def test_a_transition_is_an_episode_of_one_turn_that_was_cut_unless_it_is_over(episodes: Episodes) -> None:
    cut, over = transitions(episodes(2, terminated=True), 1, 0.9)

    trajectory = cut.as_trajectory(3)
    assert (trajectory.terminated, trajectory.truncated, trajectory.final) == (False, True, cut.final)
    assert (trajectory.decisions, trajectory.rewards, trajectory.group) == (1, (cut.reward,), 3)
    assert (trajectory.example, trajectory.seed) == (None, cut.seed)
    trajectory = over.as_trajectory(0)
    assert (trajectory.terminated, trajectory.truncated, trajectory.final) == (True, False, None)


def test_rewards_of_functions_belong_to_the_last_turn(episodes: Episodes) -> None:
    episode = episodes(3, terminated=True, score=10.0)

    made = transitions(episode, 1, 0.9)

    assert [transition.reward for transition in made] == [
        episode.turns[0].reward,
        episode.turns[1].reward,
        episode.turns[2].reward + 10.0,
    ]


def test_a_cut_episode_without_the_state_it_was_left_in_is_refused_by_name(episodes: Episodes) -> None:
    episode = episodes(3)
    cut = Trajectory(None, 5, 0, episode.turns, False, "context", None)

    with pytest.raises(TrainingError, match=r"episode with seed 5 was cut \(context\) after turn 3, .* have `final`"):
        transitions(cut, 1, 0.9)
    with pytest.raises(TrainingError, match="episode with seed 5 neither terminated nor was cut after turn 3"):
        transitions(Trajectory(None, 5, 0, episode.turns, False), 1, 0.9)


def test_free_text_is_refused_by_name(episodes: Episodes) -> None:
    episode = episodes(1)
    text = ActionSegment((1, 2), np.zeros(2, np.float32), "go left")
    mixed = Trajectory(None, 5, 0, (*episode.turns, Turn(episode.turns[0].context, text)), True)

    with pytest.raises(TrainingError, match=r"turn 2 of episode with seed 5 is free text \('go left'\).*task.choices"):
        transitions(mixed, 1, 0.9)
