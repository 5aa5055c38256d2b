"""Generalized advantage estimates of decisions, of turns, and of both, and what belongs to them.

All in float64 and without gradients. The D decisions, in T turns of N trajectories, lie one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rllava_core.algorithms.maths import sums


@dataclass(frozen=True)
class Estimates:
    """What a critic says of the decisions of a step.

    advantages: [D].
    targets: [D] what the values should have been, advantage + value.
    weights: [D] how often the value of a decision's state counts in the value loss; their sum is D.
    """

    advantages: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Episodes:
    """What estimates are made of.

    rewards: [D] of each decision. values: [D] of the state of each decision.
    final: [N] value of the state after the last decision: zero where the episode terminated.
    turns: [N] number of turns of each trajectory. turn_decisions: [T] number of decisions of each turn.
    """

    rewards: Tensor
    values: Tensor
    final: Tensor
    turns: Tensor
    turn_decisions: Tensor


def token_estimates(episodes: Episodes, gamma: float, lam: float) -> Estimates:
    """Every decision is a step of one chain through all turns of its episode."""
    decisions = sums(episodes.turn_decisions, episodes.turns)
    advantages = gae(episodes.rewards, episodes.values, episodes.final, decisions, gamma, lam)
    values = episodes.values.double()
    return Estimates(advantages, advantages + values, torch.ones_like(values))


def turn_estimates(episodes: Episodes, gamma: float, lam: float) -> Estimates:
    """Every turn is a step, which earns the sum of its decisions' rewards, and all its decisions have its advantage.

    The value of a turn is that of the state of its first decision, so only that one is learnt. It counts as often as
    the turn has decisions: each of these is pushed by it.
    """
    advantages, targets = _of_turns(episodes, gamma, lam)
    lengths = episodes.turn_decisions
    weights = torch.zeros(len(episodes.values), dtype=torch.float64)
    weights[_first(lengths)] = lengths.double()
    return Estimates(advantages.repeat_interleave(lengths), targets.repeat_interleave(lengths), weights)


def two_level_estimates(episodes: Episodes, gamma: float, lam: float, turn_gamma: float, turn_lam: float) -> Estimates:
    """Turns first, as in `turn_estimates`; then each turn is a chain of decisions that earns what the turn was worth.

    With A_t the advantage of turn t, V_t its value and r_t its reward, the turn was worth G_t = A_t + V_t. Its last
    decision earns G_t − r_t, what came after the turn, beside its own reward. Rewards of single decisions (a penalty of
    the divergence from the reference) so count once, where they were earned; where only the last decision earns
    anything, as without such penalties, the chain is a terminal reward of G_t.

    After VAGEN (arXiv:2510.16907, Bi-Level GAE), where the value of a turn is that of the state after its last token
    and the token chain begins with the turn's advantage; here a turn's value is that of the state in which it begins,
    so that with one decision a turn all three estimates agree.
    """
    _, worth = _of_turns(episodes, turn_gamma, turn_lam)
    lengths = episodes.turn_decisions
    rewards = episodes.rewards.double()
    rewards[lengths.cumsum(0) - 1] += worth - sums(episodes.rewards.double(), lengths)
    advantages = gae(rewards, episodes.values, torch.zeros(len(lengths)), lengths, gamma, lam)
    values = episodes.values.double()
    return Estimates(advantages, advantages + values, torch.ones_like(values))


def gae(rewards: Tensor, values: Tensor, final: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """[S] float64 generalized advantage estimates of chains of steps, one after another (arXiv:1506.02438, eq. 16).

    With V after the last step of a chain the final value, δ_s = r_s + γ·V_{s+1} − V_s and A_s = δ_s + γλ·A_{s+1}.

    rewards, values: [S] of each step. final: [C] of each chain. lengths: [C] number of steps of each chain.
    """
    r, v, after = _numbers(rewards), _numbers(values), _numbers(final)
    advantages = [0.0] * len(r)
    # Python's numbers: a step waits for the one after it, and arithmetic on tensors of one number is 50 times slower.
    end = 0
    for chain, length in enumerate(lengths.tolist()):
        start, end = end, end + length
        following, advantage = after[chain], 0.0
        for step in range(end - 1, start - 1, -1):
            advantage = r[step] + gamma * following - v[step] + gamma * lam * advantage
            advantages[step], following = advantage, v[step]
    return torch.tensor(advantages, dtype=torch.float64)


def whitened(values: Tensor) -> Tensor:
    """[D] shifted to mean 0 and scaled to deviation 1; zeros where all are equal."""
    centred = values - values.mean()
    return centred / (centred.square().mean().sqrt() + 1e-8)


def explained_variance(values: Tensor, targets: Tensor) -> float:
    """1 − Var(targets − values) / Var(targets), at most 1: how much of the targets the values foresaw.

    Zero where the targets do not vary: there was nothing to explain.
    """
    variance = float(targets.double().var(correction=0))
    if variance == 0:
        return 0.0
    return 1 - float((targets.double() - values.double()).var(correction=0)) / variance


def _of_turns(episodes: Episodes, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """[T] advantages of turns, and [T] what they were worth."""
    rewards = sums(episodes.rewards.double(), episodes.turn_decisions)
    values = episodes.values[_first(episodes.turn_decisions)].double()
    advantages = gae(rewards, values, episodes.final, episodes.turns, gamma, lam)
    return advantages, advantages + values


def _first(lengths: Tensor) -> Tensor:
    """[C] places of the first steps of chains."""
    return lengths.cumsum(0) - lengths


def _numbers(values: Tensor) -> Sequence[float]:
    numbers: list[float] = values.tolist()
    return numbers
