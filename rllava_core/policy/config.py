"""What every model adapter's config has. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rllava_core.config import Options


class ModelConfig(Options):
    """Base of model adapter configs: where the weights come from and how they are held."""

    path: str | None = Field(default=None, description="local directory or hub id for `from_pretrained`")
    from_scratch: str | None = Field(default=None, description="a preset to build with random weights instead")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of the weights")
    attention: Literal["sdpa", "eager"] = Field(default="sdpa", description="transformers' attention implementation")
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("set either `path` (a directory or hub id) or `from_scratch` (a preset)")
        return self
