"""The tiny LLaVAs, their real processors, and plain forward passes of whole sequences to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message
from rllava_core.policy.scratch import byte_tokenizer
from rllava_llava.adapter import Llava
from rllava_llava.config import LlavaOptions

TEXT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Workbench:
    """Makes adapters and pictures, and says what transformers alone says of them."""

    def adapter(self, preset: str = "tiny", **options: Any) -> Llava:
        origin = {} if options.keys() & {"path", "compose"} else {"from_scratch": preset}
        return Llava(LlavaOptions(**origin, **options))

    def picture(self, width: int, height: int, seed: int = 0) -> Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.from_array(pixels, f"picture {seed}")

    def images(self, messages: Sequence[Message]) -> list[Image]:
        return [part.image for one in messages for part in one.parts if isinstance(part, ImagePart)]

    def processed(self, adapter: Llava, messages: Sequence[Message], nested: bool = False) -> dict[str, Tensor]:
        """What the real processor makes of a conversation, up to where the assistant answers.

        nested: the images are given as those of one sample, which LLaVA-OneVision does not tile if they are several.
        """
        conversation = [
            {
                "role": message.role,
                "content": [
                    {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                    for part in message.parts
                ],
            }
            for message in messages
        ]
        pictures: Any = [image.to_pil() for image in self.images(messages)]
        text = adapter.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        images = [pictures] if nested else pictures
        return dict(adapter.processor(text=[text], images=images if pictures else None, return_tensors="pt"))

    def conversations(self) -> dict[str, tuple[Message, ...]]:
        """Images of several sizes before, between and after text, in one message and in several."""
        small, wide, tall = self.picture(8, 8), self.picture(64, 32, 1), self.picture(24, 56, 2)
        large, strip = self.picture(200, 150, 3), self.picture(300, 7, 4)
        return {
            "text alone": (Message.user("What is two and two?"),),
            "an image before the text": (Message.user(small, "Which digit?"),),
            "an image after the text": (Message.user("Which digit?", tall),),
            "images around the text": (Message.user("Is ", wide, " the same as ", tall, " or ", small, "?"),),
            "images side by side": (Message.user(tall, wide, small, "Which is largest?"),),
            "an image alone": (Message.user(wide),),
            "an image that is shrunk": (Message.user(large, "What is it?"),),
            "an image that is a strip": (Message.user(strip, "What is it?"),),
            "a system message": (
                Message("system", Message.user("Answer with one word.").parts),
                Message.user("Which?", small),
            ),
            "several turns": (
                Message.user("Look: ", wide),
                Message("assistant", Message.user("A wall.").parts),
                Message.user(tall, "And now? ", small),
            ),
            "letters beyond ASCII": (Message.user("Größe, 数字, 🙂?", small, "\n\n  spaces  "),),
        }


@pytest.fixture
def bench() -> Workbench:
    return Workbench()


class Towers:
    """Writes small pretrained models (with random weights) to directories, as somebody would have downloaded them."""

    size: ClassVar[dict[str, int]] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

    def __init__(self, root: Path) -> None:
        self.root = root

    def vision(self, kind: str = "siglip") -> str:
        directory = str(self.root / kind)
        view = {**self.size, "image_size": 32, "patch_size": 8}
        square = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        model: Any
        images: Any = BitImageProcessor(**square)
        torch.manual_seed(1)
        if kind == "clip":
            images = CLIPImageProcessor(**square)
            model = CLIPVisionModel(
                CLIPVisionConfig(**view, intermediate_size=128, initializer_range=0.15, initializer_factor=2.0)
            )
        elif kind == "siglip":
            # With the half that reads text, as it is published.
            images = SiglipImageProcessor(size={"height": 32, "width": 32})
            text = {**self.size, "vocab_size": 100, "intermediate_size": 64}
            model = SiglipModel(SiglipConfig(vision_config={**view, "intermediate_size": 128}, text_config=text))
        elif kind == "dinov2":
            model = Dinov2Model(Dinov2Config(**view, mlp_ratio=2, initializer_range=0.15))
        else:
            model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**view, mlp_ratio=2, initializer_range=0.15))
        model.save_pretrained(directory)
        images.save_pretrained(directory)
        return directory

    def language(self, kind: str = "qwen2") -> str:
        directory = str(self.root / kind)
        size = {**self.size, "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 2048}
        ends: dict[str, int]
        model: Any
        torch.manual_seed(2)
        if kind == "qwen2":
            # A template that knows text only and begins with a system message of its own, and tied embeddings.
            special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
            tokenizer = byte_tokenizer(Qwen2Tokenizer, special, end="<|im_end|>", pad="<|endoftext|>")
            tokenizer.chat_template = TEXT_TEMPLATE
            ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            config: Any = Qwen2Config(
                vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.15, **size, **ends
            )
            model = Qwen2ForCausalLM(config)
        else:
            # SentencePiece, no padding token, no chat template.
            symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
            vocabulary = {symbol: number for number, symbol in enumerate([*symbols, *map(chr, range(33, 127))])}
            tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
            ends = {"bos_token_id": 1, "eos_token_id": 2}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.15, **size, **ends))
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    def compose(self, vision: str = "siglip", language: str = "qwen2", **options: Any) -> dict[str, Any]:
        """What `compose` would say in a config."""
        return {"vision": self.vision(vision), "language": self.language(language), **options}


@pytest.fixture
def towers(tmp_path: Path) -> Towers:
    return Towers(tmp_path / "towers")


@pytest.fixture(scope="class")
def towers_of_class(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    return Towers(tmp_path_factory.mktemp("towers"))
