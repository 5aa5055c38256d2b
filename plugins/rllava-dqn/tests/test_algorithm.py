"""Values, loss, schedules, and when what is done."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rllava_core.algorithms.protocol import Batch
from rllava_core.errors import TrainingError
from rllava_core.policy.policy import Head, PolicyOutput
from rllava_dqn.algorithm import DQN
from rllava_dqn.config import DQNConfig

from .conftest import CHOICES, Episodes, TablePolicy, number_of

ALWAYS = {"warmup_turns": 0, "updates_per_turn": 1.0, "batch_size": 4}


def output(**heads: torch.Tensor) -> PolicyOutput:
    size = len(next(iter(heads.values())))
    return PolicyOutput(torch.zeros(size), torch.zeros(size), heads)


def test_one_head_gives_the_values_or_two_do_dueling() -> None:
    plain, dueling = DQN(DQNConfig()), DQN(DQNConfig(dueling=True))

    assert plain.heads == {"q": Head("choices")}
    assert dueling.heads == {"state_value": Head(1), "advantage": Head("choices")}
    heads = {
        "state_value": torch.tensor([[2.0], [-1.0]]),
        "advantage": torch.tensor([[1.0, 4.0, 1.0], [0.0, 0.0, 3.0]]),
    }
    # Means of the advantages: 2 and 1.
    assert dueling.action_values(heads).tolist() == [[1.0, 4.0, 1.0], [-2.0, -2.0, 1.0]]
    assert dueling.behaviour().action_values is not None


@pytest.mark.parametrize("loss", ["huber", "mse"])
@pytest.mark.parametrize("dueling", [False, True])
def test_the_loss_is_the_weighted_sum_over_the_choices_taken(episodes: Episodes, loss: str, dueling: bool) -> None:
    """Against a loop, and its gradient against that of Q(s, a) by hand."""
    algorithm = DQN(DQNConfig(loss=loss, dueling=dueling))
    played = tuple(episodes(1) for _ in range(6))
    random = torch.Generator().manual_seed(0)
    q = torch.randn(6, CHOICES, generator=random, dtype=torch.float64)
    targets = 2 * torch.randn(6, generator=random, dtype=torch.float64)
    weights = torch.rand(6, generator=random, dtype=torch.float64)
    actions = torch.tensor([0, 3, 1, 1, 2, 0])
    share = torch.full((6,), 1 / 6, dtype=torch.float64)
    batch = Batch(played, {"actions": actions, "targets": targets, "weights": weights, "share": share})
    heads = {"q": q.clone().requires_grad_()}
    if dueling:
        mean = q.mean(dim=1, keepdim=True).detach()
        # Any offset of the advantages is another of their mean.
        heads = {"state_value": mean.clone().requires_grad_(), "advantage": (q - mean.detach() + 5.0).requires_grad_()}

    result = algorithm.loss(batch, output(**heads))
    result.total.backward()

    expected = error = 0.0
    slopes = np.zeros((6, CHOICES))
    for row in range(6):
        x = float(q[row, actions[row]]) - float(targets[row])
        error += abs(x) / 6
        if loss == "mse":
            each, slope = x * x, 2 * x
        else:
            each, slope = (x * x / 2, x) if abs(x) <= 1 else (abs(x) - 0.5, math.copysign(1, x))
        expected += float(weights[row]) * each
        slopes[row, actions[row]] = float(weights[row]) * slope
    assert float(result.total.detach()) == pytest.approx(expected, rel=1e-12)
    assert float(result.metrics["policy/loss"]) == pytest.approx(expected, rel=1e-12)
    assert float(result.metrics["q/td_error"]) == pytest.approx(error)
    assert float(result.metrics["q/mean"]) == pytest.approx(float(q.gather(1, actions[:, None]).mean()))
    assert float(result.metrics["q/target_mean"]) == pytest.approx(float(targets.mean()))
    if dueling:
        grad = heads["state_value"].grad
        assert grad is not None
        assert grad[:, 0].tolist() == pytest.approx(slopes.sum(1).tolist())
        grad = heads["advantage"].grad
        assert grad is not None
        assert grad.flatten().tolist() == pytest.approx(
            (slopes - slopes.sum(1, keepdims=True) / CHOICES).flatten().tolist()
        )
    else:
        grad = heads["q"].grad
        assert grad is not None
        assert grad.flatten().tolist() == pytest.approx(slopes.flatten().tolist())


def test_the_behaviour_is_greedy_in_the_values_but_for_epsilon_which_falls_with_the_turns(episodes: Episodes) -> None:
    config = DQNConfig(epsilon_start=0.9, epsilon_end=0.1, epsilon_turns=8, warmup_turns=1000)
    algorithm, policy = DQN(config), TablePolicy()
    seen, reported = [], []
    for _ in range(4):
        behaviour = algorithm.behaviour()
        seen.append(behaviour.epsilon)
        assert behaviour.action_values is not None
        assert behaviour.action_values({"q": torch.tensor([[1.0, 2.0]])}).tolist() == [[1.0, 2.0]]
        assert not list(algorithm.prepare([episodes(3), episodes(1)], policy))
        reported.append(algorithm.report()["policy/epsilon"])

    assert seen == pytest.approx([0.9, 0.5, 0.1, 0.1])
    assert reported == seen  # with which the step's episodes were sampled, not those of the next


@pytest.mark.parametrize("rate", [1.0, 0.25, 0.1, 0.3, 2.5])
def test_updates_are_in_proportion_to_turns_and_fractions_are_carried_over(episodes: Episodes, rate: float) -> None:
    algorithm = DQN(DQNConfig(**{**ALWAYS, "updates_per_turn": rate}))
    done = []
    for number in range(40):
        turns = 1 + number % 3
        done.append(len(list(algorithm.prepare([episodes(turns)], TablePolicy()))))
        assert abs(sum(done) - rate * algorithm.turns) <= 0.5
    assert algorithm.updates == sum(done)


def test_nothing_is_learnt_before_the_warmup_and_its_turns_ask_for_no_updates(episodes: Episodes) -> None:
    algorithm = DQN(DQNConfig(**{**ALWAYS, "warmup_turns": 7}))
    policy = TablePolicy()

    done = [len(list(algorithm.prepare([episodes(3)], policy))) for _ in range(4)]

    assert done == [0, 0, 3, 3]
    assert len(algorithm.replay) == 12


@pytest.mark.parametrize(("every", "rate"), [(3, 1.0), (1, 0.005), (2, 0.5)])
def test_the_target_moves_every_so_many_updates_by_the_rate(episodes: Episodes, every: int, rate: float) -> None:
    algorithm = DQN(DQNConfig(**{**ALWAYS, "target_every": every, "target_rate": rate}))
    policy = TablePolicy()
    copied_after = []
    for _ in range(4):
        for _ in algorithm.prepare([episodes(2)], policy):
            copied_after.append(len(policy.copied))

    # Number k of the list was taken before the copy that follows update k.
    assert copied_after == [number // every for number in range(8)]
    assert policy.copied == [("target", rate)] * (8 // every)
    assert algorithm.report()["q/target_updates"] == 8 // every


def test_each_batch_is_valued_by_the_policy_after_the_step_before(episodes: Episodes) -> None:
    algorithm, policy = DQN(DQNConfig(**{**ALWAYS, "double": False, "gamma": 1.0})), TablePolicy()
    played = [episodes(4)]
    policy.copy["q"][:] = 0.0
    for number, batch in enumerate(algorithm.prepare(played, policy)):
        rewards = torch.tensor([trajectory.rewards[0] for trajectory in batch.trajectories], dtype=torch.float64)
        assert torch.allclose(batch.targets, rewards + number)
        policy.copy["q"] += 1.0
    assert policy.evaluated == [None, "target"] * 4


def test_priorities_are_the_errors_before_the_step(episodes: Episodes) -> None:
    config = DQNConfig(**ALWAYS, priority_alpha=0.6, priority_epsilon=0.01, priority_beta=0.4, priority_beta_turns=10)
    algorithm, policy = DQN(config), TablePolicy()
    torch.manual_seed(0)
    known: dict[int, float] = {}
    greatest = 1.0
    for iteration in range(4):
        played = [episodes(5)]
        turns = 5 * (iteration + 1)
        known |= {number_of(turn.context): greatest for turn in played[0].turns}
        for batch in algorithm.prepare(played, policy):
            names = [number_of(trajectory.turns[0].context) for trajectory in batch.trajectories]
            total = sum(known.values())
            # (N · P)^-β, divided by the greatest of the batch.
            beta = min(1.0, 0.4 + 0.6 * turns / 10)
            importance = [(len(known) * known[name] / total) ** -beta for name in names]
            expected = [weight / max(importance) / 4 for weight in importance]
            assert batch.weights.tolist() == pytest.approx(expected, rel=1e-9)
            for name, action, target in zip(names, batch.actions, batch.targets, strict=True):
                error = abs(float(target) - float(policy.own["q"][name, action]))
                known[name] = (error + 0.01) ** 0.6
            greatest = max(greatest, *known.values())
            # Move the values, or every draw would see the same errors.
            policy.own["q"] *= 0.9
        assert algorithm.replay.priorities.tolist() == pytest.approx(list(known.values()), rel=1e-9)


def test_without_priorities_every_weight_is_the_same(episodes: Episodes) -> None:
    algorithm = DQN(DQNConfig(**ALWAYS))
    for batch in algorithm.prepare([episodes(9)], TablePolicy()):
        assert batch.weights.tolist() == [0.25] * 4


def test_it_draws_from_torch_s_random_state(episodes: Episodes) -> None:
    played = [episodes(20)]
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        batches = DQN(DQNConfig(**ALWAYS)).prepare(played, TablePolicy())
        drawn.append([number_of(item.turns[0].context) for batch in batches for item in batch.trajectories])
    assert drawn[0] == drawn[1] != drawn[2]


def test_it_reports_its_replay(episodes: Episodes) -> None:
    algorithm = DQN(DQNConfig())
    list(algorithm.prepare([episodes(3), episodes(2)], TablePolicy()))
    assert algorithm.report() == {
        "policy/epsilon": 1.0,
        "q/target_updates": 0.0,
        "replay/transitions": 5.0,
        "replay/bytes": float(algorithm.replay.bytes),
    }


@pytest.mark.parametrize("options", [{}, {"dueling": True}])
def test_turns_that_offer_other_choices_are_refused_by_name(episodes: Episodes, options: dict[str, Any]) -> None:
    algorithm = DQN(DQNConfig(**ALWAYS, **options))
    other = episodes(2, choices=3)
    message = rf"turn 1 of episode with seed {other.seed} offers 3 choices and turns before it 4: DQN needs the same"
    with pytest.raises(TrainingError, match=message):
        list(algorithm.prepare([episodes(1), other], TablePolicy({"state_value": 1, "q": 4, "advantage": 4})))


def test_values_of_another_number_of_choices_are_refused(episodes: Episodes) -> None:
    played = [episodes(1, choices=3)]
    with pytest.raises(TrainingError, match="offers 3 choices and the policy has values for 4"):
        list(DQN(DQNConfig(**ALWAYS)).prepare(played, TablePolicy()))
