"""Whether a model computes through the adapter what it computes by itself, found out on two short conversations.

A policy reads a conversation in pieces through a cache, several side by side, with positions and masks of ours, its
images preprocessed one by one. The family's own way is one plain `forward` of the whole, with whatever the family's own
processor makes of text and images together. Families differ in what they make of an image: positions in two dimensions
(M-RoPE), attention in both directions within an image, or over the whole prompt (a prefix language model). Nothing in
a config says so for certain. The numbers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rllava_core.errors import DataError, ModelError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message, Observation
from rllava_core.policy.adapter import Features

if TYPE_CHECKING:
    from rllava_anyvlm.adapter import AnyVLM

Result = TypeVar("Result")

LIMIT = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}
"""Nats, of any token of the vocabulary at any place.

Another order of the same sums gives differences of 4e-6 in float32. In half precision right models differ by up to 0.14
(bfloat16) and 0.05 (float16) where their own forward does not differ from itself at all; see NOISE. Wrong positions,
masks or images give 1.1 to 12 nats in either.
"""

NOISE = 4.0
"""In half precision the limit is at least so many times what the model's own forward differs from itself when a
sequence is in a batch of two and padded, which is the same mathematically. That grows with depth and with the size of
logits, as the difference of a right model does, which was up to 1.5 times as much."""

SIZES = ((32, 32), (32, 64), (48, 32))
"""Height and width of the pictures: processors tile, crop and pad by the shape."""

CHUNK = 64
"""Rows of log-probs over the vocabulary that are held at once."""

STRANGE = (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError, AssertionError)
"""What a model raises that cannot read what it is given."""


@dataclass(frozen=True)
class Piece:
    """A run of tokens with the features of its images."""

    tokens: tuple[int, ...]
    features: tuple[Features, ...] = ()

    def __add__(self, other: Piece) -> Piece:
        return Piece(self.tokens + other.tokens, self.features + other.features)


@dataclass(frozen=True)
class Talk:
    """A conversation: in pieces as the adapter renders it, and as the family's own processor makes it."""

    pieces: tuple[Piece, ...]
    own: dict[str, Tensor]

    @property
    def whole(self) -> Piece:
        return sum(self.pieces[1:], start=self.pieces[0])


def probe(adapter: AnyVLM, model: PreTrainedModel) -> None:
    """Raises ModelError for a model that the adapter would compute wrongly, or that cannot be compared."""
    with _undisturbed(model), torch.no_grad():
        _Probe(adapter, model).run()


class _Probe:
    def __init__(self, adapter: AnyVLM, model: PreTrainedModel) -> None:
        self.adapter = adapter
        self.model = model
        self.name = f"model {adapter.origin}: a {model.config.model_type!r}, which"

    def run(self) -> None:
        pictured, text = self._talks()
        own = [self._plain(talk.own) for talk in (pictured, text)]
        limit = self._limit(pictured, own[0])
        rows = [pictured, text]
        whole = self._read([[talk.whole] for talk in rows])
        pieces = self._read([list(talk.pieces) for talk in rows])
        for states, way in ((whole, "in one piece"), (pieces, "in pieces through the cache")):
            for found, expected, what in zip(states, own, ("text and images", "text alone"), strict=True):
                self._require_close(found, expected, limit, f"{what}, read {way},")
        prompt, *later = pictured.pieces
        ways = [later[0], sum(later[1:], start=later[0])]
        start = len(prompt.tokens)
        after = [own[0][start : start + len(way.tokens)] for way in ways]
        message = "two continuations of a prompt in one row, which must not see each other,"
        self._require_close(self._tree(prompt, ways), torch.cat(after), limit, message)
        self._require_seen(pictured, own[0])

    def _talks(self) -> tuple[Talk, Talk]:
        """Two images and a later turn with one more, or what of that fits into the context; and text without.

        The images are side by side and text begins right behind them: Idefics2's processor rewrites both.
        """
        one, two, three = (_picture(number) for number in range(3))
        goes_on = self._goes_on()
        candidates = [
            (Message.user("Is ", one, two, "so?"), Message.user(three, "And this?") if goes_on else None),
            (Message.user("Is ", one, two, "so?"), Message.user("And now?") if goes_on else None),
            (Message.user("Is ", one, "so?"), Message.user("And now?") if goes_on else None),
        ]
        pictured = next(
            (
                talk
                for message, later in candidates
                if len((talk := self._talk(message, later)).whole.tokens) <= self.adapter.context_length
            ),
            None,
        )
        if pictured is None:
            raise ModelError(
                f"{self.name} cannot be checked: a conversation about one small image takes more than the "
                f"{self.adapter.context_length} tokens of its context"
            )
        return pictured, self._talk(Message.user("Two and two?"), Message.user("Why?") if goes_on else None)

    def _goes_on(self) -> bool:
        """Whether the chat template lets a conversation have several turns; if not, `render` refuses those."""
        try:
            self.adapter.render([Message.user("So?")], (), continues=True)
        except ModelError:
            return False
        return True

    def _talk(self, message: Message, later: Message | None) -> Talk:
        after = () if later is None else (later,)
        own = self._try(lambda: self.adapter.own_prompt([message], ended=True, later=after))
        opening = self._piece(message)
        pieces = [opening, Piece((self.adapter.end_of_turn[0],))]
        if later is not None:
            pieces.append(self._piece(later, continues=True))
        talk = Talk(tuple(pieces), own)
        self._require_same(talk.whole.tokens, tuple(own["input_ids"][0].tolist()))
        self._require_same(opening.tokens, self._try(lambda: self.adapter.own_tokens([message])))
        return talk

    def _require_same(self, found: Sequence[int], own: Sequence[int]) -> None:
        if tuple(found) == tuple(own):
            return
        pairs = enumerate(zip(found, own, strict=False))
        place = next((place for place, (one, other) in pairs if one != other), min(len(found), len(own)))
        shown, expected = (self.adapter.tokenizer.decode(list(each[place : place + 4])) for each in (found, own))
        self._refuse(
            f"the family's processor makes {len(own)} tokens of a conversation of which the images one by one make "
            f"{len(found)}; from the {place + 1}. on they are {expected!r} and {shown!r}"
        )

    def _piece(self, message: Message, *, continues: bool = False) -> Piece:
        images = Observation((message,)).images
        features = self._try(lambda: tuple(self.adapter.preprocess(image) for image in images))
        return Piece(self.adapter.render([message], features, continues=continues), features)

    def _limit(self, talk: Talk, own: Tensor) -> float:
        limit = LIMIT[self.adapter.config.dtype]
        if self.adapter.config.dtype == "float32":
            return limit
        shape = talk.own["input_ids"].shape
        # Whatever is of the shape of the tokens says something of each, and zero says nothing (a mask, a kind).
        more = {
            name: torch.nn.functional.pad(values, (0, 7), value=self.adapter.pad_token if name == "input_ids" else 0)
            if values.shape == shape
            else values
            for name, values in talk.own.items()
        }
        twice = self._plain({name: torch.cat([values, values]) for name, values in more.items()})
        return max(limit, NOISE * _gap(twice[: len(own)], own))

    def _plain(self, inputs: dict[str, Tensor]) -> Tensor:
        """[T, V]: logits of the first sequence, by the model's own forward."""
        logits: Tensor = self._try(lambda: self.model(**inputs, use_cache=False).logits[0])
        return logits

    def _read(self, rows: Sequence[Sequence[Piece]]) -> list[Tensor]:
        """[T, H] of each row, its pieces run one after another through one cache, all rows padded on the right."""
        cache = DynamicCache(config=self.model.config)
        found: list[list[Tensor]] = [[] for _ in rows]
        starts = [0] * len(rows)
        past = torch.zeros(len(rows), 0, dtype=torch.long)
        for column in zip(*rows, strict=True):
            width = max(len(piece.tokens) for piece in column)
            tokens = torch.full((len(rows), width), self.adapter.pad_token)
            mask = torch.zeros(len(rows), width, dtype=torch.long)
            positions = torch.zeros(1, len(rows), width, dtype=torch.long)
            for row, piece in enumerate(column):
                length = len(piece.tokens)
                tokens[row, :length] = torch.tensor(piece.tokens)
                mask[row, :length] = 1
                positions[:, row, :length] = self.adapter.positions(piece.tokens, piece.features, starts[row])
                starts[row] += length
            past = torch.cat([past, mask], dim=1)
            features = [item for piece in column for item in piece.features]
            states = self._states(tokens, past, positions, features, cache)
            for row, piece in enumerate(column):
                found[row].append(states[row, : len(piece.tokens)])
        return [torch.cat(states) for states in found]

    def _tree(self, prompt: Piece, ways: Sequence[Piece]) -> Tensor:
        """[T, H] of continuations of a prompt in one row, under a mask that is added to the scores."""
        cache = DynamicCache(config=self.model.config)
        read = len(prompt.tokens)
        before = self.adapter.positions(prompt.tokens, prompt.features, 0)[:, None]
        self._states(torch.tensor([prompt.tokens]), torch.ones(1, read).long(), before, prompt.features, cache)
        row = sum(ways[1:], start=ways[0])
        blocks = [torch.ones(len(way.tokens), len(way.tokens)).tril() for way in ways]
        sees = torch.cat([torch.ones(len(row.tokens), read), torch.block_diag(*blocks)], dim=1).bool()
        lowest = torch.finfo(self.model.dtype).min
        mask = torch.zeros(sees.shape, dtype=self.model.dtype).masked_fill(~sees, lowest)[None, None]
        after: list[Tensor] = [self.adapter.positions(way.tokens, way.features, read) for way in ways]
        tokens = torch.tensor([row.tokens])
        return self._states(tokens, mask, torch.cat(after, dim=1)[:, None], row.features, cache)[0]

    def _states(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, features: Sequence[Features], cache: DynamicCache
    ) -> Tensor:
        return self._try(
            lambda: self.adapter.hidden_states(
                self.model,
                tokens=tokens,
                attention_mask=mask,
                positions=positions,
                media=self.adapter.collate(features) if features else {},
                cache=cache,
            )
        )

    def _require_close(self, states: Tensor, own: Tensor, limit: float, what: str) -> None:
        gap = _gap(self._try(lambda: self.adapter.lm_head(self.model)(states)), own)
        # Also for what is not a number.
        if not gap <= limit:
            self._refuse(
                f"log-probs of {what} differ from those of the model's own forward by up to {gap:.2g} nats, and "
                f"{limit:.2g} are allowed in {self.adapter.config.dtype}. Its positions do not count up, its "
                "attention is not causal or not its only memory, or it does more with an image than is known here"
            )

    def _require_seen(self, talk: Talk, own: Tensor) -> None:
        """Other pixels in the same sizes give other numbers. Otherwise nothing that was found equal says anything."""
        changed = {name: values.flip(-1) if values.is_floating_point() else values for name, values in talk.own.items()}
        if _gap(self._plain(changed), own) == 0:
            raise ModelError(
                f"{self.name} cannot be checked: other pixels give the very same log-probs, so it does not see images. "
                "Is its connector untrained, and zero?"
            )

    def _try(self, compute: Callable[[], Result]) -> Result:
        """Nothing of a model of unknown make may fail as if it were a mistake of ours."""
        try:
            return compute()
        except DataError as error:
            self._refuse(f"it cannot read a small picture: {error}")
        except STRANGE as error:
            self._refuse(f"it fails with {type(error).__name__}: {str(error)[:300]}")

    def _refuse(self, reason: str) -> NoReturn:
        raise ModelError(
            f"{self.name} cannot be computed by the generic adapter: {reason}. "
            "The family needs an adapter of its own, see docs/plugins.md"
        )


def _gap(found: Tensor, expected: Tensor) -> float:
    """[T, V] logits each: the largest difference of two log-probs of the same token."""
    if found.shape != expected.shape:
        return float("inf")
    worst = 0.0
    for start in range(0, len(found), CHUNK):
        one, other = (torch.log_softmax(each[start : start + CHUNK].float(), dim=-1) for each in (found, expected))
        gap = float((one - other).abs().max())
        worst = max(worst, gap) if gap == gap else float("nan")
        if worst != worst:
            break
    return worst


def _picture(number: int) -> Image:
    height, width = SIZES[number]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.from_array(pixels, f"picture {number} of {height}×{width}")


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation; the random state and what each module was in are restored."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
