"""Group relative policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_core.algorithms.maths import clipped, counted, group_mean, group_std
from rllava_core.algorithms.policy_gradient import PolicyGradient, Rollouts
from rllava_core.algorithms.protocol import Batch
from rllava_core.policy.policy import PolicyOutput
from rllava_grpo.config import GRPOConfig


class GRPO(PolicyGradient):
    """Group relative policy optimization (arXiv:2402.03300, eq. 3).

    The baseline of a trajectory is the mean return of its group, so no critic is needed; with credit by turns, that of
    a turn is the group's mean from the same turn on.
    """

    config: GRPOConfig

    def advantages(self, rollouts: Rollouts) -> Tensor:
        """[N] of trajectories, or [T] of turns where `credit` is `turn`."""
        returns, group = rewards_to_go(rollouts, self.config.gamma), turn_groups(rollouts)
        if self.config.credit == "episode":
            returns, group = returns[rollouts.turns.cumsum(0) - rollouts.turns], rollouts.group
        centred = returns - group_mean(returns, group)
        if self.config.scale == "group":
            return centred / (group_std(returns, group) + self.config.epsilon)
        if self.config.scale == "batch":
            return centred / (centred.std() + self.config.epsilon)
        return centred

    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        ratio = (output.logprobs - batch.old_logprobs).exp()
        return -clipped(ratio, batch.advantages, self.config.clip_low, self.config.clip_high)

    def metrics(self, batch: Batch, output: PolicyOutput) -> dict[str, Tensor]:
        ratio = (output.logprobs - batch.old_logprobs).exp()
        # Clipped where the bound is active: the gradient of that decision is zero.
        low = (ratio < 1 - self.config.clip_low) & (batch.advantages < 0)
        high = (ratio > 1 + self.config.clip_high) & (batch.advantages > 0)
        return {
            "policy/ratio": ratio,
            "policy/clip_fraction_low": low.float(),
            "policy/clip_fraction_high": high.float(),
        }


def rewards_to_go(rollouts: Rollouts, gamma: float) -> Tensor:
    """[T] the rewards of each turn and of all later ones k of its episode: Σ_k gamma^(k − t) r_k."""
    found = rollouts.turn_rewards.clone()
    last = set((rollouts.turns.cumsum(0) - 1).tolist())
    for turn in reversed(range(len(found))):
        if turn not in last:
            found[turn] += gamma * found[turn + 1]
    return found


def turn_groups(rollouts: Rollouts) -> Tensor:
    """[T] labels: turns of the same number in the episodes of a group are compared with each other.

    What an action cannot have changed, the rewards before it, is in neither side; a baseline that depends on the number
    of the turn alone leaves the gradient unbiased (Sutton and Barto 2018, section 13.4).
    """
    group = rollouts.group.repeat_interleave(rollouts.turns)
    return group * (int(rollouts.turns.max()) + 1) + counted(rollouts.turns)
