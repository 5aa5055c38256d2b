"""A LLaVA in which a few learnt queries read the image: every image becomes the same small number of tokens.

No class of transformers is such a model, so its checkpoints say `"model_type": "rllava_llava"` and are loaded through
`rllava_llava.adapter.Llava`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor


class ResampledLlavaConfig(LlavaConfig):
    """A `LlavaConfig` with the shape of the resampler.

    queries: tokens that an image becomes.
    resampler_layers: of cross-attention and MLP.
    resampler_heads: of its attention; must divide the hidden size of the vision tower.
    """

    model_type = "rllava_llava"

    queries: int = 64
    resampler_layers: int = 2
    resampler_heads: int = 8


class ResampledLlavaProcessor(LlavaProcessor):
    """LLaVA's processor, with as many placeholders for every image as there are queries."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, queries: int = 64, chat_template: str | None = None
    ) -> None:
        self.queries = queries
        # Of patches of any size: they are not what is counted.
        super().__init__(image_processor, tokenizer, patch_size=1, chat_template=chat_template)  # type: ignore[no-untyped-call]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return str(self.image_token) * self.queries


class Resampler(nn.Module):
    """A perceiver resampler (Flamingo, arXiv:2204.14198, section 3.1.1), in the width of the vision tower.

    Its queries read the image features and each other in every layer; a linear map leads to the language model's
    space.
    """

    def __init__(self, config: ResampledLlavaConfig) -> None:
        super().__init__()
        vision: Any = config.vision_config
        width = int(vision.hidden_size)
        self.queries = nn.Parameter(torch.empty(config.queries, width))
        self.layers = nn.ModuleList(_Layer(width, config.resampler_heads) for _ in range(config.resampler_layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.get_text_config().hidden_size)

    def reset_parameters(self) -> None:
        """Random weights, from torch's global random state."""
        nn.init.normal_(self.queries)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                module.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """[N, P, width] of patches to [N, queries, H]."""
        read = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            read = layer(read, features)
        mapped: Tensor = self.out(self.norm(read))
        return mapped


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.feature_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, read: Tensor, features: Tensor) -> Tensor:
        """[N, Q, width], [N, P, width] to [N, Q, width]."""
        asked = self.query_norm(read)
        seen = torch.cat([self.feature_norm(features), asked], dim=1)
        query, key, value = (
            rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [N, heads, rows, width / heads]
            for rows in (self.query(asked), *self.key_value(seen).chunk(2, dim=-1))
        )
        found = nn.functional.scaled_dot_product_attention(query, key, value)
        read = read + self.out(found.transpose(1, 2).flatten(-2))
        changed: Tensor = read + self.mlp(self.mlp_norm(read))
        return changed


class ResampledLlava(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with a resampler as its connector."""

    config_class = ResampledLlavaConfig

    def __init__(self, config: ResampledLlavaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = Resampler(config)
        self.post_init()  # type: ignore[no-untyped-call]
