"""A Qwen2-VL small enough for a laptop: the real architecture, tokenizer and processor classes, built from a config.

32×32 pixels become 16 image tokens (patches of 4, merged 2×2). The vocabulary is bytes, the special tokens, and the
few words of the chat template, so every digit and letter is one token.
"""

from __future__ import annotations

from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

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


def tiny_processor() -> Qwen2VLProcessor:
    """The processor: byte-level tokenizer and image processor."""
    images = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **images),
        tokenizer=_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size=size, **images),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    """The model with random weights, from torch's global random state."""
    identifier = tokenizer.convert_tokens_to_ids
    special = {
        "bos_token_id": identifier("<|endoftext|>"),
        "eos_token_id": identifier("<|im_end|>"),
        "pad_token_id": identifier("<|endoftext|>"),
    }
    config = Qwen2VLConfig(
        text_config={
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
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 64,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=identifier("<|image_pad|>"),
        video_token_id=identifier("<|video_pad|>"),
        vision_start_token_id=identifier("<|vision_start|>"),
        vision_end_token_id=identifier("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model


def _tokenizer() -> Qwen2Tokenizer:
    symbols = sorted(bytes_to_unicode().values())
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    merges: list[tuple[str, str]] = []
    for word in TEMPLATE_WORDS:
        for length in range(2, len(word) + 1):
            vocabulary[word[:length]] = len(vocabulary)
            merges.append((word[: length - 1], word[length - 1]))
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
