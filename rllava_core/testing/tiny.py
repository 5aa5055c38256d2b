"""A vision-language model of a few thousand parameters, and the adapter that makes it a policy.

Small enough to read in a minute and to train on a laptop's CPU, it is also the place to start an adapter from: replace
the model by that of your family, and each method by what your family does, until `ModelAdapterConformance` passes.

Text is bytes. Images are cut into squares of 4×4 pixels, each of which becomes one token by a linear map, so an image
of h×w pixels is (h // 4)·(w // 4) tokens and their number varies. The language model is a Llama of two layers.
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
from rllava_core.policy.adapter import Features, Part
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.memory import cache_argument

START, END, PAD, IMAGE = 256, 257, 258, 259
"""The special tokens, behind the 256 bytes: beginning and end of a turn, padding, the place of an image's square."""

VOCABULARY = 260
PATCH = 4
"""Side of a square of an image, in pixels."""


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

    def see(self, patches: Tensor) -> Tensor:
        """[squares, H] of [squares, 3·4·4]."""
        # Images come in float32, whatever the precision of the weights.
        return cast(Tensor, self.vision(patches.to(self.vision.weight.dtype)))

    def hidden(self, tokens: Tensor, patches: Tensor | None, seen: Tensor | None = None, **inputs: Any) -> Tensor:
        """[N, T, H] after the final norm.

        tokens: [N, T]; patches: [placeholders in `tokens`, 3·4·4], or what `see` has made of them.
        """
        embedded = self.backbone.embed_tokens(tokens)
        if patches is not None:
            seen = self.see(patches)
        if seen is not None:
            images = (tokens == IMAGE).unsqueeze(-1).expand_as(embedded)
            embedded = embedded.masked_scatter(images, seen.to(embedded.dtype))
        return cast(Tensor, self.backbone(inputs_embeds=embedded, **inputs).last_hidden_state)


class TinyAdapter:
    """The tiny family. What each method must do is said by `rllava_core.policy.adapter.ModelAdapter`."""

    pad_token = PAD
    end_of_turn: tuple[int, ...] = (END,)
    image_token = IMAGE
    # END is missing: the policy samples it to end its turn.
    forbidden_tokens: tuple[int, ...] = (START, PAD, IMAGE)
    context_length = 256
    takes_trees: bool = True

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def load(self) -> PreTrainedModel:
        """A saved model, or random weights from torch's global random state, which the run's seed has set."""
        dtype = getattr(torch, self.config.dtype)
        if self.config.path is not None:
            if not (Path(self.config.path) / "config.json").is_file():
                raise ModelError(f"model {self.config.path}: holds no config.json")
            return TinyModel.from_pretrained(self.config.path, dtype=dtype, attn_implementation=self.config.attention)
        model = TinyModel(
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
        model.set_attn_implementation(self.config.attention)
        return cast(PreTrainedModel, model.to(dtype))

    def preprocess(self, image: Image) -> Features:
        """[squares, 3·4·4] float32 from -1 to 1, row by row; pixels beyond the last whole square are cut off."""
        height, width = (side // PATCH for side in image.pixels.shape[:2])
        if height * width == 0:
            raise DataError(f"{image.source}: smaller than {PATCH} pixels")
        pixels = image.pixels[: height * PATCH, : width * PATCH].astype(np.float32) / 127.5 - 1
        patches = pixels.reshape(height, PATCH, width, PATCH, 3).transpose(0, 2, 1, 3, 4)
        return {"patches": torch.from_numpy(patches.reshape(height * width, -1).copy())}

    def feature_count(self, features: Features) -> int:
        """One token a square."""
        return len(features["patches"])

    def render(
        self, messages: Sequence[Message], features: Sequence[Features], *, continues: bool = False
    ) -> tuple[int, ...]:
        """START and END around each turn; the last START is the assistant's, whose turn it is.

        Nothing stands before a conversation or between its turns, so what continues one looks as what begins one.
        """
        counts = iter(self.feature_count(item) for item in features)
        tokens: list[int] = []
        for message in messages:
            tokens.append(START)
            for part in message.parts:
                tokens += [IMAGE] * next(counts) if isinstance(part, ImagePart) else self.encode(part.text)
            tokens.append(END)
        return (*tokens, START)

    def encode(self, text: str) -> tuple[int, ...]:
        """Bytes: no text can spell a special token."""
        return tuple(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """A policy may sample bytes that are no text, and must still be read."""
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> torch.LongTensor:
        """[1, T]: text and images alike count up, token by token."""
        positions = torch.arange(start, start + len(tokens))[None]
        return cast(torch.LongTensor, positions)

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """[squares of all images, 3·4·4]; the placeholders say where each image begins and ends."""
        return {"patches": torch.cat([item["patches"] for item in features])}

    def hidden_states(
        self,
        model: PreTrainedModel,
        *,
        tokens: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        media: Mapping[str, Tensor],
        cache: Cache | None,
    ) -> Tensor:
        """One pass of the model. The mask covers the cache as well; `media` is empty where a piece shows no image."""
        assert isinstance(model, TinyModel)
        return model.hidden(
            tokens,
            media.get("patches"),
            media.get("seen"),
            attention_mask=attention_mask,
            position_ids=positions[0],
            use_cache=cache is not None,
            **{cache_argument(model.backbone): cache},
        )

    def encodes_images(self, model: PreTrainedModel) -> bool:
        """Optional, as is the next: without them, frozen parts see every image again in every pass."""
        return True

    def encode_images(self, model: PreTrainedModel, media: Mapping[str, Tensor]) -> Features:
        """[squares, H], which `hidden_states` puts where the squares would go."""
        assert isinstance(model, TinyModel)
        return {"seen": model.see(media["patches"])}

    def lm_head(self, model: PreTrainedModel) -> nn.Module:
        """Applied by the policy to a few states at a time, so that the logits of all are never held at once."""
        return cast(nn.Module, model.lm_head)

    def part_of(self, parameter: str) -> Part:
        """The linear map sees and translates at once, so there is no connector."""
        return "vision" if parameter.startswith("vision.") else "language"

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        """config.json and model.safetensors, which `load` reads again."""
        model.save_pretrained(directory)
