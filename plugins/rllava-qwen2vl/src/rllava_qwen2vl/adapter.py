"""The Qwen vision-language families as policies: what they add to transformers' common ground."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rllava_core.policy.adapter import Features
from rllava_core.policy.transformers_adapter import TransformersAdapter
from rllava_qwen2vl.config import Qwen2VLOptions
from rllava_qwen2vl.stand_in import stand_in_processor
from rllava_qwen2vl.tiny import tiny_model, tiny_processor


class Qwen2VL(TransformersAdapter):
    """Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923), Qwen3-VL and its mixture of experts (2511.21631).

    They differ inside their models (window attention in the vision part, interleaved M-RoPE, DeepStack, experts), and
    not in what a policy must know of them.
    """

    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    placeholders = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
    parts = MappingProxyType(
        {
            "model.visual.": "vision",
            "model.visual.merger.": "connector",
            "model.visual.deepstack_merger_list.": "connector",
        }
    )

    config: Qwen2VLOptions

    def __init__(self, config: Qwen2VLOptions) -> None:
        super().__init__(config)
        images = self.processor.image_processor
        if config.min_pixels is not None or config.max_pixels is not None:
            images.size = {
                "shortest_edge": config.min_pixels or images.size["shortest_edge"],
                "longest_edge": config.max_pixels or images.size["longest_edge"],
            }
        self.merge = int(images.merge_size)

    def scratch_processor(self) -> Any:
        return tiny_processor(str(self.config.from_scratch))

    def scratch_model(self) -> PreTrainedModel:
        return tiny_model(str(self.config.from_scratch), self.tokenizer)

    def shape_processor(self, config: PreTrainedConfig, images: Mapping[str, Any]) -> Any:
        return stand_in_processor(config, images)

    def feature_count(self, features: Features) -> int:
        return int(features["image_grid_thw"].prod()) // self.merge**2

    def image_text(self, features: Features) -> str:
        return self.placeholder * self.feature_count(features)

    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> torch.LongTensor:
        """[3, T] M-RoPE: time, height and width (arXiv:2409.12191, section 2.1).

        Text counts up on all axes alike; an image is laid out on its merged grid; what follows it goes on from the
        largest position so far plus one.
        """
        if not features:
            return cast(torch.LongTensor, torch.arange(start, start + len(tokens)).expand(3, -1))
        pieces = [torch.zeros(3, 0, dtype=torch.long)]
        grids = iter(features)
        for is_image, run in itertools.groupby(tokens, key=lambda token: token == self.image_token):
            length = len(list(run))
            while length > 0:
                if is_image:
                    time, height, width = next(grids)["image_grid_thw"][0].tolist()
                    shape = (time, height // self.merge, width // self.merge)
                    pieces.append(start + torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, 3).T)
                    start += max(shape[1:])
                    length -= shape[0] * shape[1] * shape[2]
                else:
                    pieces.append(torch.arange(start, start + length).expand(3, -1))
                    start += length
                    length = 0
        positions: Any = torch.cat(pieces, dim=1)
        return positions

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        return {name: torch.cat([item[name] for item in features]) for name in ("pixel_values", "image_grid_thw")}
