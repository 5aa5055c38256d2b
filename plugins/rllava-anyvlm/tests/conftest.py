"""Tiny checkpoints of real families, with random weights, as transformers alone writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from rllava_core.policy.scratch import byte_vocabulary

# Large enough that places are told apart, see rllava_anyvlm.tiny.
RANGE = 0.15
SQUARE = {"height": 32, "width": 32}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": RANGE,
}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
LAYOUTS = [[32, 64], [64, 32], [64, 64]]


def tokenizer(*tokens: str, **named: str) -> Any:
    """Bytes and special tokens; `named` are those that a processor asks for by name."""
    vocabulary, merges = byte_vocabulary(("System", "User", "Assistant"))
    for token in ("<pad>", "<eot>", *tokens, *named.values()):
        vocabulary[token] = len(vocabulary)
    common: dict[str, Any] = {"eos_token": "<eot>", "pad_token": "<pad>", "unk_token": "<pad>", "bos_token": "<pad>"}
    return hf.GPT2Tokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=named or list(tokens), **common)


def template(image: str, end: str = "<eot>") -> str:
    return (
        "{% for m in messages %}{{ m['role'] | capitalize }}:"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}"
        + image
        + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}"
        + end
        + "\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )


def language(words: Any, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "initializer_range": RANGE,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        **more,
    }


def llava_onevision() -> tuple[Any, Any]:
    words = tokenizer("<image>", "<video>")
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=LAYOUTS),
        words,
        hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )
    config = hf.LlavaOnevisionConfig(
        text_config=language(words, "qwen2"),
        vision_config=SIGLIP,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=LAYOUTS,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
    )
    return processor, config


def smolvlm() -> tuple[Any, Any]:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places)
    size: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(do_image_splitting=True, **size),
        words,
        hf.SmolVLMVideoProcessor(num_frames=4, fps=1, **size),
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    config = hf.SmolVLMConfig(
        text_config=language(words, "llama"),
        vision_config=VISION,
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    return processor, config


def mistral3() -> tuple[Any, Any]:
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    processor = hf.PixtralProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 32}, patch_size=4),
        words,
        patch_size=4,
        spatial_merge_size=2,
        chat_template=template("[IMG]"),
    )
    config = hf.Mistral3Config(
        text_config=language(words, "mistral", sliding_window=None),
        vision_config={**VISION, "model_type": "pixtral", "patch_size": 4, "head_dim": 16},
        spatial_merge_size=2,
        image_token_id=words.convert_tokens_to_ids("[IMG]"),
    )
    return processor, config


def aya_vision() -> tuple[Any, Any]:
    """The text has one token for an image, and the model another."""
    names = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE")
    words = tokenizer(*names, "TILE_GLOBAL")
    processor = hf.AyaVisionProcessor(
        hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=3),
        words,
        patch_size=16,
        img_size=32,
        chat_template=template("<image>"),
    )
    config = hf.AyaVisionConfig(
        text_config=language(words, "cohere2", layer_types=["full_attention"] * 2),
        vision_config=SIGLIP,
        vision_feature_layer=-1,
        downsample_factor=2,
        image_token_id=words.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    return processor, config


def llava_of_one_turn() -> tuple[Any, Any]:
    """Whose chat template does not end the assistant's turn, as LLaVA-1.5's."""
    words = tokenizer("<image>")
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>", end=""),
    )
    config = hf.LlavaConfig(
        text_config=language(words, "llama"),
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return processor, config


def llava_hybrid() -> tuple[Any, Any]:
    """Around a language model half of whose layers are convolutions."""
    processor, config = llava_of_one_turn()
    processor.chat_template = template("<image>")
    config.text_config = hf.Lfm2Config(
        **language(processor.tokenizer, "lfm2", layer_types=["conv", "full_attention"], tie_word_embeddings=False)
    )
    return processor, config


def mistral3_sliding() -> tuple[Any, Any]:
    """Sees eight tokens back."""
    processor, config = mistral3()
    config.text_config.sliding_window = 8
    return processor, config


def mistral3_short() -> tuple[Any, Any]:
    """Has room for eight tokens."""
    processor, config = mistral3()
    config.text_config.max_position_embeddings = 8
    return processor, config


def qwen2_vl() -> tuple[Any, Any]:
    words = tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    size = {"shortest_edge": 8 * 8, "longest_edge": 64 * 64}
    processor = hf.Qwen2VLProcessor(
        hf.Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=1, size=size),
        words,
        hf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2, temporal_patch_size=1, size=size),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    rope = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [2, 3, 3]}
    vision = {"embed_dim": 64, "hidden_size": 64, "depth": 2, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 1}
    config = hf.Qwen2VLConfig(
        text_config=language(words, "qwen2_vl_text", rope_parameters=rope),
        vision_config={**vision, "initializer_range": RANGE},
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    return processor, config


def gemma3() -> tuple[Any, Any]:
    words = tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token="<img>")
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size=SQUARE), words, chat_template=template("<boi>"), image_seq_length=4
    )
    config = hf.Gemma3Config(
        text_config=language(words, "gemma3_text", sliding_window=512, layer_types=["full_attention"] * 2),
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_id=words.convert_tokens_to_ids("<img>"),
        boi_token_index=words.convert_tokens_to_ids("<boi>"),
        eoi_token_index=words.convert_tokens_to_ids("<eoi>"),
        initializer_range=RANGE,
        tie_word_embeddings=False,
    )
    return processor, config


def paligemma() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>")
    images = hf.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, words, chat_template=template("<image>"))
    config = hf.PaliGemmaConfig(
        text_config=language(words, "gemma"),
        vision_config={**SIGLIP, "projection_dim": 64},
        projection_dim=64,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return processor, config


def idefics2() -> tuple[Any, Any]:
    words = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    size = {"shortest_edge": 24, "longest_edge": 32}
    processor = hf.Idefics2Processor(
        hf.Idefics2ImageProcessor(size=size, do_image_splitting=False),
        words,
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 16}
    config = hf.Idefics2Config(
        text_config=language(words, "mistral", sliding_window=None),
        vision_config=VISION,
        perceiver_config={**perceiver, "hidden_size": 64, "num_key_value_heads": 2, "initializer_range": RANGE},
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return processor, config


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    make.__name__: make
    for make in (llava_onevision, smolvlm, mistral3, aya_vision, qwen2_vl, gemma3, paligemma, idefics2)
} | {make.__name__: make for make in (llava_of_one_turn, llava_hybrid, mistral3_sliding, mistral3_short)}


class Checkpoints:
    """Writes checkpoints, each once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, family: str, *, blind: bool = False) -> str:
        """blind: with a connector of zeros, as Gemma 3's is before it is trained."""
        directory = self._directory / (family + "-blind" * blind)
        if not directory.exists():
            with torch.random.fork_rng(devices=[]):
                self._write(family, directory, blind)
        return str(directory)

    def _write(self, family: str, directory: Path, blind: bool) -> None:
        torch.manual_seed(0)
        processor, config = FAMILIES[family]()
        model = hf.AutoModelForImageTextToText.from_config(config)
        for name, values in model.named_parameters():
            if values.ndim > 1 and not values.any():
                torch.nn.init.normal_(values, std=RANGE)
            if blind and "multi_modal_projector" in name:
                torch.nn.init.zeros_(values)
        words = processor.tokenizer
        model.generation_config = hf.GenerationConfig(
            do_sample=False, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
        )
        model.save_pretrained(directory)
        processor.save_pretrained(directory)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("families"))
