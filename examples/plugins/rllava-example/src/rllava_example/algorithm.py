"""CISPO: clip the importance weight, not the gradient."""

from __future__ import annotations

from torch import Tensor

from rllava_core.algorithms.maths import group_mean, group_std
from rllava_core.algorithms.policy_gradient import PolicyGradient, Rollouts
from rllava_core.algorithms.protocol import Batch
from rllava_core.policy.policy import PolicyOutput
from rllava_example.config import CISPOConfig


class CISPO(PolicyGradient):
    """Clipped importance-sampling weight policy optimization (arXiv:2506.13585, eq. 4 and 5)."""

    config: CISPOConfig

    def advantages(self, rollouts: Rollouts) -> Tensor:
        centred = rollouts.returns - group_mean(rollouts.returns, rollouts.group)
        return centred / (group_std(rollouts.returns, rollouts.group) + self.config.epsilon)

    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        weight = (output.logprobs - batch.old_logprobs).exp().clamp(max=1 + self.config.clip_high)
        return -weight.detach() * batch.advantages * output.logprobs
