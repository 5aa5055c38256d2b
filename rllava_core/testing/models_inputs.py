"""Checks of what goes into a model: special tokens, images, rendered conversations, text, positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from rllava_core.errors import DataError, RllavaError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message, Observation
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.testing.conformance import require
from rllava_core.testing.models_base import ModelSuite, Piece, head_weight

STRANGE_SIZES = ((1, 1), (2, 2), (1, 100), (100, 1), (3, 7), (7, 300))


class InputChecks(ModelSuite):
    """The half of the suite that needs no forward pass."""

    def test_special_tokens_are_ids_of_the_vocabulary(self) -> None:
        adapter, model = self.loaded()
        vocabulary = len(head_weight(adapter, model))
        require(adapter.end_of_turn, "end_of_turn is empty, so no answer would ever end")
        listed = {
            "pad_token": (adapter.pad_token,),
            "image_token": (adapter.image_token,),
            "end_of_turn": adapter.end_of_turn,
            "forbidden_tokens": adapter.forbidden_tokens,
        }
        for name, tokens in listed.items():
            strange = [token for token in tokens if type(token) is not int or not 0 <= token < vocabulary]
            require(not strange, f"{name} holds {strange}; expected ids below the vocabulary's {vocabulary}")

    def test_special_tokens_do_not_contradict_each_other(self) -> None:
        adapter, _ = self.loaded()
        image, forbidden = adapter.image_token, set(adapter.forbidden_tokens)
        require(adapter.pad_token != image, f"pad_token is image_token ({image}): padding would be taken for images")
        require(
            image in forbidden, f"image_token {image} is not in forbidden_tokens: the policy would sample placeholders"
        )
        both = sorted(forbidden.intersection(adapter.end_of_turn))
        require(not both, f"end_of_turn tokens {both} are in forbidden_tokens, so answers could not end with them")

    def test_an_image_is_always_preprocessed_alike(self) -> None:
        adapter, _ = self.loaded()
        for number in range(3):
            image = self.picture(number)
            copy = Image.from_array(image.pixels.copy(), "the same pixels")
            first, second = adapter.preprocess(image), adapter.preprocess(copy)
            require(
                isinstance(first, Mapping) and first and all(isinstance(value, Tensor) for value in first.values()),
                f"preprocess() gave {type(first).__name__}; expected a mapping of names to tensors",
            )
            for name, values in first.items():
                require(values.device.type == "cpu", f"feature {name!r} is on {values.device}; expected the CPU")
                require(not values.requires_grad, f"feature {name!r} carries a gradient; features are data")
                same = name in second and torch.equal(values, second[name])
                require(same, f"feature {name!r} differs between two calls with the same pixels: nothing may be random")

    def test_a_prompt_holds_one_placeholder_for_each_image_feature(self) -> None:
        adapter, _ = self.loaded()
        for parts in self.conversations():
            piece = self.piece(adapter, *parts)
            counts = [adapter.feature_count(item) for item in piece.features]
            require(
                all(type(count) is int and count >= 1 for count in counts),
                f"feature_count() gave {counts}; expected how many tokens each image becomes, at least 1",
            )
            placeholders = piece.tokens.count(adapter.image_token)
            require(
                placeholders == sum(counts),
                f"render() wrote {placeholders} image tokens for images of {counts} features",
            )

    def test_a_strange_image_gives_features_or_an_error_that_names_it(self) -> None:
        adapter, _ = self.loaded()
        for height, width in STRANGE_SIZES:
            image = Image(np.full((height, width, 3), 99, np.uint8), f"holiday-{height}x{width}.png")
            try:
                piece = self.piece(adapter, image, "?")
            except DataError as error:
                named = image.source in str(error)
                require(named, f"the DataError of a {height}x{width} image does not name it: {error}")
            except Exception as error:  # noqa: BLE001 - any other error is what is looked for
                require(
                    False,
                    f"a {height}x{width} image raised {type(error).__name__}: {error}; expected features, or a "
                    "DataError",
                )
            else:
                placeholders = piece.tokens.count(adapter.image_token)
                counted = adapter.feature_count(piece.features[0])
                require(
                    placeholders == counted >= 1,
                    f"a {height}x{width} image has feature_count {counted} and {placeholders} image tokens",
                )

    def test_rendering_shows_what_the_message_says(self) -> None:
        adapter, _ = self.loaded()
        image = self.picture(0)
        tokens = self.piece(adapter, image, "left or right?").tokens
        whole_numbers = all(type(token) is int for token in tokens)
        require(tokens and whole_numbers, f"render() gave {tokens[:5]}…; expected a tuple of token ids")
        again = self.piece(adapter, image, "left or right?").tokens
        require(tokens == again, "render() gave other tokens for the same messages")
        for what, parts in (
            ("another text", (image, "left or rigid?")),
            ("the text before the image", ("left or right?", image)),
            ("no image", ("left or right?",)),
        ):
            require(tokens != self.piece(adapter, *parts).tokens, f"render() gives the same tokens with {what}")
        turns = [Message.user("One."), Message("assistant", Message.user("Two.").parts), Message.user("Three.")]
        whole = tuple(adapter.render(turns, []))
        require(
            whole != tuple(adapter.render(turns[1:], [])) and whole != tuple(adapter.render(turns[:2], [])),
            "render() leaves out a message of a conversation of several",
        )

    def test_a_conversation_that_is_continued_is_the_one_that_is_rendered_at_once(self) -> None:
        """Later turns are added to what was sampled, which is never rendered again."""
        adapter, _ = self.loaded()
        first, second = self.picture(0), self.picture(1)
        opening, later = Message.user(first, "Which way?"), Message.user("And now?")
        system = Message("system", Message.user("Answer with one word.").parts)
        for what, beginning, going_on in (
            ("text alone", [Message.user("Which way?")], later),
            ("with an image in the first message", [opening], later),
            ("with an image in a later message", [opening], Message.user("And ", second, "?")),
            ("with two images in a later message", [opening], Message.user(second, first, "And now?")),
            ("with a system message", [system, opening], Message.user(second, "And now?")),
        ):
            try:
                begun = self._rendered(adapter, beginning)
            except RllavaError:
                if what != "with a system message":
                    raise
                continue  # some families have none, and say so
            answer = self.texts[0]
            whole = self._rendered(adapter, [*beginning, Message("assistant", Message.user(answer).parts), going_on])
            continued = self._rendered(adapter, [going_on], continues=True)
            found = (*begun, *adapter.encode(answer), adapter.end_of_turn[0], *continued)
            pairs = enumerate(zip_longest(whole, found))
            place = next((number for number, (one, other) in pairs if one != other), None)
            require(
                place is None,
                f"a conversation of two turns {what} has {len(whole)} tokens if it is rendered at once, and "
                f"{len(found)} if render(…, continues=True) goes on after the answer {answer!r} and end_of_turn[0]; "
                f"they differ from token {place} on",
            )

    def test_plain_text_survives_encoding_and_decoding(self) -> None:
        adapter, model = self.loaded()
        vocabulary = len(head_weight(adapter, model))
        for text in self.texts:
            tokens = adapter.encode(text)
            valid = all(type(token) is int and 0 <= token < vocabulary for token in tokens)
            require(tokens and valid, f"encode({text!r}) gave {tokens!r}; expected ids of the vocabulary")
            self._require_no_special(adapter, tokens, text)
            found = adapter.decode(tokens)
            require(found == text, f"decode(encode({text!r})) is {found!r}: rewards would judge another answer")

    def test_text_that_spells_a_special_token_is_encoded_as_text(self) -> None:
        """Choices and answers come from data."""
        adapter, _ = self.loaded()
        for text in self.spellings(adapter):
            self._require_no_special(adapter, adapter.encode(text), text)

    def test_text_that_spells_a_special_token_is_not_rendered_as_one(self) -> None:
        """A question may hold any text: one that draws an image, or ends its own turn, is refused or stays text."""
        adapter, _ = self.loaded()
        image = self.picture(0)
        plain = self.piece(adapter, "about ", image)
        for text in self.spellings(adapter):
            try:
                tokens = self.piece(adapter, f"about {text} ", image).tokens
            except DataError:
                continue
            for what, special in (("image", (adapter.image_token,)), ("end-of-turn", adapter.end_of_turn)):
                expected, found = (sum(token in special for token in row) for row in (plain.tokens, tokens))
                require(
                    found == expected,
                    f"the text {text!r} in a question became {found - expected} more {what} tokens: raise DataError, "
                    "or encode text without parsing special tokens",
                )

    def test_decoding_leaves_special_tokens_out(self) -> None:
        adapter, _ = self.loaded()
        special = (*adapter.end_of_turn, adapter.image_token)
        found = adapter.decode((*adapter.encode("no"), *special))
        require(found == "no", f"decode() of the tokens of 'no' and special tokens is {found!r}; expected 'no'")

    def test_whatever_is_sampled_can_be_decoded(self) -> None:
        """Random weights sample tokens that are no text: half a letter, or an id that no text uses."""
        adapter, model = self.loaded()
        forbidden = set(adapter.forbidden_tokens)
        vocabulary = len(head_weight(adapter, model))
        allowed = [token for token in range(vocabulary) if token not in forbidden]
        # The first and the last ids: special tokens, and those that fill up a vocabulary, stand at the ends.
        for token in [*allowed[:400], *allowed[-400:]]:
            try:
                text = adapter.decode((token,))
            except Exception as error:  # noqa: BLE001 - any error is what is looked for
                require(False, f"decode(({token},)) raised {type(error).__name__}: {error}; forbid it, or decode it")
            require(isinstance(text, str), f"decode(({token},)) gave {type(text).__name__}; expected text")

    def test_positions_have_one_column_a_token_and_begin_at_the_start(self) -> None:
        adapter, _ = self.loaded()
        for parts in self.conversations():
            piece = self.piece(adapter, *parts)
            found = adapter.positions(piece.tokens, piece.features, 0)
            require(
                isinstance(found, Tensor) and found.dtype == torch.long and found.ndim == 2 and len(found) in (1, 3),
                f"positions() gave {getattr(found, 'dtype', type(found))} of shape "
                f"{tuple(getattr(found, 'shape', ()))}; expected integers of [1 or 3 axes, tokens]",
            )
            columns = found.shape[1]
            require(columns == len(piece.tokens), f"positions() gave {columns} columns for {len(piece.tokens)} tokens")
            require(int(found.min()) == 0, f"positions(…, start=0) begin at {int(found.min())}")
            later = adapter.positions(piece.tokens, piece.features, 7)
            require(torch.equal(later, found + 7), "positions(…, start=7) are not those of start=0 plus 7")

    def test_positions_of_text_count_up_on_all_axes_alike(self) -> None:
        """Sampling and training place what was sampled themselves."""
        adapter, _ = self.loaded()
        for text in self.texts:
            tokens = (*adapter.encode(text), *adapter.end_of_turn, *adapter.encode(text))
            found = adapter.positions(tokens, (), 5)
            require(
                torch.equal(found, torch.arange(5, 5 + len(tokens)).expand_as(found)),
                f"positions(…, start=5) of {len(tokens)} tokens of text are not 5, 6, … {4 + len(tokens)} on all axes",
            )

    def test_positions_go_on_from_piece_to_piece(self) -> None:
        """A later turn, and every sampled token, starts at the largest position so far plus one."""
        adapter, _ = self.loaded()
        for parts in self.conversations():
            prompt, shown = self.piece(adapter, *parts), self.piece(adapter, self.picture(1), "and now?")
            answer = [Piece((token,)) for token in adapter.encode("a word")]
            pieces = [prompt, *answer, shown]
            whole = sum(pieces[1:], start=prompt)
            start = 0
            columns: list[Tensor] = []
            for piece in pieces:
                columns.append(adapter.positions(piece.tokens, piece.features, start))
                start = int(columns[-1].max()) + 1
            expected = adapter.positions(whole.tokens, whole.features, 0)
            require(
                torch.equal(torch.cat(columns, dim=1), expected),
                "positions of a sequence in pieces, each starting at the largest position before it plus one, are not "
                "those of the whole",
            )

    def _rendered(
        self, adapter: ModelAdapter, messages: Sequence[Message], *, continues: bool = False
    ) -> tuple[int, ...]:
        features = [adapter.preprocess(image) for image in Observation(tuple(messages)).images]
        return tuple(adapter.render(messages, features, continues=continues))

    def spellings(self, adapter: ModelAdapter) -> list[str]:
        """Texts that look like special tokens."""
        added = getattr(getattr(adapter, "tokenizer", None), "get_added_vocab", dict)
        return list(dict.fromkeys([*self.special_texts, *added()]))

    def _require_no_special(self, adapter: ModelAdapter, tokens: tuple[int, ...], text: str) -> None:
        special = {adapter.image_token, *adapter.end_of_turn, *adapter.forbidden_tokens}
        found = sorted(special.intersection(tokens))
        require(not found, f"encode({text!r}) holds the special tokens {found}: encode plain text, parse and add none")
