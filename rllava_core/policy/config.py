"""What every model adapter's config has. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rllava_core.config import Options

Way = Literal["full", "lora", "frozen"]


class TrainedParts(Options):
    """`model.train`: how each part of the model is trained: all its weights, low-rank adapters, or not."""

    vision: Way = Field(default="full", description="the vision tower")
    connector: Way = Field(default="full", description="what translates what was seen for the language model")
    language: Way = Field(default="full", description="the language model, its embeddings and head included")

    @model_validator(mode="after")
    def _something(self) -> TrainedParts:
        if self.vision == self.connector == self.language == "frozen":
            raise ValueError("vision, connector and language are all frozen, so there is nothing to train")
        return self


class LoraOptions(Options):
    """`model.lora`: low-rank adapters (arXiv:2106.09685), for the parts that `model.train` says. There is no dropout:
    it would make the log-probs of sampling and training differ."""

    rank: int = Field(default=16, ge=1, description="of the adapters' matrices")
    alpha: int = Field(default=32, ge=1, description="what is added to a weight is B·A·alpha/rank")
    dora: bool = Field(default=False, description="adapt magnitude and direction apart (arXiv:2402.09353)")
    targets: tuple[str, ...] | None = Field(
        default=None,
        description="last names of the linear layers to adapt, such as q_proj; all of them if not set (experts that "
        "are no linear layers of their own stay as they are)",
    )


_ORIGINS = {"path": "a directory or hub id", "from_scratch": "a preset"}


ENCODED_BYTES = 2**30
"""What frozen parts have made of images takes so much host memory, unless a config says otherwise."""


class ModelConfig(Options):
    """Base of model adapter configs: where the weights come from and how they are held.

    origins: the options of which exactly one says where the model comes from; a family may have more.
    shapes: a folder that holds `ORGANISATION/NAME/config.json` of published models, which `rllava plan` knows by their
        hub ids.
    """

    origins: ClassVar[tuple[str, ...]] = ("path", "from_scratch")
    shapes: ClassVar[Path | None] = None

    path: str | None = Field(default=None, description="local directory or hub id for `from_pretrained`")
    from_scratch: str | None = Field(default=None, description="a preset to build with random weights instead")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of the weights")
    attention: Literal["sdpa", "eager"] = Field(default="sdpa", description="transformers' attention implementation")
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    train: TrainedParts = Field(default_factory=TrainedParts, description="what of the model is trained, and how")
    lora: LoraOptions = Field(default_factory=LoraOptions, description="the adapters of parts trained by `lora`")
    encoded_bytes: int = Field(
        default=ENCODED_BYTES,
        ge=0,
        description="where vision and connector are frozen, host memory for what they make of images, which is then "
        "computed once an image (it should hold those of a step); 0: in every pass",
    )
    quantization: Literal["none", "nf4"] = Field(
        default="none",
        description="nf4: hold the linear layers of a language model trained by `lora` in 4 bits (QLoRA, "
        "arXiv:2305.14314)",
    )

    def loading(self, checkpoint: str) -> Self:
        """The same options for a checkpoint that was written by a run with them: low-rank adapters merged, no layer
        quantized."""
        merged = {part: "full" for part, way in self.train.model_dump().items() if way == "lora"}
        train = self.train.model_copy(update=merged)
        changes = dict.fromkeys(self.origins) | {"path": checkpoint, "train": train, "quantization": "none"}
        return self.model_copy(update=changes)

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if sum(getattr(self, name) is not None for name in self.origins) != 1:
            names = [f"`{name}`" + (f" ({_ORIGINS[name]})" if name in _ORIGINS else "") for name in self.origins]
            raise ValueError(f"set either {' or '.join(names)}")
        return self

    @model_validator(mode="after")
    def _lora_is_read(self) -> ModelConfig:
        if self.lora != LoraOptions() and "lora" not in (self.train.vision, self.train.connector, self.train.language):
            raise ValueError("lora is set, and train asks for it in no part: set train, such as {language: lora}")
        return self

    @model_validator(mode="after")
    def _quantized_is_adapted(self) -> ModelConfig:
        if self.quantization != "none" and self.train.language != "lora":
            raise ValueError(
                f"quantization is {self.quantization}, and what is quantized cannot be trained itself: set "
                "train: {language: lora}, or quantization: none"
            )
        if self.quantization != "none" and self.lora.dora:
            raise ValueError("lora.dora needs weights that are not quantized: set quantization: none, or dora: false")
        return self
