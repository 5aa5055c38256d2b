"""Group relative policy optimization."""

from __future__ import annotations

from torch import Tensor

from rllava_core.algorithms.maths import clipped, group_mean, group_std
from rllava_core.algorithms.policy_gradient import PolicyGradient, Rollouts
from rllava_core.algorithms.protocol import Batch
from rllava_core.policy.policy import PolicyOutput
from rllava_grpo.config import GRPOConfig


class GRPO(PolicyGradient):
    """Group relative policy optimization (arXiv:2402.03300, eq. 3).

    The baseline of a trajectory is the mean return of its group, so no critic is needed.
    """

    config: GRPOConfig

    def advantages(self, rollouts: Rollouts) -> Tensor:
        centred = rollouts.returns - group_mean(rollouts.returns, rollouts.group)
        if self.config.scale == "group":
            return centred / (group_std(rollouts.returns, rollouts.group) + self.config.epsilon)
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
