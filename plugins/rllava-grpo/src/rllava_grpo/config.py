"""Options of GRPO. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rllava_core.algorithms.config import PolicyGradientConfig


class GRPOConfig(PolicyGradientConfig):
    """`algorithm: {name: grpo, …}`. The advantage of trajectory i is (R_i − mean of its group) / scale."""

    clip_low: float = Field(default=0.2, ge=0, le=1, description="ratios are clipped below 1 − clip_low")
    clip_high: float = Field(default=0.2, ge=0, description="ratios are clipped above 1 + clip_high")
    scale: Literal["group", "batch", "none"] = Field(
        default="group",
        description="what advantages are divided by: the group's standard deviation + epsilon (arXiv:2402.03300); "
        "that of all centred returns of the step + epsilon (arXiv:2501.03262); nothing (Dr. GRPO, arXiv:2503.20783)",
    )
    credit: Literal["episode", "turn"] = Field(
        default="episode",
        description="what an action of an episode of several turns is judged by: episode: the return of the whole "
        "episode; turn: the rewards from its turn on, compared with those of the group from the same turn on",
    )
    gamma: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="discount of a turn; below 1, an episode that earns its reward sooner is better",
    )
    epsilon: float = Field(default=1e-4, gt=0, description="added to the standard deviation")

    @field_validator("group_size")
    @classmethod
    def _compares_within_a_group(cls, value: int) -> int:
        if value < 2:
            raise ValueError("GRPO compares the trajectories of a group, so it needs at least 2 of them")
        return value
