"""An InternVL small enough for a laptop: the real architecture, tokenizer and processor classes.

A view of 32×32 pixels becomes 16 image tokens (patches of 4, merged 2×2). An image that is not square is cut into up to
three views, with the whole image, squeezed into one more, behind them.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    GPT2Tokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedModel,
)

from rllava_core.policy.scratch import byte_vocabulary

VIEW, PATCH, MERGE = 32, 4, 2
TOKENS = (VIEW // PATCH // MERGE) ** 2

NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
"""As InternVL's processor asks its tokenizer for them."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

INITIALIZER_RANGE = 0.15
"""The 0.02 of large models makes a network of width 64 almost linear, with attention spread so evenly that an image is
the mean of its tokens, and where something is makes no difference."""

ROPE_THETA = 10.0
"""From a base of 10,000 half of the eight frequencies turn by less than 0.01 from one image token to the next."""


def tiny_processor() -> Any:
    """The processor: byte-level tokenizer and image processor."""
    size = {"height": VIEW, "width": VIEW}
    # Scans are grey: the mean of a picture is what matters, and one spread for all colours.
    normal: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=3, **normal),
        tokenizer=_tokenizer(),
        # The processor demands one; the adapter has no use for it.
        video_processor=InternVLVideoProcessor(size=size, **normal),
        image_seq_length=TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(tokenizer: Any) -> PreTrainedModel:
    """The model with random weights, from torch's global random state."""
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text: dict[str, Any] = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": INITIALIZER_RANGE,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        **special,
    }
    vision: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": [VIEW, VIEW],
        "patch_size": [PATCH, PATCH],
        "initializer_range": INITIALIZER_RANGE,
    }
    model: PreTrainedModel = InternVLForConditionalGeneration(
        InternVLConfig(
            text_config=text,
            vision_config=vision,
            image_seq_length=TOKENS,
            downsample_ratio=1 / MERGE,
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            tie_word_embeddings=False,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model


def _tokenizer() -> Any:
    vocabulary, merges = byte_vocabulary(("system", "user", "assistant"))
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED_TOKENS.values()):
        vocabulary[token] = len(vocabulary)
    kind: Any = GPT2Tokenizer
    return kind(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        extra_special_tokens=NAMED_TOKENS,
    )
