"""SmolVLM and Idefics3 small enough for a laptop: the real architecture, tokenizer and processor classes.

A tile of 32×32 pixels becomes 16 image tokens (patches of 4, merged 2×2). The vocabulary is bytes, the special tokens,
and the few words of the chat template, so every digit and letter is one token.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    GenerationConfig,
    GPT2Tokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from rllava_core.policy.scratch import byte_tokenizer

TILE, PATCH, SCALE = 32, 4, 2

LONGEST_EDGE = 2 * TILE
"""At most 2×2 tiles, if images are cut."""

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)

TEMPLATE_WORDS = ("System", "User", "Assistant")

CHAT_TEMPLATE = (
    "<|im_start|>"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The family's format without the space before a message that begins with text. The family's own template writes that
space before an answer, too, but does not end a prompt with it."""

INITIALIZER_RANGE = 0.15
"""The 0.02 of large models makes a network of width 64 almost linear, with attention spread so evenly that an image is
the mean of its tokens, and where something is makes no difference."""

ROPE_THETA = 10.0
"""From a base of 10,000 half of the eight frequencies turn by less than 0.01 from one image token to the next."""


def tiny_processor(preset: str) -> Any:
    """The processor: byte-level tokenizer and image processor."""
    tokenizer = byte_tokenizer(
        GPT2Tokenizer, SPECIAL_TOKENS, end="<end_of_utterance>", pad="<|im_end|>", words=TEMPLATE_WORDS
    )
    images: dict[str, Any] = {"size": {"longest_edge": LONGEST_EDGE}, "max_image_size": {"longest_edge": TILE}}
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "image_seq_len": (TILE // PATCH // SCALE) ** 2,
        "chat_template": CHAT_TEMPLATE,
    }
    if preset == "tiny-idefics3":
        return Idefics3Processor(Idefics3ImageProcessor(do_image_splitting=False, **images), **common)
    # The processor demands a video processor; the adapter has no use for it.
    videos = SmolVLMVideoProcessor(num_frames=4, fps=1, **images)
    return SmolVLMProcessor(SmolVLMImageProcessor(do_image_splitting=False, **images), video_processor=videos, **common)


def tiny_model(preset: str, tokenizer: GPT2Tokenizer) -> PreTrainedModel:
    """The model with random weights, from torch's global random state."""
    identifier = tokenizer.convert_tokens_to_ids
    special: dict[str, Any] = {
        "bos_token_id": identifier("<|im_start|>"),
        "eos_token_id": identifier("<end_of_utterance>"),
        "pad_token_id": identifier("<|im_end|>"),
    }
    text: dict[str, Any] = {
        "model_type": "llama",
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
        "image_size": TILE,
        "patch_size": PATCH,
        "initializer_range": INITIALIZER_RANGE,
    }
    common: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "scale_factor": SCALE,
        "image_token_id": identifier("<image>"),
        "pad_token_id": special["pad_token_id"],
        "tie_word_embeddings": False,
    }
    model: PreTrainedModel
    if preset == "tiny-idefics3":
        model = Idefics3ForConditionalGeneration(Idefics3Config(**common))
    else:
        model = SmolVLMForConditionalGeneration(SmolVLMConfig(**common))
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model
