"""Models that have the shape of a published one and random weights, made where they stay: a plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import workloads
from pydantic import Field
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Qwen2Tokenizer,
)

from rllava_core import ComponentSpec, PluginInfo, hookimpl
from rllava_core.policy.scratch import byte_vocabulary
from rllava_qwen2vl.config import Qwen2VLOptions
from rllava_qwen2vl.stand_in import stand_in_processor
from rllava_qwen2vl.tiny import SPECIAL_TOKENS, TEMPLATE_WORDS

TINY_VOCABULARY = 2048


class ShapeOptions(Qwen2VLOptions):
    """Options of the adapter `random_qwen2vl`."""

    from_scratch: str | None = Field(  # type: ignore[assignment]
        default=None, description="a directory that holds config.json and a processor, and no weights"
    )
    device: str = Field(default="cpu", description="where the weights are made")


class RandomQwen2VL(workloads.Endless):
    """A model of a given shape with random weights, made where and as they stay; its answers never end."""

    config: ShapeOptions

    def scratch_processor(self) -> Any:
        return AutoProcessor.from_pretrained(self.config.from_scratch)

    def scratch_model(self) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(self.config.from_scratch)
        with torch.device(self.config.device):
            made: PreTrainedModel = AutoModelForImageTextToText.from_config(
                config, dtype=getattr(torch, self.config.dtype), attn_implementation=self.config.attention
            )
        return made


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="Models of published shapes with random weights.")


@hookimpl
def rllava_models() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="random_qwen2vl",
            target="random_shapes:RandomQwen2VL",
            config="random_shapes:ShapeOptions",
            summary="a Qwen vision-language model of a given shape with random weights",
            provides=frozenset({"heads"}),
        )
    ]


def write_shape(model: str, directory: Path, *, tiny: bool) -> None:
    """`config.json` of a published shape with our tokenizer's ids, and a processor with as many words as the model.

    The processor cuts images as the model's own does; only its words are others.
    """
    assert Qwen2VLOptions.shapes is not None
    config = json.loads((Qwen2VLOptions.shapes / model / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config", config)  # that of Qwen2.5-VL is flat
    if tiny:
        _shrink(text, config["vision_config"])
    tokenizer = _tokenizer(text["vocab_size"])
    identifier = tokenizer.convert_tokens_to_ids
    config |= {
        "image_token_id": identifier("<|image_pad|>"),
        "video_token_id": identifier("<|video_pad|>"),
        "vision_start_token_id": identifier("<|vision_start|>"),
        "vision_end_token_id": identifier("<|vision_end|>"),
    }
    text |= {
        "bos_token_id": identifier("<|endoftext|>"),
        "eos_token_id": identifier("<|im_end|>"),
        "pad_token_id": identifier("<|endoftext|>"),
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    own = stand_in_processor(AutoConfig.from_pretrained(directory), {})
    type(own)(
        image_processor=own.image_processor,
        tokenizer=tokenizer,
        video_processor=own.video_processor,
        chat_template=own.chat_template,
    ).save_pretrained(directory)


def _shrink(text: dict[str, Any], vision: dict[str, Any]) -> None:
    """Two narrow layers of each kind. Heads keep their size, which positions are made for, and images their tokens."""
    text |= {
        "vocab_size": TINY_VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    vision |= {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 256}
    for name, layers in (("fullatt_block_indexes", [1]), ("deepstack_visual_indexes", [0])):
        if name in vision:
            vision[name] = layers


def _tokenizer(size: int) -> Qwen2Tokenizer:
    """Bytes, words that nobody writes to fill the vocabulary, and the special tokens."""
    vocabulary, merges = byte_vocabulary(TEMPLATE_WORDS)
    for number in range(size - len(vocabulary) - len(SPECIAL_TOKENS)):
        vocabulary[f"w{number}"] = len(vocabulary)
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    end, pad = "<|im_end|>", "<|endoftext|>"
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        eos_token=end,
        pad_token=pad,
        unk_token=pad,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (end, pad)],
    )
