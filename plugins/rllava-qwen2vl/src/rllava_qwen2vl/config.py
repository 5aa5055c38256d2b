"""Options of the Qwen2-VL adapter. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rllava_core.policy.config import ModelConfig


class Qwen2VLOptions(ModelConfig):
    """`model: {adapter: qwen2vl, …}`"""

    shapes = Path(__file__).parent / "shapes"

    from_scratch: Literal["tiny", "tiny-64", "tiny-qwen2.5", "tiny-qwen3", "tiny-qwen3-moe"] | None = Field(
        default=None,
        description="the real architecture and processor with 0.2M random weights: of Qwen2-VL (`tiny`; "
        "`tiny-64` has attention heads of 64), Qwen2.5-VL, Qwen3-VL, or Qwen3-VL with experts",
    )
    min_pixels: int | None = Field(default=None, ge=1, description="images are enlarged to at least this many pixels")
    max_pixels: int | None = Field(default=None, ge=1, description="images are shrunk to at most this many pixels")

    @model_validator(mode="after")
    def _ordered(self) -> Qwen2VLOptions:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")
        return self
