"""Options of the generic adapter. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rllava_core.policy.config import ModelConfig


class AnyVLMOptions(ModelConfig):
    """`model: {adapter: anyvlm, …}`"""

    from_scratch: Literal["tiny"] | None = Field(
        default=None, description="the real architecture and processor of InternVL with 0.2M random weights"
    )
