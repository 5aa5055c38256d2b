"""Options of the SmolVLM adapter. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from rllava_core.policy.config import ModelConfig


class SmolVLMOptions(ModelConfig):
    """`model: {adapter: smolvlm, …}`"""

    shapes = Path(__file__).parent / "shapes"

    from_scratch: Literal["tiny", "tiny-idefics3"] | None = Field(
        default=None,
        description="the real architecture and processor with 0.2M random weights: of SmolVLM (`tiny`) or Idefics3",
    )
    split_images: bool | None = Field(
        default=None,
        description="cut images into tiles, each of which costs as many tokens as a whole image; not set: as the "
        "checkpoint's image processor says",
    )
    longest_edge: int | None = Field(
        default=None,
        ge=1,
        description="images are enlarged or shrunk until their longer side has this many pixels; with `split_images` "
        "it decides how many tiles there are; not set: as the checkpoint's image processor says",
    )
