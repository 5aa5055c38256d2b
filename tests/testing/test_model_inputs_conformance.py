"""For every check of what goes into a model there is a bad adapter that it catches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rllava_core.errors import DataError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart, Message
from rllava_core.policy.adapter import Features
from rllava_core.policy.config import ModelConfig
from rllava_core.testing import Conformance, ConformanceError, ModelAdapterConformance
from rllava_core.testing.conformance import checks_of
from rllava_core.testing.models_inputs import InputChecks
from rllava_core.testing.tiny import END, IMAGE, PAD, START, TinyAdapter


class Healthy(TinyAdapter):
    """The tiny adapter, typed as loosely as mutants need."""

    pad_token: Any = PAD
    end_of_turn: Any = (END,)
    forbidden_tokens: Any = (START, PAD, IMAGE)
    context_length: Any = 256

    def hidden_states(self, model: Any, **inputs: Any) -> Any:
        return super().hidden_states(model, **inputs)


class PadBeyondTheVocabulary(Healthy):
    pad_token = 260


class NoEndOfTurn(Healthy):
    end_of_turn = ()


class PadIsTheImageToken(Healthy):
    pad_token = IMAGE


class PlaceholdersMayBeSampled(Healthy):
    forbidden_tokens = (START, PAD)


class EndIsForbidden(Healthy):
    forbidden_tokens = (START, PAD, IMAGE, END)


class RandomCrop(Healthy):
    def preprocess(self, image: Image) -> Features:
        return {"patches": super().preprocess(image)["patches"] + 0.01 * torch.rand(1)}


class FeaturesWithGradients(Healthy):
    def preprocess(self, image: Image) -> Features:
        return {"patches": super().preprocess(image)["patches"].requires_grad_()}


class FeaturesAsATensor(Healthy):
    def preprocess(self, image: Image) -> Any:
        return super().preprocess(image)["patches"]

    def feature_count(self, features: Any) -> int:
        return len(features)


class Rendering(Healthy):
    """Renders in a way of its own."""

    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        return super().render(messages, features, continues=continues)

    def render(
        self, messages: Sequence[Message], features: Sequence[Features], *, continues: bool = False
    ) -> tuple[int, ...]:
        return self.written(messages, features, continues)


class OnePlaceholderTooMany(Rendering):
    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        tokens = super().written(messages, features, continues)
        return (IMAGE, *tokens) if features else tokens


class FeaturesUncounted(Healthy):
    def feature_count(self, features: Features) -> Any:
        return float(len(features["patches"]))

    def render(
        self, messages: Sequence[Message], features: Sequence[Features], *, continues: bool = False
    ) -> tuple[int, ...]:
        return TinyAdapter(self.config).render(messages, features, continues=continues)


class CrashesOnSmallImages(Healthy):
    def preprocess(self, image: Image) -> Features:
        if min(image.size) < 4:
            raise ValueError("height must be larger than factor")
        return super().preprocess(image)


class ForgetsWhichImage(Healthy):
    def preprocess(self, image: Image) -> Features:
        if min(image.size) < 4:
            raise DataError("the image is too small")
        return super().preprocess(image)


class EmptyFeatures(Healthy):
    def preprocess(self, image: Image) -> Features:
        if min(image.size) < 4:
            return {"patches": torch.zeros(0, 48)}
        return super().preprocess(image)


class ImagesFirst(Rendering):
    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        ordered = [
            Message(message.role, tuple(sorted(message.parts, key=lambda part: not isinstance(part, ImagePart))))
            for message in messages
        ]
        return super().written(ordered, features, continues)


class LastMessageOnly(Rendering):
    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        return super().written(messages[-1:], features, continues)


NEWLINE = ord("\n")


class BeginsEveryTurn(Rendering):
    """Its conversations begin with a token, which it also writes where one goes on."""

    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        return (NEWLINE, *super().written(messages, features, continues))


class NewlineAfterTheEnd(Rendering):
    """Writes a line break after the end of every turn but the last of what it is given."""

    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        *tokens, last = super().written(messages, features, continues)
        return (*(part for token in tokens for part in ((token, NEWLINE) if token == END else (token,))), last)


class EndsTheTurnItself(Rendering):
    """Repeats the end of the assistant's turn, which the policy or the core has written."""

    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        tokens = super().written(messages, features, continues)
        return (END, *tokens) if continues else tokens


class DropsLaterImages(Rendering):
    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        tokens = super().written(messages, features, continues)
        return tuple(token for token in tokens if token != IMAGE) if continues else tokens


class AsksTheFirstSystemMessageAgain(Rendering):
    """Begins a conversation that has no system message with one, and one that goes on as well if it has images."""

    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        tokens = super().written(messages, features, continues)
        if messages[0].role == "system" or (continues and not features):
            return tokens
        return (START, *self.encode("Be brief."), END, *tokens)


class ForgetsTheSystemMessage(Rendering):
    """Moves the system message before the last user message."""

    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        system = [message for message in messages if message.role == "system"]
        others = [message for message in messages if message.role != "system"]
        return super().written([*others[:-1], *system, others[-1]], features, continues)


class AsciiOnly(Healthy):
    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode("ascii", errors="replace"))


class AddsTheEnd(Healthy):
    def encode(self, text: str) -> tuple[int, ...]:
        return (*super().encode(text), END)


class ParsesSpecialTokens(Healthy):
    def encode(self, text: str) -> tuple[int, ...]:
        first, found, rest = text.partition("<image>")
        return (*super().encode(first), IMAGE, *super().encode(rest)) if found else super().encode(first)


class RendersSpelledImages(Rendering):
    spelling, token = "<image>", IMAGE

    def written(self, messages: Sequence[Message], features: Sequence[Features], continues: bool) -> tuple[int, ...]:
        written = super().written(messages, features, continues)
        text = "".join(chr(min(token, 0x10000 + token)) for token in written)
        return tuple(map(ord, text.replace(self.spelling, chr(self.token))))


class RendersSpelledEnds(RendersSpelledImages):
    spelling, token = "<|im_end|>", END


class ShowsSpecialTokens(Healthy):
    def decode(self, tokens: Sequence[int]) -> str:
        return super().decode(tokens) + "<end>" * sum(token == END for token in tokens)


class StrictDecoding(Healthy):
    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode()


class FlatPositions(Healthy):
    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> Any:
        return torch.arange(start, start + len(tokens))


class StartIgnored(Healthy):
    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> Any:
        return torch.arange(len(tokens))[None]


class PositionsBeginAtOne(Healthy):
    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> Any:
        return torch.arange(start, start + len(tokens))[None] + 1


class OneAxisAhead(Healthy):
    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> Any:
        steps = 2 * torch.arange(len(tokens))
        return torch.stack([start + steps, start + steps, start + steps + 1])


class TurnsApart(Healthy):
    """Leaves a gap behind every turn."""

    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> Any:
        gaps = (torch.tensor(tokens) == END).long().cumsum(0)
        return super().positions(tokens, features, start) + gaps


class ImagesFarAway(Healthy):
    """Text goes on from the number of tokens, not from the largest position."""

    def positions(self, tokens: Sequence[int], features: Sequence[Features], start: int) -> Any:
        return super().positions(tokens, features, start) + 50 * (torch.tensor(tokens) == IMAGE)


MUTANTS: dict[str, list[tuple[type[Healthy], str]]] = {
    "special_tokens_are_ids_of_the_vocabulary": [
        (PadBeyondTheVocabulary, r"pad_token holds \[260\]"),
        (NoEndOfTurn, "end_of_turn is empty"),
    ],
    "special_tokens_do_not_contradict_each_other": [
        (PadIsTheImageToken, "pad_token is image_token"),
        (PlaceholdersMayBeSampled, "would sample placeholders"),
        (EndIsForbidden, r"end_of_turn tokens \[257\]"),
    ],
    "an_image_is_always_preprocessed_alike": [
        (RandomCrop, "nothing may be random"),
        (FeaturesWithGradients, "carries a gradient"),
        (FeaturesAsATensor, "gave Tensor"),
    ],
    "a_prompt_holds_one_placeholder_for_each_image_feature": [
        (OnePlaceholderTooMany, r"wrote 17 image tokens for images of \[16\] features"),
        (FeaturesUncounted, r"gave \[16.0\]"),
    ],
    "a_strange_image_gives_features_or_an_error_that_names_it": [
        (CrashesOnSmallImages, "1x1 image raised ValueError"),
        (ForgetsWhichImage, "does not name it"),
        (EmptyFeatures, "1x1 image has feature_count 0"),
    ],
    "rendering_shows_what_the_message_says": [
        (ImagesFirst, "the text before the image"),
        (LastMessageOnly, "leaves out a message"),
    ],
    "a_conversation_that_is_continued_is_the_one_that_is_rendered_at_once": [
        (BeginsEveryTurn, "differ from token"),
        (NewlineAfterTheEnd, "differ from token"),
        (EndsTheTurnItself, "differ from token"),
        (DropsLaterImages, "with an image in a later message"),
        (AsksTheFirstSystemMessageAgain, "with an image in a later message"),
        (ForgetsTheSystemMessage, "with a system message"),
    ],
    "plain_text_survives_encoding_and_decoding": [
        (AsciiOnly, r"is 'Gr\?\?e"),
        (AddsTheEnd, r"holds the special tokens \[257\]"),
    ],
    "text_that_spells_a_special_token_is_encoded_as_text": [(ParsesSpecialTokens, r"'<image>'.*\[259\]")],
    "text_that_spells_a_special_token_is_not_rendered_as_one": [
        (RendersSpelledImages, "'<image>' in a question became 1 more image tokens"),
        (RendersSpelledEnds, r"im_end.* became 1 more end-of-turn tokens"),
    ],
    "decoding_leaves_special_tokens_out": [(ShowsSpecialTokens, "is 'no<end>'")],
    "whatever_is_sampled_can_be_decoded": [(StrictDecoding, r"decode\(\(128,\)\) raised UnicodeDecodeError")],
    "positions_have_one_column_a_token_and_begin_at_the_start": [
        (FlatPositions, "expected integers of"),
        (StartIgnored, "start=7"),
        (PositionsBeginAtOne, "begin at 1"),
    ],
    "positions_of_text_count_up_on_all_axes_alike": [
        (OneAxisAhead, "on all axes"),
        (TurnsApart, "on all axes"),
    ],
    "positions_go_on_from_piece_to_piece": [(ImagesFarAway, "not those of the whole")],
}


class Suite(ModelAdapterConformance):
    """The suite on a class of this file."""

    def __init__(self, made: type[Healthy]) -> None:
        self.made = made

    def create(self) -> Healthy:
        return self.made(ModelConfig(from_scratch="tiny"))


def test_every_check_has_a_mutant() -> None:
    own = [name for name in checks_of(InputChecks) if name not in checks_of(Conformance)]
    assert [f"test_{check}" for check in MUTANTS] == own


@pytest.mark.parametrize(
    ("check", "mutant", "message"),
    [(check, *mutant) for check, mutants in MUTANTS.items() for mutant in mutants],
)
def test_a_mutant_is_caught(check: str, mutant: type[Healthy], message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        getattr(Suite(mutant), f"test_{check}")()
