"""Options that every policy-gradient algorithm has. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rllava_core.config import Options


class PolicyGradientConfig(Options):
    """Base of the configs of policy-gradient algorithms.

    With D decisions t of N trajectories i in a batch, T_i of them in trajectory i, the loss is

        Σ_i Σ_t w_it · (token loss_it − entropy_coefficient · H_it + kl_coefficient · k_it)

    where w is chosen by `aggregation`, H is the entropy of the policy in the state of the decision, and k estimates
    its divergence from the reference policy.
    """

    group_size: int = Field(default=8, ge=1, description="trajectories sampled of each example")
    epochs: int = Field(default=1, ge=1, description="passes over the trajectories of a step")
    minibatches: int = Field(default=1, ge=1, description="optimizer steps of a pass; groups are never split")
    aggregation: Literal["sequence", "token", "constant"] = Field(
        default="sequence",
        description="w_it: sequence 1/(N·T_i) (arXiv:2402.03300, eq. 3); token 1/D (arXiv:2503.14476, eq. 8); "
        "constant 1/(N·aggregation_length) (arXiv:2503.20783)",
    )
    aggregation_length: int | None = Field(
        default=None, ge=1, description="decisions by which `aggregation: constant` divides"
    )
    entropy_coefficient: float = Field(default=0.0, description="weight of the entropy bonus", allow_inf_nan=False)
    kl_coefficient: float = Field(default=0.0, ge=0, description="weight of the divergence from the reference policy")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3",
        description="with r = log π_ref − log π: k1 = −r, k2 = r²/2, k3 = exp(r) − 1 − r (Schulman 2020)",
    )
    kl_in: Literal["loss", "reward"] = Field(
        default="loss",
        description="loss: k of the current policy, differentiated; reward: the return of a trajectory is lowered by "
        "kl_coefficient · Σ_t k of the policy that sampled it",
    )

    importance: Literal["none", "token", "sequence"] = Field(
        default="none",
        description="for a sampler that is not quite what is trained (other kernels or precision, older weights): "
        "advantages are multiplied by min(π_trained / π_sampled, importance_cap), the ratio of a decision or of its "
        "whole trajectory, π_trained computed anew (truncated importance sampling: arXiv:1802.01561, section 4.1)",
    )
    importance_cap: float = Field(default=2.0, ge=1, description="largest importance weight")

    @model_validator(mode="after")
    def _consistent(self) -> PolicyGradientConfig:
        if (self.aggregation == "constant") != (self.aggregation_length is not None):
            raise ValueError("aggregation_length goes with `aggregation: constant`: set both or neither")
        if self.kl_in == "loss" and self.kl_estimator == "k1" and self.kl_coefficient > 0:
            raise ValueError(
                "kl_estimator k1 has no useful gradient in the loss (its expectation is zero): "
                "use k2 or k3, or kl_in: reward"
            )
        return self
