"""The base of policy-gradient algorithms against loops over trajectories and decisions in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rllava_core.algorithms.config import PolicyGradientConfig
from rllava_core.algorithms.policy_gradient import PolicyGradient, Rollouts
from rllava_core.algorithms.protocol import Batch
from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.policy import PolicyOutput


class Reinforce(PolicyGradient):
    """The return pushes the log-prob."""

    def advantages(self, rollouts: Rollouts) -> Tensor:
        return rollouts.returns

    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        return -output.logprobs * batch.advantages

    def metrics(self, batch: Batch, output: PolicyOutput) -> dict[str, Tensor]:
        return {"policy/logprob": output.logprobs}


def reinforce(**options: Any) -> Reinforce:
    return Reinforce(PolicyGradientConfig(**options))


@pytest.fixture
def trajectories(make: Any) -> list[Trajectory]:
    """Three groups; one turn and several, text and choices."""
    shapes = [(3,), (1,), (4, 2), (0,), (0, 5), (2,)]
    return [make.trajectory(place // 2, turns, score=0.5 * place - 1, seed=place) for place, turns in enumerate(shapes)]


def only(batches: Any) -> Batch:
    [batch] = batches
    assert isinstance(batch, Batch)
    return batch


def divergence(estimator: str, logprob: float, reference: float) -> float:
    ratio = reference - logprob
    return {"k1": -ratio, "k2": ratio**2 / 2, "k3": math.exp(ratio) - 1 - ratio}[estimator]


def per_decision(trajectories: list[Trajectory], value: Callable[[Trajectory], float]) -> list[float]:
    return [value(trajectory) for trajectory in trajectories for _ in range(trajectory.decisions)]


def test_every_decision_gets_its_own_trajectory_s_advantage_and_old_logprob(
    make: Any, access: Any, trajectories: list[Trajectory]
) -> None:
    batch = only(reinforce().prepare(trajectories, access()))

    expected = per_decision(trajectories, lambda trajectory: trajectory.episode_return)
    assert batch.trajectories == tuple(trajectories)
    assert batch.advantages.tolist() == pytest.approx(expected)
    old = [value for trajectory in trajectories for action in trajectory.actions for value in action.logprobs.tolist()]
    assert batch.old_logprobs.tolist() == old


def test_advantages_may_be_given_for_every_decision(access: Any, trajectories: list[Trajectory]) -> None:
    class Numbered(Reinforce):
        def advantages(self, rollouts: Rollouts) -> Tensor:
            return torch.arange(len(rollouts.old_logprobs)).float()

    batch = only(Numbered(PolicyGradientConfig()).prepare(trajectories, access()))
    assert batch.advantages.tolist() == list(range(sum(trajectory.decisions for trajectory in trajectories)))


def test_a_reward_is_that_of_the_last_decision_of_its_turn(trajectories: list[Trajectory]) -> None:
    """And the reward functions', which come at the end, that of the last turn's."""
    rollouts = Rollouts.of(trajectories)

    rewards: list[float] = []
    turns: list[float] = []
    for item in trajectories:
        for number, action in enumerate(item.actions):
            earned = 0.25 + (item.score if number == len(item.actions) - 1 else 0.0)
            rewards += [0.0] * (action.decisions - 1) + [earned]
            turns.append(earned)
    assert rollouts.rewards.tolist() == pytest.approx(rewards)
    assert rollouts.turn_rewards.tolist() == pytest.approx(turns)
    assert rollouts.returns.tolist() == pytest.approx([item.episode_return for item in trajectories])
    assert rollouts.turns.tolist() == [1, 1, 2, 1, 2, 1]
    assert rollouts.turn_decisions.tolist() == [3, 1, 4, 2, 1, 1, 5, 2]
    assert rollouts.decisions.tolist() == [item.decisions for item in trajectories]


def test_advantages_may_be_given_for_every_turn(access: Any, trajectories: list[Trajectory]) -> None:
    class OfTurns(Reinforce):
        def advantages(self, rollouts: Rollouts) -> Tensor:
            return torch.arange(len(rollouts.turn_decisions)).float()

    batch = only(OfTurns(PolicyGradientConfig()).prepare(trajectories, access()))

    actions = [action for item in trajectories for action in item.actions]
    assert batch.advantages.tolist() == [
        number for number, action in enumerate(actions) for _ in range(action.decisions)
    ]


def test_divergence_in_the_reward_lowers_the_reward_of_each_decision(
    make: Any, access: Any, trajectories: list[Trajectory]
) -> None:
    reference = make.output(trajectories, seed=9)
    lowered: list[Tensor] = []

    class Watching(Reinforce):
        def advantages(self, rollouts: Rollouts) -> Tensor:
            lowered.append(rollouts.rewards)
            return super().advantages(rollouts)

    config = PolicyGradientConfig(kl_coefficient=0.4, kl_estimator="k1", kl_in="reward")
    list(Watching(config).prepare(trajectories, access(reference)))

    plain = Rollouts.of(trajectories)
    gap = plain.old_logprobs - reference.logprobs.detach()
    torch.testing.assert_close(lowered[0].double(), plain.rewards - 0.4 * gap.double(), rtol=0, atol=1e-6)


def test_a_subclass_may_stop_before_the_last_minibatch(access: Any, trajectories: list[Trajectory]) -> None:
    class Stopping(Reinforce):
        def stops(self, metrics: Mapping[str, float]) -> bool:
            return metrics["policy/kl"] > 1

    batches = Stopping(PolicyGradientConfig(epochs=3, minibatches=2)).prepare(trajectories, access())
    next(batches)
    batches.send({"policy/kl": 0.5})
    batches.send({"policy/kl": 1.0})
    with pytest.raises(StopIteration):
        batches.send({"policy/kl": 1.5})
    # One that is told nothing goes on to the end.
    assert len(list(Stopping(PolicyGradientConfig(epochs=3, minibatches=2)).prepare(trajectories, access()))) == 6


def test_by_default_the_policy_acts_as_itself_and_nothing_more_is_reported(trajectories: list[Trajectory]) -> None:
    algorithm = reinforce()
    assert algorithm.behaviour().is_policy
    assert algorithm.report() == {}
    assert (algorithm.copies, reinforce(kl_coefficient=0.1).copies) == ((), ("reference",))


def test_advantages_are_taken_once_however_many_epochs_follow(access: Any, trajectories: list[Trajectory]) -> None:
    """An algorithm may keep a running mean in them."""
    calls = []

    class Counting(Reinforce):
        def advantages(self, rollouts: Rollouts) -> Tensor:
            calls.append(rollouts)
            return super().advantages(rollouts)

    batches = list(Counting(PolicyGradientConfig(epochs=3, minibatches=2)).prepare(trajectories, access()))

    assert len(batches) == 6
    assert len(calls) == 1


@pytest.mark.parametrize(("aggregation", "length"), [("sequence", None), ("token", None), ("constant", 12)])
@pytest.mark.parametrize("entropy", [0.0, 0.3, -0.2])
@pytest.mark.parametrize(("coefficient", "estimator"), [(0.0, "k3"), (0.7, "k2"), (0.7, "k3")])
def test_the_loss_is_the_sum_in_the_docstring(
    make: Any,
    access: Any,
    trajectories: list[Trajectory],
    aggregation: str,
    length: int | None,
    entropy: float,
    coefficient: float,
    estimator: str,
) -> None:
    output = make.output(trajectories)
    reference = make.output(trajectories, seed=9)
    algorithm = reinforce(
        aggregation=aggregation,
        aggregation_length=length,
        entropy_coefficient=entropy,
        kl_coefficient=coefficient,
        kl_estimator=estimator,
    )
    batch = only(algorithm.prepare(trajectories, access(reference)))
    total = 0.0
    means: dict[str, float] = dict.fromkeys(("policy/entropy", "policy/logprob", "policy/kl_reference"), 0.0)
    place = 0
    decisions = sum(trajectory.decisions for trajectory in trajectories)
    for trajectory in trajectories:
        for _ in range(trajectory.decisions):
            logprob, bonus = output.logprobs[place].item(), output.entropies[place].item()
            gap = divergence(estimator, logprob, reference.logprobs[place].item())
            weight = {
                "sequence": 1 / len(trajectories) / trajectory.decisions,
                "token": 1 / decisions,
                "constant": 1 / len(trajectories) / (length or 1),
            }[aggregation]
            total += weight * (-logprob * trajectory.episode_return - entropy * bonus + coefficient * gap)
            means["policy/entropy"] += bonus / decisions
            means["policy/logprob"] += logprob / decisions
            means["policy/kl_reference"] += gap / decisions
            place += 1

    loss = algorithm.loss(batch, output)

    assert loss.total.item() == pytest.approx(total, rel=1e-6, abs=1e-9)
    if coefficient == 0:
        del means["policy/kl_reference"]
    assert {name: value.item() for name, value in loss.metrics.items()} == pytest.approx(
        {"policy/loss": total, **means}, rel=1e-6, abs=1e-9
    )
    assert not any(value.requires_grad for value in loss.metrics.values())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence_in_the_reward_lowers_the_return_and_leaves_the_loss_alone(
    make: Any, access: Any, trajectories: list[Trajectory], estimator: str
) -> None:
    """By what the policy that sampled, not the current one, diverges from the reference, summed over decisions."""
    reference = make.output(trajectories, seed=9)
    options = {"kl_coefficient": 0.4, "kl_estimator": estimator, "kl_in": "reward"}
    algorithm = reinforce(**options)
    asked = access(reference)
    batch = only(algorithm.prepare(trajectories, asked))

    expected, place = [], 0
    for trajectory in trajectories:
        lowered = trajectory.episode_return
        for action in trajectory.actions:
            for old in action.logprobs.tolist():
                lowered -= 0.4 * divergence(estimator, old, reference.logprobs[place].item())
                place += 1
        expected += [lowered] * trajectory.decisions
    assert batch.advantages.tolist() == pytest.approx(expected, rel=1e-5)
    assert asked.asked == [tuple(trajectories)]

    output = make.output(trajectories, seed=4)
    bare = reinforce().loss(batch, output)
    loss = algorithm.loss(batch, output)
    assert loss.total.item() == pytest.approx(bare.total.item())
    gaps = [
        divergence(estimator, p, q) for p, q in zip(output.logprobs.tolist(), reference.logprobs.tolist(), strict=True)
    ]
    assert loss.metrics["policy/kl_reference"].item() == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)


def test_without_a_coefficient_the_reference_is_not_asked(access: Any, trajectories: list[Trajectory]) -> None:
    algorithm = reinforce(kl_coefficient=0.0)
    asked = access()
    batch = only(algorithm.prepare(trajectories, asked))
    assert not algorithm.copies
    assert asked.asked == []
    assert "reference_logprobs" not in batch.columns


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("minibatches", [1, 2, 3, 4, 7, 50])
def test_minibatches_cover_everything_once_an_epoch_and_never_split_a_group(
    make: Any, access: Any, minibatches: int, interleaved: bool
) -> None:
    groups = [0, 1, 2, 0, 1, 2, 6, 6, 5, 4] if interleaved else [0, 0, 1, 1, 2, 2, 4, 5, 6, 6]
    trajectories = [make.trajectory(group, (1 + seed % 3,), seed=seed) for seed, group in enumerate(groups)]
    torch.manual_seed(3)

    batches = list(reinforce(epochs=3, minibatches=minibatches).prepare(trajectories, access()))

    count = min(minibatches, len(set(groups)))
    assert len(batches) == 3 * count
    for epoch in range(3):
        own = batches[epoch * count : (epoch + 1) * count]
        seen = [id(trajectory) for batch in own for trajectory in batch.trajectories]
        assert Counter(seen) == Counter(id(trajectory) for trajectory in trajectories)
        labels = [{trajectory.group for trajectory in batch.trajectories} for batch in own]
        assert sum(map(len, labels)) == len(set(groups))
        assert max(map(len, labels)) - min(map(len, labels)) <= 1


def test_minibatches_differ_from_epoch_to_epoch_and_repeat_with_the_seed(make: Any, access: Any) -> None:
    trajectories = [make.trajectory(group) for group in range(20)]

    def order(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        batches = reinforce(epochs=2, minibatches=4).prepare(trajectories, access())
        return [[trajectory.group for trajectory in batch.trajectories] for batch in batches]

    assert order(0)[:4] != order(0)[4:]
    assert order(0) == order(0) != order(1)


def test_a_minibatch_has_the_rows_of_its_own_trajectories_and_its_own_weights(
    make: Any, access: Any, trajectories: list[Trajectory]
) -> None:
    reference = make.output(trajectories, seed=9)
    rows: dict[int, list[int]] = {}
    place = 0
    for trajectory in trajectories:
        rows[id(trajectory)] = list(range(place, place + trajectory.decisions))
        place += trajectory.decisions
    old = [float(value) for trajectory in trajectories for value in trajectory.behaviour_logprobs]

    for batch in reinforce(epochs=2, minibatches=3, kl_coefficient=0.1).prepare(trajectories, access(reference)):
        own = [row for trajectory in batch.trajectories for row in rows[id(trajectory)]]
        assert batch.old_logprobs.tolist() == [old[row] for row in own]
        assert batch.reference_logprobs.tolist() == pytest.approx(reference.logprobs[own].tolist())
        mine = list(batch.trajectories)
        assert batch.advantages.tolist() == pytest.approx(per_decision(mine, lambda one: one.episode_return))
        weights = [value / len(mine) for value in per_decision(mine, lambda one: 1 / one.decisions)]
        assert batch.weights.tolist() == pytest.approx(weights)
        assert batch.share.tolist() == pytest.approx([1 / len(own)] * len(own))


@pytest.mark.parametrize("tokens", [1, 20, 10**6])
def test_loss_and_metrics_add_up_over_micro_batches(
    make: Any, access: Any, trajectories: list[Trajectory], tokens: int
) -> None:
    reference = make.output(trajectories, seed=9)
    algorithm = reinforce(kl_coefficient=0.5, entropy_coefficient=0.1)
    batch = only(algorithm.prepare(trajectories, access(reference)))
    output = make.output(trajectories)
    whole = algorithm.loss(batch, output)

    parts, start = [], 0
    for micro in batch.split(tokens):
        end = start + len(micro.weights)
        parts.append(algorithm.loss(micro, PolicyOutput(output.logprobs[start:end], output.entropies[start:end], {})))
        start = end

    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-6)
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-6)


def test_a_subclass_must_say_what_it_learns(access: Any, trajectories: list[Trajectory]) -> None:
    with pytest.raises(NotImplementedError, match=r"PolicyGradient must define advantages\(\)"):
        list(PolicyGradient(PolicyGradientConfig()).prepare(trajectories, access()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "constant"}, "aggregation_length goes with"),
        ({"aggregation": "token", "aggregation_length": 5}, "aggregation_length goes with"),
        ({"kl_estimator": "k1", "kl_coefficient": 0.1}, "k1 has no useful gradient in the loss"),
        ({"kl_coefficient": -0.1}, "kl_coefficient"),
        ({"entropy_coefficient": math.nan}, "entropy_coefficient"),
        ({"epochs": 0}, "epochs"),
        ({"minibatches": 0}, "minibatches"),
        ({"group_size": 0}, "group_size"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"discount": 0.9}, "discount"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PolicyGradientConfig(**options)


@pytest.mark.parametrize(
    "options",
    [{"kl_estimator": "k1"}, {"kl_estimator": "k1", "kl_coefficient": 0.1, "kl_in": "reward"}],
)
def test_the_estimator_k1_is_allowed_where_nothing_is_differentiated(options: dict[str, Any]) -> None:
    PolicyGradientConfig(**options)


@pytest.mark.parametrize(
    "wrong",
    [lambda r: r.returns[1:], lambda r: r.old_logprobs[:-1], lambda r: torch.cat([r.old_logprobs, r.returns])],
    ids=["one trajectory too few", "one decision too few", "too many"],
)
def test_advantages_of_another_length_are_refused_and_not_cut_to_fit(
    trajectories: list[Trajectory], wrong: Callable[[Rollouts], Tensor]
) -> None:
    class Wrong(Reinforce):
        def advantages(self, rollouts: Rollouts) -> Tensor:
            return wrong(rollouts)

    with pytest.raises(TrainingError, match=r"'advantages' has shape \(\d+,\) for \d+ decisions: expected one row"):
        list(Wrong(PolicyGradientConfig()).prepare(trajectories, Any))


def test_a_loss_of_another_shape_is_refused_and_not_broadcast(trajectories: list[Trajectory], make: Any) -> None:
    class Mean(Reinforce):
        def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
            return super().token_loss(batch, output).mean()

    algorithm = Mean(PolicyGradientConfig())
    batch = only(algorithm.prepare(trajectories, Any))

    with pytest.raises(
        TrainingError, match=r"token_loss\(\) returned shape \(\) for \d+ decisions: expected one number"
    ):
        algorithm.loss(batch, make.output(trajectories))


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_importance_weighs_what_another_policy_than_the_trained_one_has_sampled(
    make: Any, trajectories: list[Trajectory], per: str
) -> None:
    trained = make.output(trajectories, seed=3)

    class Trained:
        def evaluate(self, asked: Any, copy: str | None = None) -> PolicyOutput:
            assert copy is None
            assert tuple(asked) == tuple(trajectories)
            return trained

        def update_copy(self, copy: str, rate: float = 1.0) -> None: ...

    algorithm = reinforce(importance=per, importance_cap=1.2)
    batch = only(algorithm.prepare(trajectories, Trained()))

    place, weights = 0, []
    for trajectory in trajectories:
        own = trained.logprobs[place : place + trajectory.decisions].tolist()
        place += trajectory.decisions
        ratios = [math.exp(new - old) for new, old in zip(own, trajectory.behaviour_logprobs.tolist(), strict=True)]
        weights += [min(r, 1.2) for r in ratios] if per == "token" else [min(math.prod(ratios), 1.2)] * len(own)
    returns = per_decision(trajectories, lambda trajectory: trajectory.episode_return)
    assert batch.old_logprobs.tolist() == pytest.approx(trained.logprobs.tolist())
    assert batch.advantages.tolist() == pytest.approx([w * r for w, r in zip(weights, returns, strict=True)], rel=1e-5)
    metrics = algorithm.loss(batch, trained).metrics
    assert float(metrics["policy/importance"]) == pytest.approx(sum(weights) / len(weights), rel=1e-5)
    truncated = sum(weight >= 1.2 for weight in weights) / len(weights)
    assert 0 < truncated < 1
    assert float(metrics["policy/importance_truncated"]) == pytest.approx(truncated)
