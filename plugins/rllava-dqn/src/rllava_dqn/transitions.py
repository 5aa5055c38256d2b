"""n-step transitions: what one turn did, what the next turns brought, and the state that they led to. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import ActionSegment, Segment, Trajectory, Turn


@dataclass(frozen=True, slots=True)
class Transition:
    """One turn and what followed in m ≤ n turns (arXiv:1710.02298, "multi-step learning").

    context: what the policy saw.
    action: the choice that it made.
    reward: Σ_{k<m} γ^k r_k, from this turn on.
    discount: γ^m, the weight of the value of `final`; 0 where the episode terminated in these turns.
    final: what the policy saw after them; None where the episode terminated.
    seed: of the episode, for messages.
    """

    context: tuple[Segment, ...]
    action: ActionSegment
    reward: float
    discount: float
    final: tuple[Segment, ...] | None
    seed: int

    def as_trajectory(self, group: int) -> Trajectory:
        """An episode of one turn, cut after it: so the policy is evaluated in the state of the turn and in `final`."""
        terminated = self.final is None
        return Trajectory(
            example=None,
            seed=self.seed,
            group=group,
            turns=(Turn(self.context, self.action, self.reward),),
            terminated=terminated,
            truncation=None if terminated else "environment",
            final=self.final,
        )


def transitions(trajectory: Trajectory, n_steps: int, gamma: float) -> list[Transition]:
    """The transition of every turn of an episode, in order; those that reach its end are of fewer than n turns.

    Raises TrainingError for a free-text action, and for an episode that was cut in a state that it does not hold.
    """
    turns, rewards = trajectory.turns, trajectory.rewards
    _check(trajectory)
    made = []
    for start, turn in enumerate(turns):
        end = min(start + n_steps, len(turns))
        terminated = trajectory.terminated and end == len(turns)
        following = turns[end].context if end < len(turns) else trajectory.final
        made.append(
            Transition(
                turn.context,
                turn.action,
                _discounted(rewards[start:end], gamma),
                0.0 if terminated else gamma ** (end - start),
                None if terminated else following,
                trajectory.seed,
            )
        )
    return made


def _discounted(rewards: Sequence[float], gamma: float) -> float:
    total = 0.0
    for reward in reversed(rewards):
        total = reward + gamma * total
    return total


def _check(trajectory: Trajectory) -> None:
    for number, turn in enumerate(trajectory.turns, start=1):
        if turn.action.choice is None or turn.action.choices is None:
            raise TrainingError(
                f"turn {number} of {trajectory.name} is free text ({turn.action.text[:40]!r}), and DQN gives values to "
                "choices: set task.choices, take an environment that offers choices, or another algorithm"
            )
    if not trajectory.terminated and trajectory.final is None:
        how = f"was cut ({trajectory.truncation})" if trajectory.truncated else "neither terminated nor was cut"
        raise TrainingError(
            f"{trajectory.name} {how} after turn {len(trajectory.turns)}, without the state that it was left in: DQN "
            "needs its value for the target, so a truncated trajectory must have `final`"
        )
