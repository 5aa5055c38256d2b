"""The base of policy-gradient algorithms: everything but the few lines in which papers differ.

A variant overrides `advantages` (what a trajectory is worth) and `token_loss` (how a decision is pushed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rllava_core.algorithms.config import PolicyGradientConfig
from rllava_core.algorithms.maths import aggregation_weights, kl_estimate
from rllava_core.algorithms.protocol import Batch, Loss, PolicyAccess
from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.policy import PolicyOutput


@dataclass(frozen=True)
class Rollouts:
    """The N trajectories of a step as tensors.

    returns: [N] float32, undiscounted, lowered by the divergence from the reference where the config says so.
    group: [N] group labels.
    decisions: [N] number of decisions T_i.
    old_logprobs: [D] log-probs of the policy that sampled, all trajectories one after another.
    """

    trajectories: tuple[Trajectory, ...]
    returns: Tensor
    group: Tensor
    decisions: Tensor
    old_logprobs: Tensor

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Rollouts:
        logprobs = [torch.from_numpy(trajectory.behaviour_logprobs) for trajectory in trajectories]
        return cls(
            tuple(trajectories),
            torch.tensor([trajectory.episode_return for trajectory in trajectories], dtype=torch.float32),
            torch.tensor([trajectory.group for trajectory in trajectories]),
            torch.tensor([trajectory.decisions for trajectory in trajectories]),
            torch.cat(logprobs),
        )


class PolicyGradient:
    """Base class: sample, weigh, push; with entropy bonus, divergence from a reference, epochs and minibatches."""

    experience: Literal["rollouts", "demonstrations"] = "rollouts"
    heads: Mapping[str, int] = {}

    def __init__(self, config: PolicyGradientConfig) -> None:
        self.config = config
        self.group_size = config.group_size
        self.uses_reference = config.kl_coefficient > 0

    def advantages(self, rollouts: Rollouts) -> Tensor:
        """[N] of trajectories or [D] of decisions, without gradients."""
        raise NotImplementedError(f"{type(self).__name__} must define advantages()")

    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        """Columns of [D] that the loss reads: the advantages; an actor-critic adds the targets of its values."""
        advantages = self.advantages(rollouts)
        if advantages.shape == rollouts.returns.shape:
            advantages = advantages.repeat_interleave(rollouts.decisions)
        return {"advantages": advantages}

    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        """[D] loss of each decision, before entropy, divergence and aggregation."""
        raise NotImplementedError(f"{type(self).__name__} must define token_loss()")

    def metrics(self, batch: Batch, output: PolicyOutput) -> dict[str, Tensor]:
        """[D] further quantities to report as means over decisions, by name."""
        return {}

    def prepare(self, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Iterator[Batch]:
        rollouts = Rollouts.of(trajectories)
        columns = {"old_logprobs": rollouts.old_logprobs}
        if self.uses_reference:
            reference = policy.evaluate_reference(trajectories).logprobs.float()
            columns["reference_logprobs"] = reference
            if self.config.kl_in == "reward":
                divergence = kl_estimate(rollouts.old_logprobs, reference, self.config.kl_estimator)
                lowered = rollouts.returns - self.config.kl_coefficient * _sums(divergence, rollouts.decisions)
                rollouts = replace(rollouts, returns=lowered)
        columns |= self.targets(rollouts, policy)
        _check_columns(columns, int(rollouts.decisions.sum()))
        for _ in range(self.config.epochs):
            for chosen in _minibatches(rollouts.group, self.config.minibatches):
                yield self._batch(rollouts, columns, chosen)

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        config = self.config
        per_decision = self.token_loss(batch, output)
        if per_decision.shape != output.logprobs.shape:
            raise TrainingError(
                f"token_loss() returned shape {tuple(per_decision.shape)} for {len(output.logprobs)} decisions: "
                "expected one number for each"
            )
        reported = {"policy/entropy": output.entropies, **self.metrics(batch, output)}
        if config.entropy_coefficient:
            per_decision = per_decision - config.entropy_coefficient * output.entropies
        if self.uses_reference:
            divergence = kl_estimate(output.logprobs, batch.reference_logprobs, config.kl_estimator)
            reported["policy/kl_reference"] = divergence
            if config.kl_in == "loss":
                per_decision = per_decision + config.kl_coefficient * divergence
        total = (batch.weights * per_decision).sum()
        means = {name: (batch.share * values.detach()).sum() for name, values in reported.items()}
        return Loss(total, {"policy/loss": total.detach(), **means})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return

    def _batch(self, rollouts: Rollouts, columns: Mapping[str, Tensor], chosen: Sequence[int]) -> Batch:
        decisions = rollouts.decisions[list(chosen)]
        ends = rollouts.decisions.cumsum(0).tolist()
        index = torch.cat(
            [torch.arange(ends[number] - int(rollouts.decisions[number]), ends[number]) for number in chosen]
        )
        own = {name: column[index] for name, column in columns.items()}
        own["weights"] = aggregation_weights(decisions, self.config.aggregation, self.config.aggregation_length)
        own["share"] = torch.full((int(decisions.sum()),), 1.0 / int(decisions.sum()))
        return Batch(tuple(rollouts.trajectories[number] for number in chosen), own)


def _check_columns(columns: Mapping[str, Tensor], decisions: int) -> None:
    """A column of another length would be cut to fit, or give decisions the values of others."""
    for name, column in columns.items():
        if column.shape[:1] != (decisions,):
            raise TrainingError(
                f"{name!r} has shape {tuple(column.shape)} for {decisions} decisions: expected one row for each "
                "(advantages() may also return one for each trajectory)"
            )


def _minibatches(group: Tensor, count: int) -> list[list[int]]:
    """Trajectory numbers of each minibatch: whole groups, in a random order where there are several.

    Uses torch's global random state, which the loop seeds anew for every step.
    """
    if count == 1:
        return [list(range(len(group)))]
    members: dict[int, list[int]] = {}
    for number, label in enumerate(group.tolist()):
        members.setdefault(label, []).append(number)
    labels = list(members)
    order = torch.randperm(len(labels)).tolist()
    shares = [order[part::count] for part in range(min(count, len(labels)))]
    return [[number for place in share for number in members[labels[place]]] for share in shares]


def _sums(values: Tensor, decisions: Tensor) -> Tensor:
    """[N] sums over the decisions of each trajectory."""
    return torch.stack([part.sum() for part in values.split(decisions.tolist())])
