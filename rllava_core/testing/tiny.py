"""A vision-language model of a few thousand parameters: bytes, a linear map of 4×4 patches, one Llama layer.

Images of h×w pixels become (h // 4)·(w // 4) tokens, so their number varies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, LlamaConfig, LlamaModel, PreTrainedModel

from rllava_core.errors import DataError, ModelError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message
from rllava_core.policy.adapter import Features
from rllava_core.policy.config import ModelConfig

START, END, PAD, IMAGE = 256, 257, 258, 259
VOCABULARY = 260
PATCH = 4


class TinyModel(PreTrainedModel):
    """Llama with image patches in place of placeholder tokens."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.backbone = LlamaModel(config)
        self.vision = nn.Linear(3 * PATCH * PATCH, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def hidden(self, tokens: Tensor, patches: Tensor | None, **inputs: Any) -> Tensor:
        embedded = self.backbone.embed_tokens(tokens)
        if patches is not None:
            images = (tokens == IMAGE).unsqueeze(-1).expand_as(embedded)
            embedded = embedded.masked_scatter(images, self.vision(patches).to(embedded.dtype))
        return cast(Tensor, self.backbone(inputs_embeds=embedded, **inputs).last_hidden_state)


class TinyAdapter:
    pad_token = PAD
    end_of_turn = (END,)
    image_token = IMAGE
    forbidden_tokens = (START, PAD, IMAGE)
    context_length = 256

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def load(self) -> PreTrainedModel:
        if self.config.path is not None:
            if not (Path(self.config.path) / "config.json").is_file():
                raise ModelError(f"model {self.config.path}: holds no config.json")
            return TinyModel.from_pretrained(self.config.path)
        return TinyModel(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=self.context_length,
                initializer_range=0.2,
                bos_token_id=START,
                eos_token_id=END,
                pad_token_id=PAD,
            )
        )

    def preprocess(self, image: Image) -> Features:
        height, width = (side // PATCH for side in image.pixels.shape[:2])
        if height * width == 0:
            raise DataError(f"{image.source}: smaller than {PATCH} pixels")
        pixels = image.pixels[: height * PATCH, : width * PATCH].astype(np.float32) / 127.5 - 1
        patches = pixels.reshape(height, PATCH, width, PATCH, 3).transpose(0, 2, 1, 3, 4)
        return {"patches": torch.from_numpy(patches.reshape(height * width, -1).copy())}

    def feature_count(self, features: Features) -> int:
        return len(features["patches"])

    def render(self, messages: Sequence[Message], features: Sequence[Features]) -> tuple[int, ...]:
        counts = iter(self.feature_count(item) for item in features)
        tokens: list[int] = []
        for message in messages:
            tokens.append(START)
            for part in message.parts:
                tokens += [IMAGE] * next(counts) if isinstance(part, ImagePart) else self.encode(part.text)
            tokens.append(END)
        return (*tokens, START)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> torch.LongTensor:
        positions = torch.arange(start, start + len(tokens))[None]
        return cast(torch.LongTensor, positions)

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        return {"patches": torch.cat([item["patches"] for item in features])}

    def hidden_states(
        self,
        model: PreTrainedModel,
        *,
        tokens: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        media: Mapping[str, Tensor],
        cache: Cache,
    ) -> Tensor:
        assert isinstance(model, TinyModel)
        return model.hidden(
            tokens,
            media.get("patches"),
            attention_mask=attention_mask,
            position_ids=positions[0],
            past_key_values=cache,
            use_cache=True,
        )

    def lm_head(self, model: PreTrainedModel) -> nn.Module:
        return cast(nn.Module, model.lm_head)

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        model.save_pretrained(directory)
