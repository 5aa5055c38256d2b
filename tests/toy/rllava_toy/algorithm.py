"""Three learning rules on one page, which prove that the protocol carries their families."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rllava_core.algorithms.policy_gradient import PolicyGradient, Rollouts
from rllava_core.algorithms.protocol import Batch, Loss, PolicyAccess
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.policy import Head, PolicyOutput
from rllava_toy.config import ToyGradientConfig


class ToyGradient(PolicyGradient):
    """REINFORCE with the step's mean return as baseline, and a running mean that must survive a resume."""

    def __init__(self, config: ToyGradientConfig) -> None:
        super().__init__(config)
        self.running = torch.zeros(())

    def advantages(self, rollouts: Rollouts) -> Tensor:
        self.running = 0.9 * self.running + 0.1 * rollouts.returns.mean()
        return rollouts.returns - self.running

    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        return -output.logprobs * batch.advantages

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.running = state["running"]


class ToyCritic(PolicyGradient):
    """A value head as baseline, learnt beside the policy."""

    heads = {"value": Head(1)}

    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        values = policy.evaluate(rollouts.trajectories).heads["value"][:, 0]
        returns = rollouts.returns.repeat_interleave(rollouts.decisions)
        return {"advantages": returns - values, "returns": returns}

    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        error = (output.heads["value"][:, 0] - batch.returns) ** 2
        return -output.logprobs * batch.advantages + 0.5 * error

    def metrics(self, batch: Batch, output: PolicyOutput) -> dict[str, Tensor]:
        return {"value/error": (output.heads["value"][:, 0] - batch.returns) ** 2}


class ToyImitation(PolicyGradient):
    """Supervised learning from the examples' answers."""

    experience = "demonstrations"

    def prepare(self, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Iterator[Batch]:
        decisions = sum(trajectory.decisions for trajectory in trajectories)
        yield Batch(tuple(trajectories), {"share": torch.full((decisions,), 1.0 / decisions)})

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        total = -(batch.share * output.logprobs).sum()
        return Loss(total, {"policy/loss": total.detach()})
