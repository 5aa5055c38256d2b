"""Advantages and value targets of the three levels, against the formulas written as recursions and worked by hand."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_ppo.advantages import explained_variance, gae, whitened

Numbers = list[float]


def chain(rewards: Numbers, values: Numbers, after: float, gamma: float, lam: float) -> Numbers:
    """Every advantage from its definition: Σ_k (γλ)^(k−s) δ_k."""

    def delta(s: int) -> float:
        following = values[s + 1] if s + 1 < len(values) else after
        return rewards[s] + gamma * following - values[s]

    return [sum((gamma * lam) ** (k - s) * delta(k) for k in range(s, len(values))) for s in range(len(values))]


def naive(
    level: str,
    trajectory: Trajectory,
    penalties: Numbers,
    values: Numbers,
    final: float,
    gamma: float,
    lam: float,
    turn_gamma: float,
    turn_lam: float,
) -> tuple[Numbers, Numbers, Numbers]:
    """Advantages, targets and weights of the values' loss of one trajectory.

    penalties: what each decision pays for its divergence from the reference.
    """
    after = 0.0 if trajectory.terminated else final
    lengths = [turn.action.decisions for turn in trajectory.turns]
    starts = [sum(lengths[:t]) for t in range(len(lengths))]
    own = [-penalty for penalty in penalties]
    if level == "token":
        for t, turn in enumerate(trajectory.turns):
            own[starts[t] + lengths[t] - 1] += turn.reward
        advantages = chain(own, values, after, gamma, lam)
        return advantages, [a + v for a, v in zip(advantages, values, strict=True)], [1.0] * len(values)

    paid = [sum(own[start : start + n]) for start, n in zip(starts, lengths, strict=True)]
    earned = [turn.reward + cost for turn, cost in zip(trajectory.turns, paid, strict=True)]
    firsts = [values[start] for start in starts]
    of_turns = chain(earned, firsts, after, turn_gamma, turn_lam)
    if level == "turn":
        advantages = [a for a, n in zip(of_turns, lengths, strict=True) for _ in range(n)]
        targets = [a + v for a, v, n in zip(of_turns, firsts, lengths, strict=True) for _ in range(n)]
        weights = [float(n) if place == 0 else 0.0 for n in lengths for place in range(n)]
        return advantages, targets, weights

    advantages = []
    for start, n, a, cost in zip(starts, lengths, of_turns, paid, strict=True):
        worth = a + values[start]
        inner = [*own[start : start + n]]
        # The turn was worth its reward, what its decisions paid, and what followed; what they paid is counted by them.
        inner[-1] += worth - cost
        advantages += chain(inner, values[start : start + n], 0.0, gamma, lam)
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)], [1.0] * len(values)


FACTORS = [
    (1.0, 1.0, 1.0, 1.0),
    (0.97, 0.9, 0.93, 0.8),
    (1.0, 0.95, 0.9, 1.0),
    (0.5, 0.0, 1.0, 0.3),
    (0.0, 1.0, 0.0, 0.5),
]


def options_of(level: str, factors: tuple[float, float, float, float]) -> dict[str, Any]:
    gamma, lam, turn_gamma, turn_lam = factors
    options: dict[str, Any] = {"gae": level}
    if level != "turn":
        options |= {"gamma": gamma, "lam": lam}
    if level != "token":
        options |= {"turn_gamma": turn_gamma, "turn_lam": turn_lam}
    return options


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("level", ["token", "turn", "both"])
def test_estimates_equal_the_formulas_on_random_episodes(
    bench: Any, level: str, penalised: bool, factors: tuple[float, float, float, float]
) -> None:
    kinds = set()
    for seed in range(25):
        episodes = bench.random_episodes(seed)
        policy = bench.policy(seed)
        options = options_of(level, factors)
        if penalised:
            options |= {"kl_coefficient": 0.3, "kl_estimator": "k1", "kl_in": "reward"}
        batch = bench.prepared(episodes, policy, **options)
        output = policy.output(episodes)
        reference = policy.output(episodes, 1).logprobs.float()
        place = 0
        for number, trajectory in enumerate(episodes):
            here = slice(place, place + trajectory.decisions)
            place += trajectory.decisions
            penalties = [0.0] * trajectory.decisions
            if penalised:
                # Of the policy that sampled, whose log-probs are all −1.
                penalties = [0.3 * (-1 - value) for value in reference[here].tolist()]
            values = output.heads["value"][here, 0].tolist()
            final = float(output.final["value"][number, 0])
            expected = naive(level, trajectory, penalties, values, final, *factors)
            # Rewards are float32; without penalties those of these episodes are exact in it.
            tolerance = 1e-6 if penalised else 1e-12
            for column, numbers in zip(("advantages", "value_targets", "value_weights"), expected, strict=True):
                found = batch.columns[column][here].tolist()
                assert found == pytest.approx(numbers, rel=tolerance, abs=tolerance), (seed, number, column)
            kinds.add((trajectory.terminated, len(trajectory.turns) == 1, trajectory.turns[-1].action.choice is None))
        assert place == len(batch.advantages)
    assert len(kinds) == 8, "an ending was not tried"


def test_two_turns_of_two_tokens_by_hand(bench: Any) -> None:
    """γ = ½, λ = ½; V = 1, 2, 3, 4; rewards 0, 1 | 0, 8; terminated.

    δ = 0 + 1 − 1, 1 + 1.5 − 2, 0 + 2 − 3, 8 − 4 = 0, 0.5, −1, 4;
    A₄ = 4, A₃ = −1 + 1 = 0, A₂ = 0.5 + 0 = 0.5, A₁ = 0 + 0.125 = 0.125.
    """
    policy = bench.policy(values={0: [1, 2, 3, 4]})
    batch = bench.prepared([bench.episode([(2, 1.0), (2, 8.0)])], policy, gamma=0.5, lam=0.5)
    assert batch.advantages.tolist() == [0.125, 0.5, 0.0, 4.0]
    assert batch.value_targets.tolist() == [1.125, 2.5, 3.0, 8.0]
    assert batch.value_weights.tolist() == [1, 1, 1, 1]


def test_the_same_cut_off_by_hand(bench: Any) -> None:
    """V = 6 in the state it was left in: δ₄ = 8 + 3 − 4 = 7, A₃ = −1 + 1.75, A₂ = 0.5 + 0.1875, A₁ = 0.171875."""
    policy = bench.policy(values={0: [1, 2, 3, 4]}, final={0: 6.0})
    batch = bench.prepared([bench.episode([(2, 1.0), (2, 8.0)], terminated=False)], policy, gamma=0.5, lam=0.5)
    assert batch.advantages.tolist() == [0.171875, 0.6875, 0.75, 7.0]


def test_turns_by_hand(bench: Any) -> None:
    """V₁ = 1, V₂ = 3: δ₂ = 8 − 3 = 5; δ₁ = 1 + ½·3 − 1 = 1.5; A₁ = 1.5 + ¼·5 = 2.75; G = 3.75 and 8."""
    policy = bench.policy(values={0: [1, 2, 3, 4]})
    batch = bench.prepared([bench.episode([(2, 1.0), (2, 8.0)])], policy, gae="turn", turn_gamma=0.5, turn_lam=0.5)
    assert batch.advantages.tolist() == [2.75, 2.75, 5.0, 5.0]
    assert batch.value_targets.tolist() == [3.75, 3.75, 8.0, 8.0]
    assert batch.value_weights.tolist() == [2, 0, 2, 0]


def test_both_levels_by_hand(bench: Any) -> None:
    """G = 3.75 and 8 as above. Inside, with γ = 1 and λ = ½: δ = 2 − 1, 3.75 − 2 | 4 − 3, 8 − 4."""
    policy = bench.policy(values={0: [1, 2, 3, 4]})
    batch = bench.prepared(
        [bench.episode([(2, 1.0), (2, 8.0)])], policy, gae="both", gamma=1.0, lam=0.5, turn_gamma=0.5, turn_lam=0.5
    )
    assert batch.advantages.tolist() == [1 + 1.75 / 2, 1.75, 1 + 4 / 2, 4.0]
    assert batch.value_targets.tolist() == [2.875, 3.75, 6.0, 8.0]


def test_with_one_decision_a_turn_all_levels_agree(bench: Any) -> None:
    for seed in range(20):
        turns = [(None if place % 2 else 1, 0.5 * place - seed % 3) for place in range(1 + seed % 5)]
        episodes = [bench.episode(turns, terminated=seed % 2 == 0), bench.episode(turns[:1], number=1)]
        penalty = {"kl_coefficient": 0.2, "kl_in": "reward"} if seed % 3 else {}
        batches = [
            bench.prepared(episodes, bench.policy(seed), **options_of(level, (0.9, 0.8, 0.9, 0.8)), **penalty)
            for level in ("token", "turn", "both")
        ]
        for other in batches[1:]:
            for name in ("advantages", "value_targets", "value_weights"):
                torch.testing.assert_close(other.columns[name], batches[0].columns[name], rtol=1e-12, atol=1e-12)


def test_with_all_factors_one_an_advantage_is_the_return_to_come_less_the_value(bench: Any) -> None:
    """Monte Carlo, at the levels of tokens and of both alike."""
    trajectory = bench.episode([(3, 1.0), (None, -2.0), (2, 4.0)])
    policy = bench.policy(3)
    values = policy.output([trajectory]).heads["value"][:, 0]
    to_come = torch.tensor([3.0, 3.0, 3.0, 2.0, 4.0, 4.0], dtype=torch.float64)
    for level in ("token", "both"):
        batch = bench.prepared([trajectory], policy, **options_of(level, (1.0, 1.0, 1.0, 1.0)))
        torch.testing.assert_close(batch.advantages, to_come - values)
        torch.testing.assert_close(batch.value_targets, to_come)


@pytest.mark.parametrize("level", ["token", "turn", "both"])
def test_a_decision_s_penalty_is_counted_once(bench: Any, level: str) -> None:
    """With all factors 1, the target of the first value is the whole return, every penalty in it once."""
    trajectory = bench.episode([(3, 1.0), (2, 2.0)])
    policy = bench.policy(1)
    reference = policy.output([trajectory], 1).logprobs
    options = options_of(level, (1.0, 1.0, 1.0, 1.0)) | {"kl_coefficient": 0.5, "kl_estimator": "k1", "kl_in": "reward"}
    batch = bench.prepared([trajectory], policy, **options)
    expected = 3.0 - 0.5 * float((-1 - reference).sum())
    assert float(batch.value_targets[0]) == pytest.approx(expected, abs=1e-6)


def test_an_episode_that_was_cut_without_the_state_it_was_left_in_is_refused(bench: Any) -> None:
    whole = bench.episode([(2, 1.0)])
    broken = replace(bench.episode([(2, 1.0)], terminated=False, number=7), final=None)
    with pytest.raises(TrainingError, match=r"seed 7.*cut \(turns\).*Trajectory.final"):
        bench.prepared([whole, broken])


def test_an_episode_that_terminated_is_worth_nothing_afterwards_whatever_the_head_says(bench: Any) -> None:
    policy = bench.policy(values={0: [0.5]})
    output = policy.evaluate
    policy.evaluate = lambda *of: _with_final(output(*of), 100.0)
    assert bench.prepared([bench.episode([(1, 2.0)])], policy).advantages.tolist() == [1.5]


def _with_final(output: Any, value: float) -> Any:
    return replace(output, final={"value": torch.full_like(output.final["value"], value)})


def test_fifty_thousand_decisions_take_less_than_half_a_second() -> None:
    lengths = torch.full((500,), 100)
    started = time.perf_counter()
    found = gae(torch.rand(50_000), torch.rand(50_000), torch.rand(500), lengths, 0.99, 0.95)
    assert time.perf_counter() - started < 0.5
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 3.0], [-1.0, 1.0]),
        ([0.0, 0.0, 3.0], [-(0.5**0.5), -(0.5**0.5), 2**0.5]),
        ([5.0], [0.0]),
        ([0.1, 0.1, 0.1], [0.0, 0.0, 0.0]),
        ([-1e6, -1e6], [0.0, 0.0]),
    ],
)
def test_whitening(values: list[float], expected: list[float]) -> None:
    assert whitened(torch.tensor(values, dtype=torch.float64)).tolist() == pytest.approx(expected, abs=1e-6)


def test_advantages_are_whitened_over_the_step_after_the_targets_were_made_of_them(bench: Any) -> None:
    episodes = bench.random_episodes(4)
    plain, white = (bench.prepared(episodes, whiten=whiten) for whiten in (False, True))
    assert torch.equal(plain.value_targets, white.value_targets)
    assert float(white.advantages.mean()) == pytest.approx(0, abs=1e-12)
    assert float(white.advantages.std(correction=0)) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(
        white.advantages * plain.advantages.std(correction=0) + plain.advantages.mean(), plain.advantages
    )


@pytest.mark.parametrize(
    ("values", "targets", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1.0),
        ([7.0, 8.0, 9.0], [1.0, 2.0, 3.0], 1.0),
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.0),
        ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], -3.0),
        ([0.0, 4.0], [1.0, 1.0], 0.0),
        ([1.0], [3.0], 0.0),
    ],
)
def test_explained_variance(values: list[float], targets: list[float], expected: float) -> None:
    """A constant error is no variance; the mean explains nothing; the opposite is worse: 1 − 4·Var/Var."""
    assert explained_variance(torch.tensor(values), torch.tensor(targets)) == pytest.approx(expected)


def test_the_values_that_are_learnt_are_those_that_explain(bench: Any) -> None:
    """At the level of turns, the second token's value of 100 is nobody's business."""
    episodes = [bench.episode([(2, 1.0)]), bench.episode([(2, 3.0)], number=1)]
    policy = bench.policy(values={0: [1.0, 100.0], 1: [2.0, -100.0]})
    algorithm = bench.algorithm(gae="turn")
    list(algorithm.prepare(episodes, policy))
    # Targets 1 and 3 (variance 1), errors 0 and 1 (variance ¼).
    assert algorithm.report() == {"value/explained_variance": 0.75}
