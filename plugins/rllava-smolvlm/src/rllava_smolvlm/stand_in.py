"""A processor for a model of which only the config is known: its image processor, and a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    GPT2Tokenizer,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from rllava_core.policy.scratch import byte_tokenizer
from rllava_smolvlm.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, TEMPLATE_WORDS

MOST_TILES = 4
"""In a row or column, as the published checkpoints cut an image: their longest edge is that of four tiles."""


def stand_in_processor(config: PreTrainedConfig, images: Mapping[str, Any]) -> Any:
    """images: what the checkpoint says of its image processor, which may be nothing."""
    vision = config.vision_config
    tile = int(vision.image_size)
    options: dict[str, Any] = {
        "size": images.get("size", {"longest_edge": MOST_TILES * tile}),
        "max_image_size": images.get("max_image_size", {"longest_edge": tile}),
    }
    common: dict[str, Any] = {
        "tokenizer": byte_tokenizer(
            GPT2Tokenizer, SPECIAL_TOKENS, end="<end_of_utterance>", pad="<|im_end|>", words=TEMPLATE_WORDS
        ),
        "image_seq_len": (tile // vision.patch_size) ** 2 // config.scale_factor**2,
        "chat_template": CHAT_TEMPLATE,
    }
    splits = images.get("do_image_splitting", True)
    if config.model_type == "idefics3":
        return Idefics3Processor(Idefics3ImageProcessor(do_image_splitting=splits, **options), **common)
    videos = SmolVLMVideoProcessor(num_frames=4, fps=1, **options)
    return SmolVLMProcessor(
        SmolVLMImageProcessor(do_image_splitting=splits, **options), video_processor=videos, **common
    )
