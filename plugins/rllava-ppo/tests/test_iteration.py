"""What happens between the steps of an iteration, and from one iteration to the next."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from rllava_core.policy.policy import Head, PolicyOutput


def run(algorithm: Any, episodes: Any, policy: Any, **metrics: float) -> int:
    """An iteration whose every step reports these metrics; the number of steps."""
    steps = 0
    batches = algorithm.prepare(episodes, policy)
    sent: dict[str, float] | None = None
    while True:
        try:
            batches.send(sent)
        except StopIteration:
            return steps
        steps += 1
        sent = {"policy/kl_old": 0.0, "policy/kl_reference": 0.0, **metrics}


def test_the_critic_is_a_head_on_the_policy_or_on_a_trunk_of_its_own(bench: Any) -> None:
    assert bench.algorithm().heads == {"value": Head(1)}
    assert bench.algorithm(critic="separate").heads == {"value": Head(1, own_trunk=True)}


def test_the_first_ratio_is_exactly_one_whatever_the_engine_that_sampled_recorded(bench: Any) -> None:
    """The log-probs of every episode say −1, the policy says something else of each."""
    for seed in range(10):
        episodes, policy = bench.random_episodes(seed), bench.policy(seed)
        algorithm = bench.algorithm(minibatches=3, epochs=2)
        for batch in algorithm.prepare(episodes, policy):
            output = policy.output(batch.trajectories)
            assert not torch.any(output.logprobs == -1)
            ratio = algorithm.metrics(batch, output)["policy/ratio"]
            assert torch.equal(ratio, torch.ones_like(ratio))


def test_the_policy_is_evaluated_once_and_the_reference_only_if_there_is_one(bench: Any) -> None:
    episodes = bench.random_episodes(0)
    for options, asked in (({}, [None]), ({"kl_coefficient": 0.1}, ["reference", None])):
        policy = bench.policy()
        list(bench.algorithm(epochs=4, minibatches=4, **options).prepare(episodes, policy))
        assert policy.asked == asked


def test_every_pass_learns_from_every_episode_in_another_order(bench: Any) -> None:
    torch.manual_seed(0)
    episodes = [bench.episode([(2, 1.0)], number=number) for number in range(8)]
    batches = list(bench.algorithm(epochs=3, minibatches=4).prepare(episodes, bench.policy()))
    orders = [[one.seed for batch in batches[4 * k : 4 * k + 4] for one in batch.trajectories] for k in range(3)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(("moved", "steps", "stopped"), [(0.019, 12, 0.0), (0.021, 1, 1.0)])
def test_a_policy_that_moved_too_far_is_left_alone(bench: Any, moved: float, steps: int, stopped: float) -> None:
    episodes = [bench.episode([(2, 1.0)], number=number) for number in range(8)]
    algorithm = bench.algorithm(epochs=3, minibatches=4, target_kl=0.02)
    assert run(algorithm, episodes, bench.policy(), **{"policy/kl_old": moved}) == steps
    assert algorithm.report()["policy/early_stop"] == stopped


def test_it_goes_on_until_the_step_that_moved_too_far(bench: Any) -> None:
    episodes = [bench.episode([(2, 1.0)], number=number) for number in range(2)]
    algorithm = bench.algorithm(epochs=3, minibatches=4, target_kl=0.02)
    batches = algorithm.prepare(episodes, bench.policy())
    next(batches)
    batches.send({"policy/kl_old": 0.01})
    batches.send({"policy/kl_old": 0.02})
    with pytest.raises(StopIteration):
        batches.send({"policy/kl_old": 0.03})
    assert algorithm.report()["policy/early_stop"] == 1.0


def test_the_step_at_which_everything_is_done_does_not_stop_early(bench: Any) -> None:
    """Two groups make two minibatches of four."""
    episodes = [bench.episode([(2, 1.0)], number=number) for number in range(2)]
    algorithm = bench.algorithm(epochs=2, minibatches=4, target_kl=0.02)
    batches = algorithm.prepare(episodes, bench.policy())
    next(batches)
    for _ in range(3):
        batches.send({"policy/kl_old": 0.0})
    with pytest.raises(StopIteration):
        batches.send({"policy/kl_old": 9.0})
    assert algorithm.report()["policy/early_stop"] == 0.0


def test_without_a_target_it_never_stops(bench: Any) -> None:
    algorithm = bench.algorithm(epochs=3)
    assert run(algorithm, bench.random_episodes(0), bench.policy(), **{"policy/kl_old": 1e9}) == 3
    assert "policy/early_stop" not in algorithm.report()


ADAPTIVE = {"kl_coefficient": 0.1, "kl_target": 0.05, "kl_horizon": 10}


@pytest.mark.parametrize(
    ("divergence", "coefficient"),
    [
        (0.05, 0.1),
        (0.0525, 0.1 * (1 + 0.05 / 10)),
        (0.0475, 0.1 * (1 - 0.05 / 10)),
        (0.06, 0.1 * 1.02),
        (5.0, 0.1 * 1.02),
        (0.04, 0.1 * 0.98),
        (0.0, 0.1 * 0.98),
        (-3.0, 0.1 * 0.98),
    ],
)
def test_the_coefficient_follows_the_divergence(bench: Any, divergence: float, coefficient: float) -> None:
    """β ← β·(1 + clip(KL/target − 1, −0.2, 0.2)/10): 5 % above the target raises it by 0.5 %, at most 2 %."""
    algorithm = bench.algorithm(**ADAPTIVE)
    run(algorithm, bench.random_episodes(0), bench.policy(), **{"policy/kl_reference": divergence})
    assert algorithm.kl_coefficient == pytest.approx(coefficient, rel=1e-12)
    assert algorithm.report()["policy/kl_coefficient"] == 0.1, "the one that the iteration had"
    run(algorithm, bench.random_episodes(0), bench.policy(), **{"policy/kl_reference": divergence})
    assert algorithm.report()["policy/kl_coefficient"] == pytest.approx(coefficient, rel=1e-12)


def test_a_longer_horizon_follows_more_slowly(bench: Any) -> None:
    algorithm = bench.algorithm(**{**ADAPTIVE, "kl_horizon": 50})
    run(algorithm, bench.random_episodes(0), bench.policy(), **{"policy/kl_reference": 5.0})
    assert algorithm.kl_coefficient == pytest.approx(0.1 * (1 + 0.2 / 50), rel=1e-12)


def test_the_divergence_is_the_mean_over_the_steps(bench: Any) -> None:
    algorithm = bench.algorithm(epochs=2, **ADAPTIVE)
    batches = algorithm.prepare(bench.random_episodes(0), bench.policy())
    next(batches)
    batches.send({"policy/kl_reference": 0.05})
    with pytest.raises(StopIteration):
        batches.send({"policy/kl_reference": 0.055})
    assert algorithm.kl_coefficient == pytest.approx(0.1 * (1 + 0.05 / 10), rel=1e-12)


def test_the_coefficient_that_was_adapted_is_the_one_in_the_loss_and_in_the_reward(bench: Any) -> None:
    episodes, policy = [bench.episode([(2, 1.0)])], bench.policy()
    for place in ("loss", "reward"):
        algorithm = bench.algorithm(kl_in=place, **ADAPTIVE)
        found = []
        for coefficient in (0.0, 1.0, 2.0):
            algorithm.kl_coefficient = coefficient
            [batch] = algorithm.prepare(episodes, policy)
            reached = float(batch.value_targets[0])
            found.append(float(algorithm.loss(batch, policy.output(episodes)).total) if place == "loss" else reached)
        assert found[1] != pytest.approx(found[0], abs=1e-3)
        assert found[2] - found[1] == pytest.approx(found[1] - found[0], rel=1e-4)


def test_a_fixed_coefficient_stays_and_needs_no_state(bench: Any) -> None:
    algorithm = bench.algorithm(kl_coefficient=0.1)
    run(algorithm, bench.random_episodes(0), bench.policy(), **{"policy/kl_reference": 7.0})
    assert algorithm.kl_coefficient == 0.1
    assert algorithm.state_dict() == {}
    algorithm.load_state_dict({})
    assert algorithm.report()["policy/kl_coefficient"] == 0.1


def test_without_a_reference_no_coefficient_is_reported(bench: Any) -> None:
    algorithm = bench.algorithm()
    run(algorithm, bench.random_episodes(0), bench.policy())
    assert set(algorithm.report()) == {"value/explained_variance"}


def test_a_run_that_was_interrupted_goes_on_with_the_very_same_coefficient(bench: Any) -> None:
    whole, first, second = (bench.algorithm(**ADAPTIVE) for _ in range(3))
    for step in range(6):
        if step == 3:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for one in (whole, first if step < 3 else second):
            run(one, bench.random_episodes(step), bench.policy(), **{"policy/kl_reference": 0.045 + step / 300})
    assert second.kl_coefficient == whole.kl_coefficient
    assert second.state_dict() == whole.state_dict()


def test_metrics_that_are_not_sent_change_nothing(bench: Any) -> None:
    """Whoever only loops over the batches tells nothing of the steps."""
    algorithm = bench.algorithm(epochs=2, target_kl=1e-9, **ADAPTIVE)
    assert len(list(algorithm.prepare(bench.random_episodes(0), bench.policy()))) == 2
    assert algorithm.kl_coefficient == 0.1


def test_one_decision_alone_gives_finite_numbers(bench: Any) -> None:
    algorithm = bench.algorithm(whiten=True, value_clip=0.2, dual_clip=2.0)
    episodes, policy = [bench.episode([(None, 1.0)])], bench.policy()
    [batch] = algorithm.prepare(episodes, policy)
    assert batch.advantages.tolist() == [0.0]
    loss = algorithm.loss(batch, policy.output(episodes))
    assert all(bool(torch.isfinite(value)) for value in (loss.total, *loss.metrics.values()))
    assert algorithm.report() == {"value/explained_variance": 0.0}


def test_columns_have_the_precision_of_the_policy(bench: Any) -> None:
    episodes, policy = bench.random_episodes(0), bench.policy()
    evaluate = policy.evaluate

    def narrow(*asked: Any) -> PolicyOutput:
        output = evaluate(*asked)
        heads, final = ({"value": head["value"].float()} for head in (output.heads, output.final))
        return PolicyOutput(output.logprobs.float(), output.entropies.float(), heads, final)

    policy.evaluate = narrow
    batch = bench.prepared(episodes, policy, gae="both", whiten=True)
    assert {column.dtype for column in batch.columns.values()} == {torch.float32}
