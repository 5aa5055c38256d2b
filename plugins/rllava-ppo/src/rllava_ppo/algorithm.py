"""Proximal policy optimization."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from rllava_core.algorithms.maths import clipped, kl_estimate
from rllava_core.algorithms.policy_gradient import PolicyGradient, Rollouts
from rllava_core.algorithms.protocol import Batch, PolicyAccess
from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.policy import Head, PolicyOutput
from rllava_ppo.advantages import (
    Episodes,
    Estimates,
    explained_variance,
    token_estimates,
    turn_estimates,
    two_level_estimates,
    whitened,
)
from rllava_ppo.config import PPOConfig


class PPO(PolicyGradient):
    """Proximal policy optimization (arXiv:1707.06347, eq. 9, with value loss and entropy bonus).

    The head `value` estimates what a state is followed by; advantages are generalized advantage estimates.
    """

    config: PPOConfig

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self.heads = {"value": Head(1, own_trunk=config.critic == "separate")}
        self._report: dict[str, float] = {}

    def prepare(
        self, trajectories: Sequence[Trajectory], policy: PolicyAccess
    ) -> Generator[Batch, Mapping[str, float] | None, None]:
        self._report = {"policy/kl_coefficient": self.kl_coefficient} if self.copies else {}
        batches = super().prepare(trajectories, policy)
        steps, divergences = 0, []
        metrics: Mapping[str, float] | None = None
        with suppress(StopIteration):
            while True:
                metrics = yield batches.send(metrics)
                steps += 1
                if metrics is not None and self.copies:
                    divergences.append(metrics["policy/kl_reference"])
        if self.config.target_kl is not None:
            groups = len({trajectory.group for trajectory in trajectories})
            planned = self.config.epochs * min(self.config.minibatches, groups)
            self._report["policy/early_stop"] = float(steps < planned)
        if self.config.kl_target is not None and divergences:
            self._adapt(sum(divergences) / len(divergences))

    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        output = policy.evaluate(rollouts.trajectories)
        values = output.heads["value"][:, 0]
        estimates = self._estimates(rollouts, values, output)
        learnt = estimates.weights > 0
        self._report["value/explained_variance"] = explained_variance(values[learnt], estimates.targets[learnt])
        advantages = whitened(estimates.advantages) if self.config.whiten else estimates.advantages
        return {
            # Not those that the rollout engine recorded: another engine's kernels, or its precision, would move ratios
            # away from 1 before the policy has moved at all, and the clipping would take that for a step.
            "old_logprobs": output.logprobs,
            "old_values": values,
            "advantages": advantages.to(values.dtype),
            "value_targets": estimates.targets.to(values.dtype),
            "value_weights": estimates.weights.to(values.dtype),
        }

    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        ratio = (output.logprobs - batch.old_logprobs).exp()
        surrogate = clipped(ratio, batch.advantages, self.config.clip_low, self.config.clip_high)
        if self.config.dual_clip is not None:
            bounded = torch.maximum(surrogate, self.config.dual_clip * batch.advantages)
            surrogate = torch.where(batch.advantages < 0, bounded, surrogate)
        return self.config.value_coefficient * batch.value_weights * self._value_loss(batch, output) - surrogate

    def metrics(self, batch: Batch, output: PolicyOutput) -> dict[str, Tensor]:
        ratio = (output.logprobs - batch.old_logprobs).exp()
        # Clipped where the bound is active: the gradient of that decision is zero.
        low = (ratio < 1 - self.config.clip_low) & (batch.advantages < 0)
        high = (ratio > 1 + self.config.clip_high) & (batch.advantages > 0)
        found = {
            "policy/ratio": ratio,
            "policy/clip_fraction_low": low.to(ratio),
            "policy/clip_fraction_high": high.to(ratio),
            "policy/kl_old": kl_estimate(batch.old_logprobs, output.logprobs, "k3"),
            "value/loss": batch.value_weights * self._value_loss(batch, output),
        }
        if self.config.dual_clip is not None:
            found["policy/dual_clip_fraction"] = ((ratio > self.config.dual_clip) & (batch.advantages < 0)).to(ratio)
        if self.config.value_clip is not None:
            values = output.heads["value"][:, 0]
            free = (values - batch.value_targets).abs()
            bounded = (self._bounded(values, batch) - batch.value_targets).abs()
            found["value/clip_fraction"] = batch.value_weights * (bounded > free).to(ratio)
        return found

    def stops(self, metrics: Mapping[str, float]) -> bool:
        return self.config.target_kl is not None and metrics["policy/kl_old"] > self.config.target_kl

    def report(self) -> dict[str, float]:
        return dict(self._report)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.config.kl_target is None else {"kl_coefficient": self.kl_coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.config.kl_target is not None:
            self.kl_coefficient = float(state["kl_coefficient"])

    def _estimates(self, rollouts: Rollouts, values: Tensor, output: PolicyOutput) -> Estimates:
        episodes = Episodes(
            rollouts.rewards,
            values,
            _final_values(rollouts.trajectories, output),
            rollouts.turns,
            rollouts.turn_decisions,
        )
        config = self.config
        if config.gae == "token":
            return token_estimates(episodes, config.gamma, config.lam)
        if config.gae == "turn":
            return turn_estimates(episodes, config.turn_gamma, config.turn_lam)
        return two_level_estimates(episodes, config.gamma, config.lam, config.turn_gamma, config.turn_lam)

    def _value_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        """[D] half the squared error of each value, or the larger one of it and that of the bounded value."""
        values = output.heads["value"][:, 0]
        error = (values - batch.value_targets) ** 2
        if self.config.value_clip is not None:
            error = torch.maximum(error, (self._bounded(values, batch) - batch.value_targets) ** 2)
        return 0.5 * error

    def _bounded(self, values: Tensor, batch: Batch) -> Tensor:
        limit = self.config.value_clip
        assert limit is not None
        return batch.old_values + (values - batch.old_values).clamp(-limit, limit)

    def _adapt(self, divergence: float) -> None:
        """Raise the coefficient where the divergence is above its target, or lower it (arXiv:1909.08593, sec. 2.2)."""
        assert self.config.kl_target is not None
        error = min(max(divergence / self.config.kl_target - 1, -0.2), 0.2)
        self.kl_coefficient *= 1 + error / self.config.kl_horizon


def _final_values(trajectories: Sequence[Trajectory], output: PolicyOutput) -> Tensor:
    """[N] value of what follows the last decision: nothing where the episode terminated."""
    for trajectory in trajectories:
        if not trajectory.terminated and trajectory.final is None:
            raise TrainingError(
                f"the episode of {trajectory.name} was cut ({trajectory.truncation}) and the state it was left in is "
                "missing, so what would have followed cannot be estimated: expected Trajectory.final"
            )
    terminated = torch.tensor([trajectory.terminated for trajectory in trajectories])
    return output.final["value"][:, 0].masked_fill(terminated, 0.0)
