"""Options of the LLaVA adapter. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from rllava_core.config import Options
from rllava_core.policy.config import ModelConfig


class ComposeOptions(Options):
    """`compose: {…}`: a model made of a pretrained vision tower and a pretrained language model."""

    vision: str = Field(description="directory or hub id of a CLIP, SigLIP, SigLIP 2 or DINOv2 model")
    language: str = Field(description="directory or hub id of a causal language model")
    language_file: str | None = Field(default=None, description="name of a GGUF file in `language` to take instead")
    connector: Literal["mlp", "linear", "resampler"] = Field(
        default="mlp", description="two linear layers with a GELU, as in LLaVA-1.5; one linear map; or a few queries"
    )
    feature_layer: int = Field(
        default=-2, description="layer of the vision tower whose output is taken; -1 is the last, -2 LLaVA's choice"
    )
    queries: int = Field(default=64, ge=1, description="of the resampler: how many tokens every image becomes")
    layers: int = Field(default=2, ge=1, description="of the resampler")


class LlavaOptions(ModelConfig):
    """`model: {adapter: llava, …}`"""

    shapes = Path(__file__).parent / "shapes"
    origins = ("path", "from_scratch", "compose")

    from_scratch: Literal["tiny", "tiny-next", "tiny-onevision"] | None = Field(
        default=None,
        description="the real architecture and processor with 0.2M random weights: of LLaVA-1.5 (`tiny`), LLaVA-NeXT, "
        "or LLaVA-OneVision",
    )
    compose: ComposeOptions | None = Field(
        default=None, description="make a LLaVA of a vision tower, a new connector and a language model"
    )
    tiling: bool = Field(
        default=True, description="LLaVA-OneVision: cut every image into tiles; if false, each is one view"
    )
