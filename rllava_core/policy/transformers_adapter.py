"""What the families that transformers has in common share: loading, chat templates, placeholders, hidden states.

A family is a subclass that says what is its own: which model types it loads, what an image becomes in the text, which
positions it has. See `rllava_core.policy.adapter.ModelAdapter` for what each method promises.

Only transformers' public interfaces are used: `from_pretrained`, `apply_chat_template`, the image processor, explicit
`position_ids`, an attention mask and a cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Cache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from rllava_core.errors import DataError, ModelError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message, Observation, TextPart
from rllava_core.policy.adapter import Features, Part
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.memory import cache_argument

RENDERED = 4096
"""Rendered messages that are remembered."""

_ANSWER = "An answer."
"""Stands for what the assistant said, where only what follows it is wanted."""


_GIVEN = "mm_encoder_outputs"
"""The argument by which a model of transformers takes what it would make of images (5.24; 5.17 has none)."""

_ENCODED = "encoded"
"""In `media`: [T, H], what takes the places of image tokens; with a number, what is added to them behind a layer."""


@dataclass
class _Encoded(ModelOutput):
    """As `get_image_features` of all families would return it, of all images of a batch."""

    pooler_output: tuple[Tensor, ...]
    deepstack_features: tuple[tuple[Tensor, ...], ...] | None = None


class TransformersAdapter:
    """A `ModelAdapter` around a processor and a model of transformers.

    model_types: what `config.json` may say that a checkpoint is.
    placeholders: names of special tokens that stand for media or frame them, and are never sampled; the tokenizer need
        not have all of them.
    parts: beginnings of the names of parameters that belong to the vision part or to the connector; the longest that
        fits decides. All others belong to the language model.
    takes_trees: whether the model takes attention masks of four dimensions, as most do. A family that makes its own of
        what it is given, or refuses it, says False.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    placeholders: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[Mapping[str, Part]] = {}
    takes_trees: bool = True

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._rendered: dict[object, tuple[int, ...]] = {}
        self.processor = self.scratch_processor() if config.from_scratch is not None else self._load_processor()
        self.tokenizer = self.processor.tokenizer
        self.placeholder = str(self.processor.image_token)
        self.image_token = self._token(self.placeholder)
        if self.tokenizer.pad_token_id is None or self.tokenizer.eos_token_id is None:
            raise ModelError(f"model {self.origin}: its tokenizer names no pad_token or no eos_token; set both in it")
        self.pad_token = int(self.tokenizer.pad_token_id)
        # Others that were added, such as <think>, are words like any other.
        added = self.tokenizer.added_tokens_decoder.values()
        self._special = {str(token) for token in added if token.special} | {self.placeholder, *self.placeholders}
        # Known once the model is loaded, which holds the generation config and the size of the vocabulary. A family
        # whose turns end otherwise sets the first end of turn itself.
        self.end_of_turn: tuple[int, ...] = (int(self.tokenizer.eos_token_id),)
        self.forbidden_tokens: tuple[int, ...] = ()
        self.context_length = 0

    # What a family says of itself.

    def scratch_processor(self) -> Any:
        """The processor of the preset `config.from_scratch`."""
        raise ModelError(f"model: there is no preset {self.config.from_scratch!r}; set `path`")

    def scratch_model(self) -> PreTrainedModel:
        """The model of the preset, with random weights from torch's global random state."""
        raise ModelError(f"model: there is no preset {self.config.from_scratch!r}; set `path`")

    def image_text(self, features: Features) -> str:
        """What takes the place of the placeholder of an image in the text, as the family's own processor writes it."""
        raise NotImplementedError

    def preprocess(self, image: Image) -> Features:
        try:
            found = self.processor.image_processor(images=[image.to_pil()], return_tensors="pt")
        except ValueError as error:
            raise DataError(f"{image.source}: {error}") from None
        return {name: values for name, values in found.items() if isinstance(values, Tensor)}

    def feature_count(self, features: Features) -> int:
        return self.image_text(features).count(self.placeholder)

    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> torch.LongTensor:
        """[1, T]: text and images alike count up, token by token."""
        return cast(torch.LongTensor, torch.arange(start, start + len(tokens))[None])

    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        return {name: torch.cat([item[name] for item in features]) for name in features[0]}

    # What they share.

    @property
    def origin(self) -> str:
        """For messages."""
        return str(self.config.path or self.config.from_scratch)

    def load(self) -> PreTrainedModel:
        if self.config.from_scratch is not None:
            model = self.scratch_model()
            model.set_attn_implementation(self.config.attention)
            # Not the buffers: rotary frequencies stay in float32, as they do where weights are loaded.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(getattr(torch, self.config.dtype))
        else:
            model = self._load_weights()
        text = model.config.get_text_config()
        if len(self.tokenizer) > text.vocab_size:
            raise ModelError(
                f"model {self.origin}: the tokenizer has {len(self.tokenizer)} tokens, the model {text.vocab_size}"
            )
        _refuse_sliding(text, self.origin)
        self.context_length = int(text.max_position_embeddings)
        assert model.generation_config is not None
        ends = model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends] if ends is not None else []
        own = self.end_of_turn[0]
        self.end_of_turn = (own, *sorted({int(self.tokenizer.eos_token_id), *listed} - {own}))
        unused = range(len(self.tokenizer), text.vocab_size)
        known = self.tokenizer.get_added_vocab()
        never = {known[name] for name in self.placeholders if name in known} | {self.image_token}
        self.forbidden_tokens = (*sorted(never), *unused)
        # The checkpoint's own `generate` then draws from the same distribution.
        model.generation_config.suppress_tokens = list(self.forbidden_tokens)
        return model

    def render(
        self, messages: Sequence[Message], features: Sequence[Features], *, continues: bool = False
    ) -> tuple[int, ...]:
        images = tuple(self.image_text(item) for item in features)
        # Pictures of one size make one text, and a template takes longer than the policy of a small model.
        key = (_wording(messages), images, continues, self.end_of_turn[0])
        if key not in self._rendered:
            if len(self._rendered) >= RENDERED:
                self._rendered.clear()
            self._rendered[key] = self._render(messages, images, continues)
        return self._rendered[key]

    def _render(self, messages: Sequence[Message], images: Sequence[str], continues: bool) -> tuple[int, ...]:
        conversation = [{"role": message.role, "content": self._content(message)} for message in messages]
        text = self._continuation(conversation) if continues else self._template(conversation)
        pieces = text.split(self.placeholder)
        if len(pieces) != len(images) + 1:
            raise ModelError(f"model {self.origin}: the chat template shows {len(pieces) - 1} of {len(images)} images")
        expanded = pieces[0] + "".join(image + piece for image, piece in zip(images, pieces[1:], strict=True))
        if not continues:
            return (*self._opening(expanded), *self._tokens(expanded))
        # With the end of the turn before it, which is taken off again: SentencePiece writes the beginning of a text
        # differently from its middle.
        tokens = self._tokens(self.tokenizer.decode([self.end_of_turn[0]]) + expanded)
        if tokens[0] != self.end_of_turn[0]:
            raise ModelError(f"model {self.origin}: its tokenizer does not read its own end of turn as one token")
        return tuple(tokens[1:])

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

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
        output = model.model(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=positions if len(positions) > 1 else positions[0],
            use_cache=cache is not None,
            **{cache_argument(model.model): cache},
            **_given(media),
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def encodes_images(self, model: PreTrainedModel) -> bool:
        if type(self).hidden_states is not TransformersAdapter.hidden_states:
            return False  # a family with a way of its own to pass images on may not know of these
        inner = model.model
        return hasattr(inner, "get_image_features") and _GIVEN in inspect.signature(inner.forward).parameters

    def encode_images(self, model: PreTrainedModel, media: Mapping[str, Tensor]) -> Features:
        inner = model.model
        taken = inspect.signature(inner.get_image_features).parameters
        output = inner.get_image_features(
            **{name: values for name, values in media.items() if name in taken}, return_dict=True
        )
        levels = getattr(output, "deepstack_features", None) or ()
        found = {_ENCODED: _joined(output.pooler_output)}
        return found | {f"{_ENCODED}.{level}": _joined(values) for level, values in enumerate(levels)}

    def lm_head(self, model: PreTrainedModel) -> nn.Module:
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head

    def part_of(self, parameter: str) -> Part:
        fitting = [begin for begin in self.parts if parameter.startswith(begin)]
        return self.parts[max(fitting, key=len)] if fitting else "language"

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        model.save_pretrained(directory)
        self.processor.save_pretrained(directory)

    def own_tokens(self, messages: Sequence[Message]) -> tuple[int, ...]:
        text = self._template([{"role": message.role, "content": self._content(message)} for message in messages])
        images = [image.to_pil() for image in Observation(tuple(messages)).images]
        begin = self.tokenizer.bos_token
        # As `apply_chat_template(tokenize=True)` does.
        again = begin is None or not text.startswith(begin)
        found = self.processor(text=[text], images=images or None, add_special_tokens=again)
        return tuple(found["input_ids"][0])

    def own_inputs(self, tokens: Sequence[int], images: Sequence[Image]) -> dict[str, Tensor]:
        ids = torch.tensor([tokens])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(self.processor, "return_mm_token_type_ids", False):
            inputs["mm_token_type_ids"] = (ids == self.image_token).int()
        if images:
            found = self.processor.image_processor(images=[image.to_pil() for image in images], return_tensors="pt")
            inputs |= {name: values for name, values in found.items() if isinstance(values, Tensor)}
        return inputs

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def _opening(self, text: str) -> list[int]:
        """What the tokenizer puts before every text (a beginning of sequence), unless the template wrote it itself."""
        begin = self.tokenizer.bos_token
        if begin is not None and text.startswith(begin):
            return []
        plain, opened = self._tokens("a"), self.tokenizer("a")["input_ids"]
        return list(opened[: len(opened) - len(plain)]) if opened[-len(plain) :] == plain else []

    def _template(self, conversation: list[dict[str, Any]]) -> str:
        text = self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def _continuation(self, conversation: list[dict[str, Any]]) -> str:
        """What the template writes after an assistant's turn, found by writing one with an answer of our own."""
        before = [{"role": role, "content": [{"type": "text", "text": _ANSWER}]} for role in ("user", "assistant")]
        # What was asked, what was answered, and the rest, in which the same words may stand again.
        pieces = self._template([*before, *conversation]).split(_ANSWER, 2)
        end, rest = self.tokenizer.decode([self.end_of_turn[0]]), pieces[-1]
        if len(pieces) != 3 or not rest.startswith(end):
            raise ModelError(
                f"model {self.origin}: its chat template does not end an assistant's turn with {end!r}, so that "
                "conversations of several turns cannot be continued; set task.history to 1"
            )
        return rest.removeprefix(end)

    def _content(self, message: Message) -> list[dict[str, str]]:
        content = []
        for part in message.parts:
            if isinstance(part, ImagePart):
                content.append({"type": "image"})
                continue
            assert isinstance(part, TextPart)
            special = next((token for token in self._special if token in part.text), None)
            if special is not None:
                raise DataError(f"text {part.text[:80]!r} contains the model's special token {special!r}; remove it")
            content.append({"type": "text", "text": part.text})
        return content

    def _token(self, name: str) -> int:
        identifier = self.tokenizer.get_added_vocab().get(name)
        if identifier is None:
            raise ModelError(
                f"model {self.origin}: its tokenizer has no token {name!r}; is it one of {', '.join(self.model_types)}?"
            )
        return int(identifier)

    def _load_processor(self) -> Any:
        path = Path(str(self.config.path))
        if path.is_dir() and not (path / "config.json").is_file():
            raise ModelError(f"model {path}: the directory holds no config.json, so it is no transformers model")
        config = self._from_pretrained(AutoConfig.from_pretrained)
        if config.model_type not in self.model_types:
            loads = ", ".join(map(repr, self.model_types))
            raise ModelError(f"model {path}: a {config.model_type!r}; this adapter loads {loads}")
        return self._from_pretrained(AutoProcessor.from_pretrained)

    def _load_weights(self) -> PreTrainedModel:
        model, report = self._from_pretrained(
            AutoModelForImageTextToText.from_pretrained,
            dtype=getattr(torch, self.config.dtype),
            attn_implementation=self.config.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        # transformers fills what does not fit with random numbers and goes on.
        unfit = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
        if unfit:
            shown = ", ".join(unfit[:3]) + (f" and {len(unfit) - 3} more" if len(unfit) > 3 else "")
            raise ModelError(f"model {self.origin}: weights that config.json asks for are missing or differ: {shown}")
        loaded: PreTrainedModel = model
        return loaded

    def _from_pretrained(self, loader: Any, **options: Any) -> Any:
        try:
            return loader(self.config.path, trust_remote_code=self.config.trust_remote_code, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"model {self.config.path}: cannot be loaded: {error}") from None


def _given(media: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model's keyword arguments of images, whether they are pixels or encoded."""
    if _ENCODED not in media:
        return dict(media)
    levels = tuple((media[f"{_ENCODED}.{level}"],) for level in range(len(media) - 1))
    return {_GIVEN: {"image": _Encoded((media[_ENCODED],), levels or None)}}


def _joined(values: Tensor | Sequence[Tensor]) -> Tensor:
    """[T, H] of all images."""
    return values if isinstance(values, Tensor) and values.ndim == 2 else torch.cat(tuple(values))


def _wording(messages: Sequence[Message]) -> tuple[object, ...]:
    """What messages say, whatever their pictures show."""
    return tuple(
        (message.role, tuple(part.text if isinstance(part, TextPart) else None for part in message.parts))
        for message in messages
    )


def _refuse_sliding(text: Any, origin: str) -> None:
    """transformers counts a window in places of the cache, padding included, and so would leave out what is near."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ("sliding",)
    if window is not None and any("sliding" in kind for kind in kinds):
        raise ModelError(
            f"model {origin}: its language model attends to a sliding window of {window} tokens, which batches of "
            "conversations cannot keep to yet; if no sequence of yours is longer, set sliding_window to null, and "
            "layer_types to full_attention, in its config.json: the model computes the same"
        )
