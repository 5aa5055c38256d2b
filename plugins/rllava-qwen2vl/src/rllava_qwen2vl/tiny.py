"""Qwen models small enough for a laptop: the real architecture, tokenizer and processor classes, built from a config.

32×32 pixels become 16 image tokens (patches of 4, merged 2×2). The vocabulary is bytes, the special tokens, and the
few words of the chat template, so every digit and letter is one token.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from rllava_core.policy.scratch import byte_tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

TEMPLATE_WORDS = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's format without its default system message, which in bytes would be longer than the images."""

MIN_PIXELS, MAX_PIXELS = 32 * 32, 64 * 64

INITIALIZER_RANGE = 0.15
"""The 0.02 of large models makes a network of width 64 almost linear, with attention spread so evenly that an image is
the mean of its tokens, and where something is makes no difference. From about 1/√hidden on places are told apart the
sooner the larger it is, and digits are read the worse: 0.15 is between."""

ROPE_THETA = 10.0
"""M-RoPE gives height and width the slow part of the frequencies. From a base of 10,000 the fastest of them turns by
0.1 from row to row and by 0.003 from column to column, so that a grid of 4×4 tokens is as good as one point; from 10
it turns by 0.56 and 0.24."""


PROCESSORS = {
    "tiny": Qwen2VLProcessor,
    "tiny-64": Qwen2VLProcessor,
    "tiny-qwen2.5": Qwen2_5_VLProcessor,
    "tiny-qwen3": Qwen3VLProcessor,
    "tiny-qwen3-moe": Qwen3VLProcessor,
}


def tiny_processor(preset: str) -> Any:
    """The processor: byte-level tokenizer and image processor."""
    images = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    videos = Qwen3VLVideoProcessor if preset.startswith("tiny-qwen3") else Qwen2VLVideoProcessor
    return PROCESSORS[preset](
        image_processor=Qwen2VLImageProcessor(size=size, **images),
        tokenizer=byte_tokenizer(
            Qwen2Tokenizer, SPECIAL_TOKENS, end="<|im_end|>", pad="<|endoftext|>", words=TEMPLATE_WORDS
        ),
        video_processor=videos(size=size, **images),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(preset: str, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
    """The model with random weights, from torch's global random state."""
    identifier = tokenizer.convert_tokens_to_ids
    special = {
        "bos_token_id": identifier("<|endoftext|>"),
        "eos_token_id": identifier("<|im_end|>"),
        "pad_token_id": identifier("<|endoftext|>"),
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": INITIALIZER_RANGE,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [2, 3, 3]},
        **special,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": INITIALIZER_RANGE,
    }
    of_qwen3 = {"intermediate_size": 128, "out_hidden_size": 64, "num_position_embeddings": 64}
    tokens = {
        "image_token_id": identifier("<|image_pad|>"),
        "video_token_id": identifier("<|video_pad|>"),
        "vision_start_token_id": identifier("<|vision_start|>"),
        "vision_end_token_id": identifier("<|vision_end|>"),
        "tie_word_embeddings": False,
    }
    model: PreTrainedModel
    if preset == "tiny-64":
        # Two heads of 64 where the others have four of 16, which other engines' attention on the CPU refuses.
        rope = {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [8, 12, 12]}
        wide = {"hidden_size": 128, "num_attention_heads": 2, "rope_parameters": rope}
        own = {"embed_dim": 64, "mlp_ratio": 2, "hidden_size": 128}
        config = Qwen2VLConfig(text_config={**text, **wide}, vision_config={**vision, **own}, **tokens)
        model = Qwen2VLForConditionalGeneration(config)
    elif preset == "tiny-qwen2.5":
        # Windows of 16 pixels in the first layer, the whole image in the second.
        own = {"intermediate_size": 128, "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [1]}
        config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, **own}, **tokens)
        model = Qwen2_5_VLForConditionalGeneration(config)
    elif preset == "tiny-qwen3":
        # DeepStack: the first layer of the language model is given features of the first of the vision part.
        own = {**of_qwen3, "deepstack_visual_indexes": [0]}
        config = Qwen3VLConfig(text_config={**text, "head_dim": 16}, vision_config={**vision, **own}, **tokens)
        model = Qwen3VLForConditionalGeneration(config)
    elif preset == "tiny-qwen3-moe":
        own = {**of_qwen3, "deepstack_visual_indexes": [0]}
        experts = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        config = Qwen3VLMoeConfig(text_config={**text, **experts}, vision_config={**vision, **own}, **tokens)
        model = Qwen3VLMoeForConditionalGeneration(config)
    else:
        own = {"embed_dim": 64, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config=text, vision_config={**vision, **own}, **tokens)
        )
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model
