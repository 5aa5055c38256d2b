"""Options of DQN. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rllava_core.config import Options


class DQNConfig(Options):
    """`algorithm: {name: dqn, …}`. A turn of an episode is one environment step.

    For a transition of m ≤ n_steps turns, which begins in state s with choice a, earns R = Σ_{k<m} γ^k r_k and ends in
    state s', the loss of a batch is (1/batch_size) · Σ w · L(Q(s, a) − y) with the target

        y = R + γ^m · Q_target(s', argmax_a' Q(s', a'))

    or y = R where s' is terminal.
    """

    gamma: float = Field(default=0.99, ge=0, le=1, description="γ, discount of a turn")
    n_steps: int = Field(
        default=1, ge=1, description="turns until the target takes over from the rewards (arXiv:1710.02298)"
    )
    double: bool = Field(
        default=True,
        description="a' is chosen by the policy's values (arXiv:1509.06461), not by the target's own",
    )
    dueling: bool = Field(
        default=False, description="Q = V + A − mean_a A from two heads (arXiv:1511.06581), not from one"
    )
    loss: Literal["huber", "mse"] = Field(
        default="huber", description="L(x): huber x²/2 up to |x| = 1 and |x| − 1/2 beyond; mse x²"
    )

    batch_size: int = Field(default=32, ge=1, description="transitions of an optimizer step")
    updates_per_turn: float = Field(
        default=0.25, gt=0, description="optimizer steps for each turn collected; fractions are carried over"
    )
    warmup_turns: int = Field(default=1000, ge=0, description="turns to collect before the first optimizer step")
    target_every: int = Field(default=250, ge=1, description="optimizer steps between updates of the target network")
    target_rate: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="how far an update moves the target to the policy: 1 copies it (hard); with target_every: 1 and a "
        "small rate, such as 0.005, the target is Polyak's average",
    )

    epsilon_start: float = Field(default=1.0, ge=0, le=1, description="share of random choices in the first turn")
    epsilon_end: float = Field(default=0.05, ge=0, le=1, description="share of random choices in the end")
    epsilon_turns: int = Field(default=10_000, ge=1, description="turns in which it falls linearly from first to last")

    replay_size: int = Field(default=50_000, ge=1, description="transitions kept; the oldest leave first")
    replay_bytes: int = Field(
        default=512 * 2**20, ge=1, description="memory of what is kept; each distinct image counts once"
    )
    priority_alpha: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="α: a transition is drawn with probability in proportion to (|error| + priority_epsilon)^α "
        "(arXiv:1511.05952, who take 0.6); 0 draws all alike",
    )
    priority_beta: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="β of the first turn: w = (1 / (transitions · probability))^β, divided by the batch's greatest",
    )
    priority_beta_turns: int = Field(default=100_000, ge=1, description="turns in which β rises linearly to 1")
    priority_epsilon: float = Field(default=1e-6, gt=0, description="what keeps transitions without error in the draw")

    @model_validator(mode="after")
    def _consistent(self) -> DQNConfig:
        if self.epsilon_end > self.epsilon_start:
            raise ValueError(
                f"epsilon_end is {self.epsilon_end:g}, above epsilon_start {self.epsilon_start:g}: choices become less "
                "random with time, so set it to at most epsilon_start"
            )
        return self
