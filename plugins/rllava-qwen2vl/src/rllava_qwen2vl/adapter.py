"""Qwen2-VL as a policy: loading, rendering, images, M-RoPE positions, hidden states.

Only transformers' public interfaces are used: `apply_chat_template`, the image processor, explicit `position_ids`,
a two-dimensional attention mask and `past_key_values`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, Cache, PreTrainedModel, Qwen2VLForConditionalGeneration

from rllava_core.errors import DataError, ModelError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message, TextPart
from rllava_core.policy.adapter import Features
from rllava_qwen2vl.config import Qwen2VLOptions
from rllava_qwen2vl.tiny import tiny_model, tiny_processor

PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")

_ANSWER = "An answer."
"""Stands for what the assistant said, where only what follows it is wanted."""


class Qwen2VL:
    """The Qwen2-VL family (arXiv:2409.12191)."""

    def __init__(self, config: Qwen2VLOptions) -> None:
        self.config = config
        self.processor = self._load_processor()
        self.tokenizer = self.processor.tokenizer
        if config.min_pixels is not None or config.max_pixels is not None:
            size = self.processor.image_processor.size
            self.processor.image_processor.size = {
                "shortest_edge": config.min_pixels or size["shortest_edge"],
                "longest_edge": config.max_pixels or size["longest_edge"],
            }
        self.merge = int(self.processor.image_processor.merge_size)
        self.image_token = self._token("<|image_pad|>")
        self.pad_token = int(self.tokenizer.pad_token_id)
        # Known once the model is loaded, which holds the generation config and the size of the vocabulary.
        self.end_of_turn: tuple[int, ...] = (int(self.tokenizer.eos_token_id),)
        self.forbidden_tokens: tuple[int, ...] = ()
        self.context_length = 0

    def load(self) -> PreTrainedModel:
        if self.config.from_scratch is not None:
            model = tiny_model(self.tokenizer)
            model.set_attn_implementation(self.config.attention)
            model.to(getattr(torch, self.config.dtype))
        else:
            model = self._load_weights()
        text = model.config.get_text_config()
        if len(self.tokenizer) > text.vocab_size:
            raise ModelError(
                f"model {self._origin}: the tokenizer has {len(self.tokenizer)} tokens, the model {text.vocab_size}"
            )
        self.context_length = int(text.max_position_embeddings)
        ends = model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends] if ends is not None else []
        own = int(self.tokenizer.eos_token_id)
        self.end_of_turn = (own, *sorted(set(listed) - {own}))
        unused = range(len(self.tokenizer), text.vocab_size)
        known = self.tokenizer.get_added_vocab()
        self.forbidden_tokens = (*sorted(known[name] for name in PLACEHOLDERS if name in known), *unused)
        # The checkpoint's own `generate` then draws from the same distribution.
        model.generation_config.suppress_tokens = list(self.forbidden_tokens)
        return model

    def preprocess(self, image: Image) -> Features:
        try:
            features = self.processor.image_processor(images=[image.to_pil()], return_tensors="pt")
        except ValueError as error:
            raise DataError(f"{image.source}: {error}") from None
        return {"pixel_values": features["pixel_values"], "image_grid_thw": features["image_grid_thw"]}

    def feature_count(self, features: Features) -> int:
        return int(features["image_grid_thw"].prod()) // self.merge**2

    def render(
        self, messages: Sequence[Message], features: Sequence[Features], *, continues: bool = False
    ) -> tuple[int, ...]:
        conversation = [{"role": message.role, "content": self._content(message)} for message in messages]
        text = self._continuation(conversation) if continues else self._template(conversation)
        pieces = text.split("<|image_pad|>")
        counts = [self.feature_count(item) for item in features]
        if len(pieces) != len(counts) + 1:
            raise ModelError(f"model {self._origin}: the chat template shows {len(pieces) - 1} of {len(counts)} images")
        expanded = pieces[0] + "".join(
            "<|image_pad|>" * count + piece for count, piece in zip(counts, pieces[1:], strict=True)
        )
        return tuple(self.tokenizer(expanded, add_special_tokens=False)["input_ids"])

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> torch.LongTensor:
        """[3, T] M-RoPE: time, height and width (arXiv:2409.12191, section 2.1).

        Text counts up on all axes alike; an image is laid out on its merged grid; what follows it goes on from the
        largest position so far plus one.
        """
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
        output = model.model(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **media,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def lm_head(self, model: PreTrainedModel) -> nn.Module:
        head: nn.Module = model.lm_head
        return head

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        model.save_pretrained(directory)
        self.processor.save_pretrained(directory)

    def _template(self, conversation: list[dict[str, Any]]) -> str:
        text = self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def _continuation(self, conversation: list[dict[str, Any]]) -> str:
        """What the template writes after an assistant's turn, found by writing one with an answer of our own."""
        before = [{"role": role, "content": [{"type": "text", "text": _ANSWER}]} for role in ("user", "assistant")]
        head, found, rest = self._template([*before, *conversation]).rpartition(_ANSWER)
        end = self.tokenizer.decode([self.end_of_turn[0]])
        # Everything up to the end of the assistant's turn must be the same whatever follows.
        if not found or head.count(_ANSWER) != 1 or not rest.startswith(end):
            raise ModelError(
                f"model {self._origin}: its chat template does not end an assistant's turn with {end!r}, so that "
                "conversations of several turns cannot be continued; set task.history to 1"
            )
        return rest.removeprefix(end)

    @property
    def _origin(self) -> str:
        return str(self.config.path or self.config.from_scratch)

    def _content(self, message: Message) -> list[dict[str, str]]:
        content = []
        for part in message.parts:
            if isinstance(part, ImagePart):
                content.append({"type": "image"})
                continue
            assert isinstance(part, TextPart)
            special = next((token for token in self.tokenizer.get_added_vocab() if token in part.text), None)
            if special is not None:
                raise DataError(f"text {part.text[:80]!r} contains the model's special token {special!r}; remove it")
            content.append({"type": "text", "text": part.text})
        return content

    def _token(self, name: str) -> int:
        identifier = self.tokenizer.get_added_vocab().get(name)
        if identifier is None:
            raise ModelError(f"model {self._origin}: its tokenizer has no token {name!r}; is it a Qwen2-VL?")
        return int(identifier)

    def _load_processor(self) -> Any:
        if self.config.from_scratch is not None:
            return tiny_processor()
        path = Path(str(self.config.path))
        if path.is_dir() and not (path / "config.json").is_file():
            raise ModelError(f"model {path}: the directory holds no config.json, so it is no transformers model")
        config = self._from_pretrained(AutoConfig.from_pretrained)
        if config.model_type != "qwen2_vl":
            raise ModelError(f"model {path}: a {config.model_type!r}; this adapter loads 'qwen2_vl'")
        return self._from_pretrained(AutoProcessor.from_pretrained)

    def _load_weights(self) -> Any:
        model, report = self._from_pretrained(
            Qwen2VLForConditionalGeneration.from_pretrained,
            dtype=getattr(torch, self.config.dtype),
            attn_implementation=self.config.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        # transformers fills what does not fit with random numbers and goes on.
        unfit = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
        if unfit:
            shown = ", ".join(unfit[:3]) + (f" and {len(unfit) - 3} more" if len(unfit) > 3 else "")
            raise ModelError(f"model {self._origin}: weights that config.json asks for are missing or differ: {shown}")
        return model

    def _from_pretrained(self, loader: Any, **options: Any) -> Any:
        try:
            return loader(self.config.path, trust_remote_code=self.config.trust_remote_code, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"model {self.config.path}: cannot be loaded: {error}") from None
