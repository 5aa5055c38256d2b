"""The contract of a model family: everything the core needs to know of a vision-language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from torch import LongTensor, Tensor, nn
from transformers import Cache, PreTrainedModel

from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message

Features = Mapping[str, Tensor]
"""One preprocessed image, on the CPU: what the model's image processor makes of it."""

Part = Literal["vision", "connector", "language"]
"""What the weights of a model belong to: what sees, what translates that into the language model's space, the rest."""


class ModelAdapter(Protocol):
    """A model family. The target of a `model` component, called with its config (a `ModelConfig`).

    pad_token: token id for padding; never an image placeholder.
    end_of_turn: token ids, any of which ends the assistant's turn; the first is the one that the chat template writes.
    image_token: token id of the image placeholder; a rendered prompt holds one for each image feature.
    forbidden_tokens: ids that may never be sampled: placeholders, and ids for which the tokenizer has no token.
    context_length: longest sequence, in tokens, that the model's positions allow.
    takes_trees: whether `hidden_states` takes masks of four dimensions, under which a row is a tree of continuations.
        Without, every continuation has a row of its own.
    """

    pad_token: int
    end_of_turn: tuple[int, ...]
    image_token: int
    forbidden_tokens: tuple[int, ...]
    context_length: int
    takes_trees: bool

    def load(self) -> PreTrainedModel:
        """The model with its language head. Raises ModelError. Called before anything else, and again for a copy."""
        ...

    def preprocess(self, image: Image) -> Features:
        """Resize, normalise, cut into patches. Raises DataError that names the image."""
        ...

    def feature_count(self, features: Features) -> int:
        """How many image tokens this image becomes."""
        ...

    def render(
        self, messages: Sequence[Message], features: Sequence[Features], *, continues: bool = False
    ) -> tuple[int, ...]:
        """Token ids of a conversation up to where the assistant answers, image placeholders expanded.

        continues: the messages follow an answer of the assistant in a conversation that is under way. The ids are then
        those after the token that ended the assistant's turn, so that the tokens of a whole conversation are those of
        its first messages, of the answer, the end of turn, and these.
        """
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text: no special token is parsed or added."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of sampled tokens, special tokens left out."""
        ...

    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> LongTensor:
        """[axes, T] position ids of a piece of a sequence whose first position is `start`; 1 axis, or 3 for M-RoPE.

        The next piece starts at the largest of them plus one. Text counts up by one on all axes alike, whatever it
        says: of what is sampled nobody asks.
        """
        ...

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """The images of a batch, in reading order, as the model's keyword arguments."""
        ...

    def hidden_states(
        self,
        model: PreTrainedModel,
        *,
        tokens: Tensor,  # [N, T]
        attention_mask: Tensor,  # [N, S + T], S tokens in the cache; or [N, 1, T, S + T]
        positions: Tensor,  # [axes, N, T]
        media: Mapping[str, Tensor],
        cache: Cache | None,
    ) -> Tensor:
        """[N, T, H] last hidden states (after the final norm); appends to `cache`, or without one keeps nothing.
        Differentiable.

        The mask says which tokens there are, 1 or 0, of which each sees those before it; or it is to be added to the
        scores of the attention as it is, 0 or the lowest number, because a row is a tree of continuations that do not
        see each other. Most of transformers' models take both; one that says no to `takes_trees` is given the first
        alone.
        """
        ...

    def lm_head(self, model: PreTrainedModel) -> nn.Module:
        """The module that maps hidden states to logits over the vocabulary."""
        ...

    def part_of(self, parameter: str) -> Part:
        """Which part of the model a parameter, by its name in the model, belongs to."""
        ...

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        """Write a standard transformers checkpoint: weights, config, processor."""
        ...


@runtime_checkable
class OwnProcessor(Protocol):
    """What an adapter may offer beside: what the family's own processor makes of whole prompts, for `rllava parity`."""

    def own_tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a conversation up to where the assistant answers."""
        ...

    def own_inputs(self, tokens: Sequence[int], images: Sequence[Image]) -> dict[str, Tensor]:
        """Keyword arguments of the model's own `forward` for one whole sequence with all its images."""
        ...


@runtime_checkable
class EncodesImages(Protocol):
    """What an adapter may offer beside: to compute apart what the parts that see make of an image, so that where they
    are frozen it is done once an image, not in every pass."""

    def encodes_images(self, model: PreTrainedModel) -> bool:
        """Whether it can with this model."""
        ...

    def encode_images(self, model: PreTrainedModel, media: Mapping[str, Tensor]) -> Features:
        """What vision part and connector make of the images in `media`, which `collate` made.

        Those of several images, each tensor concatenated along its first dimension, are taken by `hidden_states` as
        `media`, in the place of what `collate` makes of them.
        """
        ...
