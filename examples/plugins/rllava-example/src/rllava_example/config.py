"""Options of CISPO. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rllava_core.algorithms.config import PolicyGradientConfig


class CISPOConfig(PolicyGradientConfig):
    """`algorithm: {name: cispo, …}`"""

    group_size: int = Field(default=8, ge=2, description="trajectories sampled of each example; at least 2 to compare")
    clip_high: float = Field(default=1.0, ge=0, description="importance weights are at most 1 + clip_high")
    epsilon: float = Field(default=1e-4, gt=0, description="added to the standard deviation of a group")
    aggregation: Literal["sequence", "token", "constant"] = Field(
        default="token", description="w_it, as for every policy gradient; the paper's is 1/D"
    )
