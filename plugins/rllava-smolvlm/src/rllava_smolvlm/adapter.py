"""SmolVLM and Idefics3 as policies: images in tiles, and what they add to transformers' common ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rllava_core.errors import DataError, ModelError
from rllava_core.mdp.images import Image
from rllava_core.policy.adapter import Features
from rllava_core.policy.transformers_adapter import TransformersAdapter
from rllava_smolvlm.config import SmolVLMOptions
from rllava_smolvlm.stand_in import stand_in_processor
from rllava_smolvlm.tiny import tiny_model, tiny_processor

MOST_TILES = 12
"""In a row or column: the image processors make no picture larger than 4096 pixels, and no checkpoint's tiles are
smaller than 364."""


class SmolVLM(TransformersAdapter):
    """SmolVLM, SmolVLM2 (arXiv:2504.05299) and Idefics3 (arXiv:2408.12637).

    An image is cut into rows and columns of square tiles, if `split_images`, with the whole image, squeezed into one
    more tile, behind them. The model reads every tile as an image of its own; the text says which is which.
    """

    model_types = ("smolvlm", "idefics3")
    placeholders = (
        *("<image>", "<video>", "<fake_token_around_image>", "<global-img>"),
        *(f"<row_{row}_col_{column}>" for row in range(1, MOST_TILES + 1) for column in range(1, MOST_TILES + 1)),
    )
    parts = MappingProxyType({"model.vision_model.": "vision", "model.connector.": "connector"})

    config: SmolVLMOptions

    def __init__(self, config: SmolVLMOptions) -> None:
        super().__init__(config)
        # Llama's tokenizer, which Idefics3 has, goes on to call another token the end of a text.
        self.end_of_turn = (self._token(str(self.processor.end_of_utterance_token)),)
        images = self.processor.image_processor
        if config.split_images is not None:
            images.do_image_splitting = config.split_images
        if config.longest_edge is not None:
            images.size = {"longest_edge": config.longest_edge}

    def scratch_processor(self) -> Any:
        return tiny_processor(str(self.config.from_scratch))

    def scratch_model(self) -> PreTrainedModel:
        return tiny_model(str(self.config.from_scratch), self.tokenizer)

    def shape_processor(self, config: PreTrainedConfig, images: Mapping[str, Any]) -> Any:
        return stand_in_processor(config, images)

    def load(self) -> PreTrainedModel:
        model = super().load()
        self._check_tiles(model)
        return model

    def preprocess(self, image: Image) -> Features:
        """pixel_values [tiles, 3, H, W], pixel_attention_mask [tiles, H, W], and grid: [[rows, columns]] of tiles.

        The grid is [[0, 0]] if the image is not cut.
        """
        try:
            found = self.processor.image_processor(
                images=[image.to_pil()], return_row_col_info=True, return_tensors="pt"
            )
        except ValueError as error:
            raise DataError(f"{image.source}: {error}") from None
        pixels = found["pixel_values"][0]
        if not pixels.flatten(1).any(dim=1).all():
            raise DataError(
                f"{image.source}: its pixels become exactly 0, which the model would take for padding and leave out; "
                "give the checkpoint's image processor an image_mean between two of 256 brightnesses, such as 0.5"
            )
        return {
            "pixel_values": pixels,
            # As the image processor gives it, but in an eighth of the memory: 64 bits a pixel say yes or no.
            "pixel_attention_mask": found["pixel_attention_mask"][0].bool(),
            "grid": torch.tensor([[found["rows"][0][0], found["cols"][0][0]]]),
        }

    def image_text(self, features: Features) -> str:
        rows, columns = features["grid"][0].tolist()
        frame, tile = self.processor.fake_image_token, self.placeholder * int(self.processor.image_seq_len)
        whole = f"{frame}<global-img>{tile}{frame}"
        if rows == columns == 0:
            return whole
        lines = (
            "".join(f"{frame}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
            for row in range(1, rows + 1)
        )
        return "".join(lines) + "\n" + whole

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """pixel_values [1, tiles, 3, H, W]: the model fills in placeholders in reading order, whosever they are."""
        return {
            name: torch.cat([item[name] for item in features])[None]
            for name in ("pixel_values", "pixel_attention_mask")
        }

    def _check_tiles(self, model: PreTrainedModel) -> None:
        """What the processor writes for a tile is what the model makes of it."""
        edge = int(self.processor.image_processor.max_image_size["longest_edge"])
        patches, factor = edge // model.config.vision_config.patch_size, model.config.scale_factor
        written, made = int(self.processor.image_seq_len), patches**2 // factor**2
        if written != made or patches % factor:
            raise ModelError(
                f"model {self.origin}: its processor writes {written} image tokens for a tile (image_seq_len), but the "
                f"model makes {made} of {edge}×{edge} pixels (max_image_size); the two must agree"
            )
