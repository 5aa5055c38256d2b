"""LLaVA models small enough for a laptop: the real architecture, tokenizer and processor classes, built from a config.

A view of 32×32 pixels becomes 16 image tokens (patches of 8). LLaVA-1.5 sees an image as one view; LLaVA-NeXT and
LLaVA-OneVision see it as one view and again in tiles.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)

from rllava_core.policy.scratch import byte_tokenizer

VIEW, PATCH = 32, 8

TILES_NEXT = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
"""Height and width of the layouts of tiles: those that transformers' LLaVA-NeXT begins with, for smaller views."""

TILES_ONEVISION = [[32 * rows, 32 * columns] for rows in range(1, 4) for columns in range(1, 4)]
"""As LLaVA-OneVision's (arXiv:2408.03326), which go up to 6×6."""

LLAMA_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message['role']] }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Vicuna's format, with images where they stand in the message, and an end for every answer."""

QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

INITIALIZER_RANGE = 0.15
"""The 0.02 of large models makes a network of width 64 almost linear, with attention spread so evenly that an image is
the mean of its tokens. From about 1/√hidden on places are told apart."""

ROPE_THETA = 10.0
"""With a base of 10,000 and heads of 16 most pairs of a head turn too slowly to tell 16 image tokens apart."""


def tiny_processor(preset: str) -> Any:
    """The processor: a tokenizer of bytes and letters, and the image processor."""
    # Scans are grey: the mean of a picture is what matters, and one spread for all colours.
    normal: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"height": VIEW, "width": VIEW}
    if preset == "tiny-onevision":
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=TILES_ONEVISION, **normal),
            tokenizer=qwen_tokenizer(),
            video_processor=LlavaOnevisionVideoProcessor(size=size, **normal),
            num_image_tokens=(VIEW // PATCH) ** 2,
            vision_feature_select_strategy="full",
            chat_template=QWEN_TEMPLATE,
        )
    # The shorter edge to 32 pixels, then the middle: CLIP's way, of which LLaVA-1.5 sees the sides no more.
    square: dict[str, Any] = {"size": {"shortest_edge": VIEW}, "crop_size": size, **normal}
    images: Any = LlavaNextImageProcessor if preset == "tiny-next" else CLIPImageProcessor
    kind: Any = LlavaNextProcessor if preset == "tiny-next" else LlavaProcessor
    return kind(
        image_processor=images(**square, **({"image_grid_pinpoints": TILES_NEXT} if preset == "tiny-next" else {})),
        tokenizer=llama_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAMA_TEMPLATE,
    )


def tiny_model(preset: str, tokenizer: Any) -> PreTrainedModel:
    """The model with random weights, from torch's global random state."""
    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text: dict[str, Any] = {
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
        "image_size": VIEW,
        "patch_size": PATCH,
    }
    tokens: dict[str, Any] = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    model: PreTrainedModel
    if preset == "tiny-onevision":
        model = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(
                text_config=Qwen2Config(**text),
                vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
                video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
                image_grid_pinpoints=TILES_ONEVISION,
                **tokens,
            )
        )
    else:
        # As in LLaVA, the features are those before the last layer; so one more layer than what is used. The factor,
        # as CLIP's own rule for the weights of its attention would spread it evenly over the patches.
        tower = CLIPVisionConfig(
            **{**vision, "num_hidden_layers": 3}, initializer_range=INITIALIZER_RANGE, initializer_factor=2.0
        )
        shared: dict[str, Any] = {
            "text_config": LlamaConfig(**text),
            "vision_config": tower,
            "vision_feature_layer": -2,
            **tokens,
        }
        if preset == "tiny-next":
            model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=TILES_NEXT, **shared))
        else:
            model = LlavaForConditionalGeneration(LlavaConfig(image_seq_length=(VIEW // PATCH) ** 2, **shared))
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model


def qwen_tokenizer() -> Qwen2Tokenizer:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    words = ("system", "user", "assistant")
    tokenizer: Qwen2Tokenizer = byte_tokenizer(
        Qwen2Tokenizer, special, end="<|im_end|>", pad="<|endoftext|>", words=words
    )
    return tokenizer


def llama_tokenizer() -> LlamaTokenizer:
    """As SentencePiece writes text: `▁` for a space and before a text, bytes for letters that it does not know.

    The words of the template, and every digit after a space, are one token.
    """
    letters = ["▁", *map(chr, range(33, 127))]
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    merges: list[tuple[str, str]] = []
    for word in ("USER", "ASSISTANT", *(f"▁{digit}" for digit in range(10))):
        for length in range(2, len(word) + 1):
            if word[:length] not in vocabulary:
                vocabulary[word[:length]] = len(vocabulary)
                merges.append((word[: length - 1], word[length - 1]))
    for token in ("<image>", "<pad>"):
        vocabulary[token] = len(vocabulary)
    return LlamaTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=True,
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
