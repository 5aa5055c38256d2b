"""The LLaVA families as policies: what they add to transformers' common ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedConfig, PreTrainedModel

from rllava_core.errors import DataError, ModelError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message, Observation
from rllava_core.policy.adapter import Features
from rllava_core.policy.transformers_adapter import TransformersAdapter
from rllava_llava.compose import composed_model, composed_processor, require_all
from rllava_llava.config import LlavaOptions
from rllava_llava.resampler import ResampledLlava, ResampledLlavaConfig, ResampledLlavaProcessor
from rllava_llava.stand_in import stand_in_processor
from rllava_llava.tiny import tiny_model, tiny_processor


class Llava(TransformersAdapter):
    """LLaVA-1.5 (arXiv:2310.03744), LLaVA-NeXT, LLaVA-OneVision (arXiv:2408.03326).

    An image is one view of the whole, and in the later two families also tiles in the best-fitting of a few layouts.
    Every image is preprocessed alone, so that a conversation can grow: LLaVA-OneVision's own processor does not tile
    an image that has others beside it in its sample; here all are tiled, or, with `tiling: false`, none.
    """

    model_types = ("llava", "llava_next", "llava_onevision")
    placeholders = ("<image>", "<video>")
    parts = MappingProxyType(
        {
            "model.vision_tower.": "vision",
            "model.multi_modal_projector.": "connector",
            "model.image_newline": "connector",
        }
    )

    config: LlavaOptions

    def __init__(self, config: LlavaOptions) -> None:
        super().__init__(config)
        self.tiles = hasattr(self.processor.image_processor, "image_grid_pinpoints")
        if isinstance(self.processor, LlavaNextProcessor) and not config.tiling:
            raise ModelError(f"model {self.origin}: LLaVA-NeXT tiles every image; `tiling: false` is LLaVA-OneVision's")
        self.untiled = self.tiles and not config.tiling
        if isinstance(self.processor, LlavaProcessor | LlavaNextProcessor) and not self.processor.patch_size:
            raise ModelError(
                f"model {self.origin}: processor_config.json says no patch_size, so the tokens of an image cannot be "
                "counted; set patch_size, num_additional_image_tokens and vision_feature_select_strategy in it"
            )

    @property
    def origin(self) -> str:
        composed = self.config.compose if self.config.path is None else None
        return super().origin if composed is None else f"{composed.vision} + {composed.language}"

    def scratch_processor(self) -> Any:
        return tiny_processor(str(self.config.from_scratch))

    def scratch_model(self) -> PreTrainedModel:
        return tiny_model(str(self.config.from_scratch), self.tokenizer)

    def shape_processor(self, config: PreTrainedConfig, images: Mapping[str, Any]) -> Any:
        return stand_in_processor(config, images)

    def preprocess(self, image: Image) -> Features:
        """pixel_values [views, 3, H, W], and of families that tile: image_sizes [1, 2], batch_num_images [1]."""
        features = self._untiled([image]) if self.untiled else dict(super().preprocess(image))
        if self.tiles:
            features["pixel_values"] = features["pixel_values"][0]
        return features

    def image_text(self, features: Features) -> str:
        pixels = features["pixel_values"]
        batch = {**features, "pixel_values": pixels[None] if self.tiles else pixels}
        text: str = self.processor.replace_image_token(batch, 0)
        return text

    def own_tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        images = [image.to_pil() for image in Observation(tuple(messages)).images]
        if not self.untiled or not images:
            return super().own_tokens(messages)
        text = self._template([{"role": message.role, "content": self._content(message)} for message in messages])
        found = self.processor(text=[text + self.placeholder], images=[[*images, images[-1]]])
        tokens = list(found["input_ids"][0])
        while tokens[-1] == self.image_token:
            tokens.pop()
        return tuple(tokens)

    def own_inputs(self, tokens: Sequence[int], images: Sequence[Image]) -> dict[str, Tensor]:
        return super().own_inputs(tokens, images) | (self._untiled(images) if self.untiled and images else {})

    def _untiled(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """LLaVA-OneVision leaves the images of a sample of several in one view each. So one more is in the sample, and
        taken off again; what stays is `batch_num_images`, from which the model reads that they are several."""
        pictures = [image.to_pil() for image in images]
        try:
            found = self.processor.image_processor(images=[[*pictures, pictures[-1]]], return_tensors="pt")
        except ValueError as error:
            raise DataError(f"{images[0].source}: {error}") from None
        return {name: values[: len(images)] for name, values in found.items()}

    def _load_processor(self) -> Any:
        if self.config.path is None:
            return composed_processor(self.config)
        if self._resampled():
            return self._from_pretrained(ResampledLlavaProcessor.from_pretrained)
        return super()._load_processor()

    def _load_weights(self) -> PreTrainedModel:
        if self.config.path is None:
            return composed_model(self.config, self.tokenizer)
        if not isinstance(self.processor, ResampledLlavaProcessor):
            return super()._load_weights()
        model, report = self._from_pretrained(
            ResampledLlava.from_pretrained,
            dtype=getattr(torch, self.config.dtype),
            attn_implementation=self.config.attention,
            output_loading_info=True,
        )
        require_all(f"model {self.origin}", report)
        resampled: PreTrainedModel = model
        return resampled

    def _resampled(self) -> bool:
        """Whether the checkpoint is one of ours, which transformers' own classes do not know."""
        path = Path(str(self.config.path))
        if path.is_dir() and not (path / "config.json").is_file():
            return False  # the base class says so
        found, _ = self._from_pretrained(PreTrainedConfig.get_config_dict)
        return bool(found.get("model_type") == ResampledLlavaConfig.model_type)
