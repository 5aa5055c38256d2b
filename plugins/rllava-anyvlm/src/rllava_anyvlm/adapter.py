"""Any image-text-to-text model of transformers as a policy, as far as a probe finds it to be one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from rllava_anyvlm.config import AnyVLMOptions
from rllava_anyvlm.parts import beginnings, part_of
from rllava_anyvlm.probe import probe
from rllava_anyvlm.tiny import tiny_model, tiny_processor
from rllava_core.errors import DataError, ModelError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message, Observation
from rllava_core.policy.adapter import Features, Part
from rllava_core.policy.transformers_adapter import TransformersAdapter

TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
"""What processors say of the text. All else that they make is of the images."""


class AnyVLM(TransformersAdapter):
    """A family that nobody wrote an adapter for.

    What an image becomes, in the text and in pixels, is what the family's own processor makes of a text that is
    nothing but an image. That positions count up, that attention is causal and that images can be preprocessed one by
    one is assumed here, and compared with the family's own forward whenever a model is loaded.
    """

    config: AnyVLMOptions

    _image_id: int | None = None

    def __init__(self, config: AnyVLMOptions) -> None:
        super().__init__(config)
        # Known once the model is loaded.
        self._parts: Mapping[str, Part] = {"": "language"}
        if self._image_id is not None:
            # Not always what stands for an image in the text: Gemma 3 and Aya have two tokens.
            self.image_token = self._image_id

    def scratch_processor(self) -> Any:
        return tiny_processor()

    def scratch_model(self) -> PreTrainedModel:
        return tiny_model(self.tokenizer)

    def load(self) -> PreTrainedModel:
        """Raises ModelError if the model computes anything else through this adapter than by itself."""
        model = super().load()
        if not isinstance(model.get_output_embeddings(), nn.Module):
            raise ModelError(f"model {self.origin}: a {model.config.model_type!r}, which has no language head")
        self._parts = beginnings(model)
        # Whatever frames an image is special in some way; what ends a turn is, too, and has to be sampled.
        special = {int(token) for token in self.tokenizer.all_special_ids} - set(self.end_of_turn)
        self.forbidden_tokens = tuple(sorted(special | set(self.forbidden_tokens)))
        assert model.generation_config is not None
        model.generation_config.suppress_tokens = list(self.forbidden_tokens)
        probe(self, model)
        return model

    def preprocess(self, image: Image) -> Features:
        """What the processor makes of the image alone, and ids: [T], what it writes in the text for it."""
        try:
            found = self.processed(self.placeholder, [image], add_special_tokens=False)
        except ValueError as error:
            raise DataError(f"{image.source}: {error}") from None
        features = {name: values for name, values in found.items() if name not in TEXT_INPUTS}
        if "pixel_attention_mask" in features and not features["pixel_values"].flatten(-3).any(dim=-1).all():
            # Families with such a mask pad with views of zeros, and know them by that.
            raise DataError(f"{image.source}: its pixels become exactly 0, which the model would take for padding")
        return {**features, "ids": found["input_ids"][0]}

    def image_text(self, features: Features) -> str:
        ids = features["ids"].tolist()
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if self._tokens(text) != ids:
            raise ModelError(
                f"model {self.origin}: its processor writes {len(ids)} tokens for an image, which as text "
                f"({text[:60]!r}…) are others; the family needs an adapter of its own, see docs/plugins.md"
            )
        return text

    def feature_count(self, features: Features) -> int:
        return int((features["ids"] == self.image_token).sum())

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """One image after another, all but the first dimension padded with zeros, as processors pad a batch."""
        found = {}
        for name in features[0]:
            if name == "ids":
                continue
            values = [item[name] for item in features]
            largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
            found[name] = torch.cat([_padded(value, largest) for value in values])
        return found

    def encodes_images(self, model: PreTrainedModel) -> bool:
        """Nobody knows what else a family does with its images."""
        return False

    def part_of(self, parameter: str) -> Part:
        return part_of(parameter, self._parts)

    def own_tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(self.own_prompt(messages)["input_ids"][0].tolist())

    def own_inputs(self, tokens: Sequence[int], images: Sequence[Image]) -> dict[str, Tensor]:
        inputs = super().own_inputs(tokens, ())
        if images:
            found = self.processed(self.placeholder * len(images), images, add_special_tokens=False)
            inputs |= {name: values for name, values in found.items() if name not in TEXT_INPUTS}
        return inputs

    def own_prompt(
        self, messages: Sequence[Message], *, ended: bool = False, later: Sequence[Message] = ()
    ) -> dict[str, Tensor]:
        """All that the family's own processor makes of a conversation.

        ended: the assistant answers nothing and ends its turn.
        later: what follows that. Raises ModelError if the chat template does not let a conversation go on.
        """
        conversation, after = (
            [{"role": message.role, "content": self._content(message)} for message in part]
            for part in (messages, later)
        )
        text = self._template(conversation)
        if ended:
            text += str(self.tokenizer.decode([self.end_of_turn[0]]))
        if after:
            text += self._continuation(after)
        begin = self.tokenizer.bos_token
        # As `apply_chat_template(tokenize=True)` does.
        again = begin is None or not text.startswith(begin)
        return self.processed(text, Observation((*messages, *later)).images, add_special_tokens=again)

    def processed(self, text: str, images: Sequence[Image], *, add_special_tokens: bool) -> dict[str, Tensor]:
        """What the processor makes of one text and its images."""
        pictures = [image.to_pil() for image in images]
        options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": add_special_tokens}
        try:
            found = self.processor(text=[text], images=pictures or None, **options)
        except ValueError:
            # Some take the images of each text together, and a list of images for those of as many texts.
            if len(pictures) < 2:
                raise
            found = self.processor(text=[text], images=[pictures], **options)
        return {name: values for name, values in found.items() if isinstance(values, Tensor)}

    def _load_processor(self) -> Any:
        path = Path(str(self.config.path))
        if path.is_dir() and not (path / "config.json").is_file():
            raise ModelError(f"model {path}: the directory holds no config.json, so it is no transformers model")
        config = self._from_pretrained(AutoConfig.from_pretrained)
        named = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        found = next((token for token in named if token is not None), None)
        if found is None:
            raise ModelError(
                f"model {path}: a {config.model_type!r}, whose config.json names no image_token_id, so it is not known "
                "which tokens stand for an image"
            )
        self._image_id = int(found)
        processor = self._from_pretrained(AutoProcessor.from_pretrained)
        for name in ("tokenizer", "image_token", "chat_template"):
            if getattr(processor, name, None) is None:
                raise ModelError(f"model {path}: its processor, a {type(processor).__name__}, has no {name}")
        return processor


def _padded(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """With zeros behind all dimensions but the first."""
    missing = [size - have for have, size in zip(values.shape[1:], sizes, strict=True)]
    return nn.functional.pad(values, [amount for size in reversed(missing) for amount in (0, size)])
