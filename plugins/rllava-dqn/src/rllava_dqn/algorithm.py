"""Deep Q-learning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rllava_core.algorithms.protocol import Batch, Loss, PolicyAccess
from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.policy import Head, PolicyOutput
from rllava_dqn.config import DQNConfig
from rllava_dqn.replay import Replay
from rllava_dqn.saving import replay_state, restore_replay
from rllava_dqn.transitions import transitions


class DQN:
    """Deep Q-learning (Mnih et al. 2015, Nature 518), for policies that act by choices.

    Double (arXiv:1509.06461), dueling (arXiv:1511.06581), with n-step targets (arXiv:1710.02298) and a prioritised
    replay (arXiv:1511.05952) as the config says. The language model's own distribution over the choices is not trained
    and not asked: heads on its hidden state in the place of the decision give the values.

    turns: environment steps so far.
    updates: optimizer steps so far.
    """

    experience: Literal["rollouts", "demonstrations"] = "rollouts"
    group_size = 1
    copies = ("target",)

    def __init__(self, config: DQNConfig) -> None:
        self.config = config
        self.heads: Mapping[str, Head] = (
            {"state_value": Head(1), "advantage": Head("choices")} if config.dueling else {"q": Head("choices")}
        )
        self.replay = Replay(config.replay_size, config.replay_bytes)
        self.turns = 0
        self.updates = 0
        self._learning_turns = 0  # of them those that updates are counted by
        self._choices = 0  # how many every turn offers; 0 before the first
        self._epsilon = config.epsilon_start  # with which the trajectories of this iteration were sampled

    def action_values(self, heads: Mapping[str, Tensor]) -> Tensor:
        """[N, C] Q of each choice, from the outputs of the heads."""
        if not self.config.dueling:
            return heads["q"]
        advantage = heads["advantage"]
        return heads["state_value"] + advantage - advantage.mean(dim=1, keepdim=True)

    def behaviour(self) -> Behaviour:
        return Behaviour(action_values=self.action_values, epsilon=self.epsilon)

    @property
    def epsilon(self) -> float:
        """Share of random choices, falling linearly with the turns."""
        config = self.config
        return _linear(config.epsilon_start, config.epsilon_end, self.turns / config.epsilon_turns)

    def prepare(self, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Iterator[Batch]:
        config = self.config
        for _ in range(self._collect(trajectories)):
            sample = self.replay.sample(torch.rand(config.batch_size, dtype=torch.float64).numpy())
            drawn = tuple(one.as_trajectory(place) for place, one in enumerate(sample.transitions))
            values = policy.evaluate(drawn)
            frozen = policy.evaluate(drawn, "target")
            taken = self._taken(drawn, self.action_values(values.heads))
            targets = self.targets(
                torch.tensor([one.reward for one in sample.transitions], dtype=taken.dtype),
                torch.tensor([one.discount for one in sample.transitions], dtype=taken.dtype),
                self.action_values(values.final),
                self.action_values(frozen.final),
            )
            importance = self._importance(torch.from_numpy(sample.probabilities)).to(taken.dtype)
            share = torch.full_like(targets, 1.0 / len(targets))
            actions = torch.tensor([trajectory.actions[0].choice for trajectory in drawn])
            yield Batch(drawn, {"actions": actions, "targets": targets, "weights": importance * share, "share": share})
            self.updates += 1
            errors = (targets - taken).abs().double()
            priorities = (errors + config.priority_epsilon) ** config.priority_alpha
            self.replay.set_priorities(sample.numbers, priorities.numpy())
            if self.updates % config.target_every == 0:
                policy.update_copy("target", config.target_rate)

    def targets(self, rewards: Tensor, discounts: Tensor, values: Tensor, frozen: Tensor) -> Tensor:
        """[B] what Q of the choices taken should be.

        rewards, discounts: [B] of the transitions.
        values, frozen: [B, C] Q in the state that each led to, of the policy and of its target copy.
        """
        best = (values if self.config.double else frozen).argmax(dim=1, keepdim=True)
        return rewards + discounts * frozen.gather(1, best).squeeze(1)

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        taken = self.action_values(output.heads).gather(1, batch.actions[:, None]).squeeze(1)
        each = F.huber_loss if self.config.loss == "huber" else F.mse_loss
        total = (batch.weights * each(taken, batch.targets, reduction="none")).sum()
        taken = taken.detach()
        reported = {"q/mean": taken, "q/target_mean": batch.targets, "q/td_error": (taken - batch.targets).abs()}
        means = {name: (batch.share * values).sum() for name, values in reported.items()}
        return Loss(total, {"policy/loss": total.detach(), **means})

    def report(self) -> dict[str, float]:
        return {
            "policy/epsilon": self._epsilon,
            "q/target_updates": float(self.updates // self.config.target_every),
            "replay/transitions": float(len(self.replay)),
            "replay/bytes": float(self.replay.bytes),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "turns": self.turns,
            "updates": self.updates,
            "learning_turns": self._learning_turns,
            "choices": self._choices,
            "replay": replay_state(self.replay),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.turns = state["turns"]
        self.updates = state["updates"]
        self._learning_turns = state["learning_turns"]
        self._choices = state["choices"]
        self.replay = Replay(self.config.replay_size, self.config.replay_bytes)
        restore_replay(self.replay, state["replay"])

    def _collect(self, trajectories: Sequence[Trajectory]) -> int:
        """Put the episodes into the replay. Returns how many optimizer steps are due."""
        self._epsilon = self.epsilon
        for trajectory in trajectories:
            self._check_choices(trajectory)
            self.replay.add(transitions(trajectory, self.config.n_steps, self.config.gamma))
        new = sum(len(trajectory.turns) for trajectory in trajectories)
        self.turns += new
        if self.turns < self.config.warmup_turns:
            return 0
        # As a difference of whole numbers, in which no rounding adds up.
        before = round(self.config.updates_per_turn * self._learning_turns)
        self._learning_turns += new
        return round(self.config.updates_per_turn * self._learning_turns) - before

    def _check_choices(self, trajectory: Trajectory) -> None:
        """The choices of the state that a turn led to are not known, so every state must offer as many."""
        for number, turn in enumerate(trajectory.turns, start=1):
            offered = len(turn.action.choices or ())
            self._choices = self._choices or offered
            if turn.action.choices and offered != self._choices:
                raise TrainingError(
                    f"turn {number} of {trajectory.name} offers {offered} choices and turns before it "
                    f"{self._choices}: DQN needs the same number in every turn"
                )

    def _taken(self, drawn: Sequence[Trajectory], values: Tensor) -> Tensor:
        """[B] Q of the choices taken. values: [B, C]."""
        if values.shape[1] != self._choices:
            raise TrainingError(
                f"{drawn[0].name} offers {self._choices} choices and the policy has values for {values.shape[1]}: DQN "
                "needs the same number in every turn"
            )
        actions = torch.tensor([trajectory.actions[0].choice for trajectory in drawn])
        return values.gather(1, actions[:, None]).squeeze(1)

    def _importance(self, probabilities: Tensor) -> Tensor:
        """[B] weights that undo the preference for large errors, the more the later (arXiv:1511.05952, section 3.4)."""
        config = self.config
        beta = _linear(config.priority_beta, 1.0, self.turns / config.priority_beta_turns)
        weights = (len(self.replay) * probabilities) ** -beta
        return weights / weights.max()


def _linear(start: float, end: float, progress: float) -> float:
    """Between two values, and the second from `progress` 1 on."""
    return start + (end - start) * min(1.0, progress)
