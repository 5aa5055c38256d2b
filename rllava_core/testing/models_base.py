"""The workbench of the model adapters' suite: adapters, prompts, and plain forward passes through the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message
from rllava_core.policy.adapter import Features, ModelAdapter
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.policy import Policy
from rllava_core.specs import Kind
from rllava_core.testing.conformance import Conformance, require
from rllava_core.testing.rollouts import picture
from rllava_core.training.seeds import seed_everything

SPECIAL_TEXTS = (
    *("<image>", "<img>", "[IMG]", "<|image|>", "<|image_pad|>", "<image_soft_token>", "<IMG_CONTEXT>"),
    *("<s>", "</s>", "<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>"),
)
"""How known families spell their special tokens; those of the adapter's own `tokenizer`, if it has one, are added."""


@dataclass(frozen=True)
class Piece:
    """A run of tokens with the features of its images."""

    tokens: tuple[int, ...]
    features: tuple[Features, ...] = ()

    def __add__(self, other: Piece) -> Piece:
        return Piece(self.tokens + other.tokens, self.features + other.features)


class ModelSuite(Conformance):
    """Makes adapters, loads their models, and runs pieces of sequences through them."""

    kind: ClassVar[Kind] = "model"
    options: Mapping[str, Any] = MappingProxyType({"from_scratch": "tiny"})
    image_sizes: tuple[tuple[int, int], ...] = ((16, 16), (16, 32), (24, 16))
    texts: tuple[str, ...] = ("seven", "12", "a b", "dark green, I think.", "Größe 数字 🙂", "two\nlines")
    special_texts: tuple[str, ...] = SPECIAL_TEXTS
    trains_vision: bool = True
    tolerance: float = 1e-4

    def create_with(self, **changes: Any) -> ModelAdapter:
        """An adapter with these options changed; its config is a `ModelConfig`. Raises SkipTest if there is none."""
        adapter: Any = None if self.component else self.create()
        made: Any = type(adapter) if adapter is not None else self.target()
        config = getattr(adapter, "config", None) if adapter is not None else self.config()
        if not isinstance(config, ModelConfig):
            raise SkipTest("the adapter was made without a ModelConfig, so its options cannot be changed")
        # A path takes the place of whatever says where the model comes from.
        origins = dict.fromkeys(config.origins) if "path" in changes else {}
        changed: ModelAdapter = made(type(config).model_validate({**config.model_dump(), **origins, **changes}))
        return changed

    def loaded(self, seed: int = 0) -> tuple[ModelAdapter, PreTrainedModel]:
        """An adapter and its model, random weights from the seed."""
        adapter: ModelAdapter = self.create()
        seed_everything(seed)
        return adapter, adapter.load().eval()

    def policy(self) -> Policy:
        """The adapter's model as a policy."""
        return Policy(*self.loaded()).eval()

    def picture(self, number: int, seed: int | None = None) -> Image:
        """Random pixels in one of the sizes; another `seed` gives other pixels in the same size."""
        height, width = self.image_sizes[number % len(self.image_sizes)]
        return picture(height, width, number if seed is None else seed)

    def piece(self, adapter: ModelAdapter, *parts: str | Image) -> Piece:
        """A user message as the model reads it."""
        features = tuple(adapter.preprocess(part) for part in parts if isinstance(part, Image))
        return Piece(tuple(adapter.render([Message.user(*parts)], features)), features)

    def conversations(self) -> list[tuple[str | Image, ...]]:
        """Messages with one, several and no images, of several sizes, before, between and after text."""
        first, second, third = (self.picture(number) for number in range(3))
        return [
            (first, "Which digit?"),
            ("Two and two?",),
            ("Is ", second, " like ", third, "?"),
            (third, first, second),
            ("A long question that ends with a picture: ", second),
        ]

    def hidden(
        self,
        adapter: ModelAdapter,
        model: PreTrainedModel,
        rows: Sequence[Sequence[Piece]],
        media: Sequence[dict[str, Tensor]] = (),
    ) -> list[Tensor]:
        """[T, H] of each row, its pieces run one after another through one cache, all rows padded on the right.

        media: replaces what `collate` makes of the images of each column of pieces.
        """
        require(len({len(row) for row in rows}) == 1, "every row has as many pieces")
        cache = DynamicCache(config=model.config)
        found: list[list[Tensor]] = [[] for _ in rows]
        starts = [0] * len(rows)
        past = torch.zeros(len(rows), 0, dtype=torch.long)
        for number, column in enumerate(zip(*rows, strict=True)):
            features = [item for piece in column for item in piece.features]
            positions = [
                adapter.positions(piece.tokens, piece.features, start)
                for piece, start in zip(column, starts, strict=True)
            ]
            tokens, mask, padded = _pad(column, positions, adapter.pad_token)
            past = torch.cat([past, mask], dim=1)
            states = adapter.hidden_states(
                model,
                tokens=tokens,
                attention_mask=past,
                positions=padded,
                media=media[number] if media else adapter.collate(features) if features else {},
                cache=cache,
            )
            for row, piece in enumerate(column):
                found[row].append(states[row, : len(piece.tokens)])
                starts[row] = int(positions[row].max()) + 1
        return [torch.cat(states) for states in found]

    def require_close(self, found: Tensor, expected: Tensor, message: str) -> None:
        """Equal to `tolerance`, relative to the largest number if that is above one."""
        gap = _gap(found, expected)
        require(gap <= self.tolerance, f"{message} (by {gap:.2g} of its size)")

    def require_different(self, found: Tensor, expected: Tensor, message: str) -> None:
        """Further apart than rounding can explain."""
        require(_gap(found, expected) > self.tolerance, message)


def head_weight(adapter: ModelAdapter, model: PreTrainedModel) -> Tensor:
    """[V, H] of the language head. Raises ConformanceError if it has none."""
    head = adapter.lm_head(model)
    weight = getattr(head, "weight", None)
    require(
        isinstance(head, nn.Module) and isinstance(weight, Tensor) and weight.ndim == 2,
        f"lm_head() gave {type(head).__name__}; expected a module with a weight of [vocabulary, hidden size]",
    )
    assert isinstance(weight, Tensor)
    return weight


def _gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number if that is above one."""
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def _pad(pieces: Sequence[Piece], positions: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [N, T], mask [N, T], positions [axes, N, T]."""
    width = max(len(piece.tokens) for piece in pieces)
    tokens = torch.full((len(pieces), width), pad)
    mask = torch.zeros(len(pieces), width, dtype=torch.long)
    padded = torch.zeros(positions[0].shape[0], len(pieces), width, dtype=torch.long)
    for row, piece in enumerate(pieces):
        length = len(piece.tokens)
        tokens[row, :length] = torch.tensor(piece.tokens)
        mask[row, :length] = 1
        padded[:, row, :length] = positions[row]
    return tokens, mask, padded
