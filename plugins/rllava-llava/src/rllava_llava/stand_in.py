"""A processor for a model of which only the config is known: its image processor, and a small tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedConfig,
)

from rllava_llava.tiny import LLAMA_TEMPLATE, QWEN_TEMPLATE, llama_tokenizer, qwen_tokenizer


def stand_in_processor(config: PreTrainedConfig, images: Mapping[str, Any]) -> Any:
    """images: what the checkpoint says of its image processor, which may be nothing."""
    vision = config.vision_config
    view = int(vision.image_size)
    size = {"height": view, "width": view}
    strategy = config.vision_feature_select_strategy
    if config.model_type == "llava_onevision":
        tiles = images.get("image_grid_pinpoints", config.image_grid_pinpoints)
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiles),
            tokenizer=qwen_tokenizer(),
            video_processor=LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=(view // vision.patch_size) ** 2,
            vision_feature_select_strategy=strategy,
            chat_template=QWEN_TEMPLATE,
        )
    square: dict[str, Any] = {"size": {"shortest_edge": view}, "crop_size": size}
    processor: Any = LlavaProcessor
    image_processor: Any = CLIPImageProcessor(**square)
    if config.model_type == "llava_next":
        tiles = images.get("image_grid_pinpoints", config.image_grid_pinpoints)
        processor, image_processor = LlavaNextProcessor, LlavaNextImageProcessor(**square, image_grid_pinpoints=tiles)
    return processor(
        image_processor=image_processor,
        tokenizer=llama_tokenizer(),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        # CLIP's class token, which the strategy `default` leaves out again.
        num_additional_image_tokens=1 if vision.model_type == "clip_vision_model" else 0,
        chat_template=LLAMA_TEMPLATE,
    )
