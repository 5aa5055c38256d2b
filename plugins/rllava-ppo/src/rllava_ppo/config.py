"""Options of PPO. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rllava_core.algorithms.config import PolicyGradientConfig


class PPOConfig(PolicyGradientConfig):
    """`algorithm: {name: ppo, …}`.

    A critic estimates what each decision is followed by; advantages are generalized advantage estimates (GAE).
    """

    group_size: int = Field(default=1, ge=1, description="trajectories sampled of each example; none is compared")
    epochs: int = Field(default=4, ge=1, description="passes over the trajectories of a step")
    minibatches: int = Field(default=4, ge=1, description="optimizer steps of a pass; groups are never split")
    aggregation: Literal["sequence", "token", "constant"] = Field(
        default="token",
        description="w_it: token 1/D; sequence 1/(N·T_i); constant 1/(N·aggregation_length)",
    )
    critic: Literal["shared", "separate"] = Field(
        default="shared",
        description="shared: values are a head on the policy's own states; separate: on those of a second model, at "
        "first equal to the policy's",
    )
    gae: Literal["token", "turn", "both"] = Field(
        default="token",
        description="what is a step of the estimate. token: every decision, through all turns; turn: a turn, whose "
        "decisions share one advantage; both: turns first, then decisions inside each turn (after arXiv:2510.16907)",
    )
    gamma: float = Field(default=1.0, ge=0, le=1, description="discount from one decision to the next")
    lam: float = Field(default=0.95, ge=0, le=1, description="λ of GAE over decisions (arXiv:1506.02438, eq. 16)")
    turn_gamma: float = Field(default=0.99, ge=0, le=1, description="discount from one turn to the next")
    turn_lam: float = Field(default=0.95, ge=0, le=1, description="λ of GAE over turns")
    whiten: bool = Field(
        default=True, description="shift and scale advantages to mean 0, deviation 1 over the decisions of a step"
    )
    clip_low: float = Field(default=0.2, ge=0, le=1, description="ratios are clipped below 1 − clip_low")
    clip_high: float = Field(default=0.2, ge=0, description="ratios are clipped above 1 + clip_high")
    dual_clip: float | None = Field(
        default=None,
        gt=1,
        allow_inf_nan=False,
        description="negative advantages are multiplied by no ratio above this (arXiv:1912.09729: 3); null: by any",
    )
    value_coefficient: float = Field(default=0.5, gt=0, allow_inf_nan=False, description="weight of the value loss")
    value_clip: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="a value that moved further than this from the old one counts as having moved this far, if that "
        "makes the loss larger; in units of the return; null: no limit",
    )
    target_kl: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="the rest of the minibatches is left out after one whose mean divergence (nats a decision, k3) "
        "of the new from the old policy exceeds this; null: never",
    )
    kl_target: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="kl_coefficient is adapted until the mean divergence from the reference policy "
        "(`policy/kl_reference`, nats a decision) is this (arXiv:1909.08593, section 2.2); null: it is fixed",
    )
    kl_horizon: float = Field(
        default=10.0,
        ge=1,
        allow_inf_nan=False,
        description="steps in which kl_coefficient adapts: a step changes it by at most 20 % / kl_horizon (1/K_β)",
    )

    @model_validator(mode="after")
    def _every_option_counts(self) -> PPOConfig:
        unread = {"token": ("turn_gamma", "turn_lam"), "turn": ("gamma", "lam"), "both": ()}[self.gae]
        for name in unread:
            # A resolved config has every default written out and is read again, so equal to the default is not set.
            if getattr(self, name) != type(self).model_fields[name].default:
                levels = "turn or both" if self.gae == "token" else "token or both"
                raise ValueError(f"{name} is not read with `gae: {self.gae}`: leave it out, or set gae to {levels}")
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ValueError("kl_target adapts kl_coefficient by factors, so kl_coefficient must begin above 0")
        if self.kl_target is None and self.kl_horizon != type(self).model_fields["kl_horizon"].default:
            raise ValueError("kl_horizon goes with kl_target: without it kl_coefficient is not adapted")
        if self.target_kl is not None and self.epochs == self.minibatches == 1:
            raise ValueError("target_kl leaves minibatches out, and there is one: raise epochs or minibatches")
        return self
