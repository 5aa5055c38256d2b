"""Options of the local engines. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rllava_core.config import Options


class LocalTrainConfig(Options):
    """`engine: {train: {name: local, …}}`"""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: an accelerator if there is one")
    mixed_precision: Literal["no", "bf16"] = Field(
        default="no", description="bf16: forward passes in bfloat16 over weights of `model.dtype`"
    )


class LocalRolloutConfig(Options):
    """`engine: {rollout: {name: local, …}}`"""

    max_sequences: int = Field(default=512, ge=1, description="sequences decoded at once, which bounds the cache")
