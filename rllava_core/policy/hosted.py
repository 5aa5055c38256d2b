"""Conversations without tokens, for engines that answer by a model of their own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel
from torch import LongTensor, Tensor, nn
from transformers import Cache, PreTrainedModel

from rllava_core.errors import ModelError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message
from rllava_core.policy.adapter import Features, Part


class Hosted:
    """An adapter of no model: messages stay messages, and are as short as one likes."""

    pad_token = 0
    end_of_turn: tuple[int, ...] = ()
    image_token = -1
    forbidden_tokens: tuple[int, ...] = ()
    context_length = sys.maxsize
    takes_trees = True

    def __init__(self, config: BaseModel | None = None) -> None:
        pass

    def preprocess(self, image: Image) -> Features:
        return {}

    def feature_count(self, features: Features) -> int:
        return 0

    def render(
        self, messages: Sequence[Message], features: Sequence[Features], *, continues: bool = False
    ) -> tuple[int, ...]:
        return ()

    def encode(self, text: str) -> tuple[int, ...]:
        """The bytes of the text, which tell choices apart."""
        return tuple(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def load(self) -> PreTrainedModel:
        self._refuse()

    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> LongTensor:
        self._refuse()

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        self._refuse()

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
        self._refuse()

    def lm_head(self, model: PreTrainedModel) -> nn.Module:
        self._refuse()

    def part_of(self, parameter: str) -> Part:
        self._refuse()

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ModelError("model hosted: there are no weights here, only an engine that answers by a model of its own")
