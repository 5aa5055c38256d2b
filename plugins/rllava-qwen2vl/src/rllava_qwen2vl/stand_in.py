"""A processor for a model of which only the config is known: its image processor, and a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from rllava_core.policy.scratch import byte_tokenizer
from rllava_qwen2vl.tiny import CHAT_TEMPLATE, PROCESSORS, SPECIAL_TOKENS, TEMPLATE_WORDS

KINDS = {
    "qwen2_vl": "tiny",
    "qwen2_5_vl": "tiny-qwen2.5",
    "qwen3_vl": "tiny-qwen3",
    "qwen3_vl_moe": "tiny-qwen3-moe",
}
"""The tiny model of the same family, whose processor class it is."""

PIXELS = {"qwen3_vl": (256 * 256, 4096 * 4096), "qwen3_vl_moe": (256 * 256, 4096 * 4096)}
"""Fewest and most pixels of an image, where the published checkpoints have others than Qwen2-VL's."""


def stand_in_processor(config: PreTrainedConfig, images: Mapping[str, Any]) -> Any:
    """images: what the checkpoint says of its image processor, which may be nothing."""
    fewest, most = PIXELS.get(config.model_type, (56 * 56, 28 * 28 * 16384))
    size = images.get("size") or {}
    vision = config.vision_config
    options: dict[str, Any] = {
        "size": {
            "shortest_edge": images.get("min_pixels", size.get("shortest_edge", fewest)),
            "longest_edge": images.get("max_pixels", size.get("longest_edge", most)),
        },
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    return PROCESSORS[KINDS[config.model_type]](
        image_processor=Qwen2VLImageProcessor(**options),
        tokenizer=byte_tokenizer(
            Qwen2Tokenizer, SPECIAL_TOKENS, end="<|im_end|>", pad="<|endoftext|>", words=TEMPLATE_WORDS
        ),
        video_processor=Qwen2VLVideoProcessor(**options),
        chat_template=CHAT_TEMPLATE,
    )
