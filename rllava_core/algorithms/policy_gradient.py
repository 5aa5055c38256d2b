"""The base of policy-gradient algorithms: everything but the few lines in which papers differ.

A variant overrides `advantages` (what a trajectory, a turn or a decision is worth) and `token_loss` (how a decision is
pushed).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rllava_core.algorithms.config import PolicyGradientConfig
from rllava_core.algorithms.maths import aggregation_weights, counted, kl_estimate, sums, truncated_importance
from rllava_core.algorithms.protocol import Batch, Loss, PolicyAccess
from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.policy import Head, PolicyOutput


@dataclass(frozen=True)
class Rollouts:
    """The N trajectories of a step as tensors: T turns and D decisions, all trajectories one after another.

    rewards: [D] float32, what each decision earned: the reward of a turn is that of its last decision; all are lowered
        by the divergence from the reference where the config says so.
    group: [N] group labels.
    turns: [N] number of turns of each trajectory.
    turn_decisions: [T] number of decisions of each turn.
    old_logprobs: [D] log-probs of the policy that sampled.
    """

    trajectories: tuple[Trajectory, ...]
    rewards: Tensor
    group: Tensor
    turns: Tensor
    turn_decisions: Tensor
    old_logprobs: Tensor

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> Rollouts:
        turn_decisions = [turn.action.decisions for trajectory in trajectories for turn in trajectory.turns]
        earned = [reward for trajectory in trajectories for reward in trajectory.rewards]
        rewards = torch.zeros(sum(turn_decisions))
        rewards[torch.tensor(turn_decisions).cumsum(0) - 1] = torch.tensor(earned, dtype=torch.float32)
        return cls(
            tuple(trajectories),
            rewards,
            torch.tensor([trajectory.group for trajectory in trajectories]),
            torch.tensor([len(trajectory.turns) for trajectory in trajectories]),
            torch.tensor(turn_decisions),
            torch.from_numpy(np.concatenate([action.logprobs for item in trajectories for action in item.actions])),
        )

    @cached_property
    def decisions(self) -> Tensor:
        """[N] number of decisions of each trajectory."""
        return sums(self.turn_decisions, self.turns)

    @cached_property
    def turn_rewards(self) -> Tensor:
        """[T] what each turn earned."""
        return sums(self.rewards, self.turn_decisions)

    @cached_property
    def returns(self) -> Tensor:
        """[N] undiscounted."""
        return sums(self.rewards, self.decisions)

    def per_decision(self, values: Tensor) -> Tensor:
        """[D] from [N] of trajectories, [T] of turns, or [D] already."""
        if values.shape == self.turns.shape:
            return values.repeat_interleave(self.decisions)
        if values.shape == self.turn_decisions.shape:
            return values.repeat_interleave(self.turn_decisions)
        return values


class PolicyGradient:
    """Base class: sample, weigh, push; with entropy bonus, divergence from a reference, epochs and minibatches.

    kl_coefficient: weight of that divergence now; the config's, unless a subclass adapts it.
    """

    experience: Literal["rollouts", "demonstrations"] = "rollouts"
    heads: Mapping[str, Head] = {}

    def __init__(self, config: PolicyGradientConfig) -> None:
        self.config = config
        self.group_size = config.group_size
        self.kl_coefficient = config.kl_coefficient
        self.copies: tuple[str, ...] = ("reference",) if config.kl_coefficient > 0 else ()

    def behaviour(self) -> Behaviour:
        return Behaviour()

    def advantages(self, rollouts: Rollouts) -> Tensor:
        """[N] of trajectories, [T] of turns or [D] of decisions, without gradients."""
        raise NotImplementedError(f"{type(self).__name__} must define advantages()")

    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        """Columns of [D] that the loss reads: the advantages; an actor-critic adds the targets of its values."""
        return {"advantages": rollouts.per_decision(self.advantages(rollouts))}

    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        """[D] loss of each decision, before entropy, divergence and aggregation."""
        raise NotImplementedError(f"{type(self).__name__} must define token_loss()")

    def metrics(self, batch: Batch, output: PolicyOutput) -> dict[str, Tensor]:
        """[D] further quantities to report as means over decisions, by name."""
        return {}

    def stops(self, metrics: Mapping[str, float]) -> bool:
        """Whether to leave the remaining minibatches of this iteration out, after a step with these metrics."""
        return False

    def prepare(
        self, trajectories: Sequence[Trajectory], policy: PolicyAccess
    ) -> Generator[Batch, Mapping[str, float] | None, None]:
        # Of the state that the loop has seeded, whatever else draws from it while this step trains.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        rollouts = Rollouts.of(trajectories)
        columns = {"old_logprobs": rollouts.old_logprobs}
        if self.copies:
            reference = policy.evaluate(trajectories, "reference").logprobs.float()
            columns["reference_logprobs"] = reference
            if self.config.kl_in == "reward":
                divergence = kl_estimate(rollouts.old_logprobs, reference, self.config.kl_estimator)
                rollouts = replace(rollouts, rewards=rollouts.rewards - self.kl_coefficient * divergence)
        weights = None
        if self.config.importance != "none":
            trained = policy.evaluate(trajectories).logprobs.float()
            per, cap = self.config.importance, self.config.importance_cap
            weights = truncated_importance(trained, rollouts.old_logprobs, rollouts.decisions, per, cap)
            columns["old_logprobs"] = trained
        columns |= self.targets(rollouts, policy)
        if weights is not None:
            # Not negative, so that clipped surrogates are multiplied by them as a whole; losses of values are not.
            columns |= {"importance": weights, "advantages": columns["advantages"] * weights}
        _check_columns(columns, int(rollouts.decisions.sum()))
        for _ in range(self.config.epochs):
            for chosen in _minibatches(rollouts.group, self.config.minibatches, generator):
                metrics = yield self._batch(rollouts, columns, chosen)
                if metrics is not None and self.stops(metrics):
                    return

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        config = self.config
        per_decision = self.token_loss(batch, output)
        if per_decision.shape != output.logprobs.shape:
            raise TrainingError(
                f"token_loss() returned shape {tuple(per_decision.shape)} for {len(output.logprobs)} decisions: "
                "expected one number for each"
            )
        reported = {"policy/entropy": output.entropies, **self.metrics(batch, output)}
        if "importance" in batch.columns:
            truncated = batch.importance >= config.importance_cap
            reported |= {"policy/importance": batch.importance, "policy/importance_truncated": truncated.float()}
        if config.entropy_coefficient:
            per_decision = per_decision - config.entropy_coefficient * output.entropies
        if self.copies:
            divergence = kl_estimate(output.logprobs, batch.reference_logprobs, config.kl_estimator)
            reported["policy/kl_reference"] = divergence
            if config.kl_in == "loss":
                per_decision = per_decision + self.kl_coefficient * divergence
        total = (batch.weights * per_decision).sum()
        means = {name: (batch.share * values.detach()).sum() for name, values in reported.items()}
        return Loss(total, {"policy/loss": total.detach(), **means})

    def report(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return

    def _batch(self, rollouts: Rollouts, columns: Mapping[str, Tensor], chosen: Sequence[int]) -> Batch:
        decisions = rollouts.decisions[list(chosen)]
        starts = (rollouts.decisions.cumsum(0) - rollouts.decisions)[list(chosen)]
        index = starts.repeat_interleave(decisions) + counted(decisions)
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
                "(advantages() may also return one for each turn or trajectory)"
            )


def _minibatches(group: Tensor, count: int, generator: torch.Generator) -> list[list[int]]:
    """Trajectory numbers of each minibatch: whole groups, in a random order where there are several."""
    if count == 1:
        return [list(range(len(group)))]
    members: dict[int, list[int]] = {}
    for number, label in enumerate(group.tolist()):
        members.setdefault(label, []).append(number)
    labels = list(members)
    order = torch.randperm(len(labels), generator=generator).tolist()
    shares = [order[part::count] for part in range(min(count, len(labels)))]
    return [[number for place in share for number in members[labels[place]]] for share in shares]
