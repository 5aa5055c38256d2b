"""Healthy adapters pass the suite, and for every check there is a bad one that it catches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import ImagePart
from rllava_core.policy.adapter import Features
from rllava_core.policy.config import ModelConfig
from rllava_core.testing import ConformanceError, ModelAdapterConformance, check_model_adapter
from rllava_core.testing.conformance import checks_of
from rllava_core.testing.models_inputs import InputChecks
from rllava_core.testing.tiny import END, IMAGE, PAD, START, TinyAdapter, TinyModel


class Healthy(TinyAdapter):
    """The tiny adapter, typed as loosely as mutants need."""

    pad_token: Any = PAD
    end_of_turn: Any = (END,)
    forbidden_tokens: Any = (START, PAD, IMAGE)
    context_length: Any = 256

    def hidden_states(self, model: Any, **inputs: Any) -> Any:
        return super().hidden_states(model, **inputs)


class CacheForgotten(Healthy):
    def hidden_states(self, model: Any, *, cache: Any, **inputs: Any) -> Any:
        return super().hidden_states(model, cache=DynamicCache(config=model.config), **inputs)


class TwiceTheGradientWithoutACache(Healthy):
    def hidden_states(self, model: Any, *, cache: Any, **inputs: Any) -> Any:
        hidden = super().hidden_states(model, cache=cache, **inputs)
        return hidden if cache is not None else 2 * hidden - hidden.detach()


class OtherStatesWithoutACache(Healthy):
    def hidden_states(self, model: Any, *, cache: Any, **inputs: Any) -> Any:
        hidden = super().hidden_states(model, cache=cache, **inputs)
        return hidden if cache is not None else hidden + 0.01


class NoTrees(Healthy):
    """Refuses masks of four dimensions, and says so."""

    takes_trees = False

    def hidden_states(self, model: Any, *, attention_mask: Tensor, **inputs: Any) -> Any:
        if attention_mask.ndim == 4:
            raise ValueError("a mask of four dimensions")
        return super().hidden_states(model, attention_mask=attention_mask, **inputs)


class TreesRefused(NoTrees):
    takes_trees = True


class SaysNothingOfTrees(Healthy):
    takes_trees: Any = None


class LastStateMissing(Healthy):
    def hidden_states(self, model: Any, **inputs: Any) -> Any:
        return super().hidden_states(model, **inputs)[:, :-1]


class PositionsStartAnew(Healthy):
    def hidden_states(self, model: Any, *, tokens: Tensor, positions: Tensor, **inputs: Any) -> Any:
        anew = torch.arange(tokens.shape[1]).expand_as(positions)
        return super().hidden_states(model, tokens=tokens, positions=anew, **inputs)


class PaddingAttended(Healthy):
    def hidden_states(self, model: Any, *, attention_mask: Tensor, **inputs: Any) -> Any:
        return super().hidden_states(model, attention_mask=torch.ones_like(attention_mask), **inputs)


class PlainModel(TinyModel):
    """With the forward of a model of transformers."""

    def forward(self, input_ids: Tensor, patches: Tensor | None = None) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=self.lm_head(self.hidden(input_ids, patches)))


class WithItsOwn(Healthy):
    """Offers what the family's own processor makes of a prompt."""

    def load(self) -> Any:
        model = super().load()
        model.__class__ = PlainModel
        return model

    def own_tokens(self, messages: Any) -> tuple[int, ...]:
        images = [part.image for message in messages for part in message.parts if isinstance(part, ImagePart)]
        return TinyAdapter.render(self, messages, [self.preprocess(image) for image in images])

    def own_inputs(self, tokens: Any, images: Any) -> dict[str, Tensor]:
        media = TinyAdapter.collate(self, [self.preprocess(image) for image in images]) if images else {}
        return {"input_ids": torch.tensor([tokens]), **media}


class RenderedOtherwise(WithItsOwn):
    def render(self, *arguments: Any, **options: Any) -> tuple[int, ...]:
        return (*super().render(*arguments, **options), ord(":"))


class EncodesSomethingElse(Healthy):
    def encode_images(self, model: Any, media: Any) -> Features:
        return {"seen": super().encode_images(model, media)["seen"].flip(0)}


class EncodesByTheLanguageModel(Healthy):
    def encode_images(self, model: Any, media: Any) -> Features:
        return {"seen": super().encode_images(model, media)["seen"] + 0 * model.lm_head.weight[0]}


class EncodesWhatItDoesNotTake(Healthy):
    def encode_images(self, model: Any, media: Any) -> Features:
        return {"states": super().encode_images(model, media)["seen"]}


class EncodesWhatCannotBeJoined(Healthy):
    def encode_images(self, model: Any, media: Any) -> Features:
        return {"seen": super().encode_images(model, media)["seen"][None]}


class EncodesPerhaps(Healthy):
    def encodes_images(self, model: Any) -> Any:
        return None


class EncodesNothing(Healthy):
    def encodes_images(self, model: Any) -> bool:
        return False


class OtherPositions(WithItsOwn):
    """As a family whose images have positions of their own would be read by an adapter that counts."""

    def positions(self, tokens: Any, features: Any, start: int) -> Any:
        return 2 * super().positions(tokens, features, start)


class OneUnknownPart(Healthy):
    def part_of(self, parameter: str) -> Any:
        return "head" if parameter.startswith("lm_head") else super().part_of(parameter)


class NothingSees(Healthy):
    def part_of(self, parameter: str) -> Any:
        return "language"


class ContinuationsMixed(Healthy):
    def hidden_states(self, model: Any, *, attention_mask: Tensor, **inputs: Any) -> Any:
        if attention_mask.dim() == 4:
            attention_mask = torch.ones_like(attention_mask[:, 0, -1])
        return super().hidden_states(model, attention_mask=attention_mask, **inputs)


class ImagesSortedBySize(Healthy):
    def collate(self, features: Sequence[Features]) -> dict[str, Tensor]:
        return super().collate(sorted(features, key=lambda item: len(item["patches"])))


class PositionsOfTheFirstRow(Healthy):
    def hidden_states(self, model: Any, *, positions: Tensor, **inputs: Any) -> Any:
        return super().hidden_states(model, positions=positions[:, :1].expand_as(positions), **inputs)


class SeeingOtherwise(Healthy):
    """Changes the patches before the model sees them."""

    def change(self, patches: Tensor) -> Tensor:
        return patches

    def hidden_states(self, model: Any, *, media: Mapping[str, Tensor], **inputs: Any) -> Any:
        changed = {name: self.change(patches) for name, patches in media.items()}
        return super().hidden_states(model, media=changed, **inputs)


class Blind(SeeingOtherwise):
    def change(self, patches: Tensor) -> Tensor:
        return patches * 0


class OneColourForAll(SeeingOtherwise):
    def change(self, patches: Tensor) -> Tensor:
        return patches.mean(0, keepdim=True).expand_as(patches)


class NormalisedByTheBatch(SeeingOtherwise):
    def change(self, patches: Tensor) -> Tensor:
        return (patches - patches.mean()) / patches.std()


class VisionWithoutGradients(SeeingOtherwise):
    def change(self, patches: Tensor) -> Tensor:
        return patches.detach()


class PromptWithoutGradients(Healthy):
    def hidden_states(self, model: Any, *, cache: Any, **inputs: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache.get_seq_length() > 0):
            return super().hidden_states(model, cache=cache, **inputs)


class NeverAnyGradient(Healthy):
    def hidden_states(self, model: Any, **inputs: Any) -> Any:
        with torch.no_grad():
            return super().hidden_states(model, **inputs)


class FrozenVision(Healthy):
    def load(self) -> Any:
        model: Any = super().load()
        model.vision.requires_grad_(False)
        return model


class NoTransformersModel(Healthy):
    def load(self) -> Any:
        wrapped: Any = nn.Module()
        wrapped.lm_head = nn.Linear(16, 260)
        return wrapped


class HeadAsAMatrix(Healthy):
    def lm_head(self, model: Any) -> Any:
        return model.lm_head.weight


class ContextUnknown(Healthy):
    context_length = None

    def load(self) -> Any:
        return TinyAdapter(self.config).load()


class OneModelForAll(Healthy):
    model: ClassVar[Any] = None

    def load(self) -> Any:
        type(self).model = self.model or super().load()
        return self.model


class OwnSeed(Healthy):
    def load(self) -> Any:
        torch.seed()
        return super().load()


class PrecisionIgnored(Healthy):
    def load(self) -> Any:
        return super().load().float()


class DecodingOffByOne(Healthy):
    """A single token goes to the next position."""

    def hidden_states(self, model: Any, *, tokens: Tensor, positions: Tensor, **inputs: Any) -> Any:
        moved = positions + 1 if tokens.shape[1] == 1 else positions
        return super().hidden_states(model, tokens=tokens, positions=moved, **inputs)


class ForbiddenTooLate(Healthy):
    forbidden_tokens = ()

    def preprocess(self, image: Image) -> Features:
        self.forbidden_tokens = (START, PAD, IMAGE)
        return super().preprocess(image)


class Pickled(Healthy):
    def save(self, model: Any, directory: Path) -> None:
        super().save(model, directory)
        torch.save(model.state_dict(), directory / "pytorch_model.bin")


class WeightsAlone(Healthy):
    def save(self, model: Any, directory: Path) -> None:
        super().save(model, directory)
        (directory / "config.json").unlink()


class ConfigAlone(Healthy):
    def save(self, model: Any, directory: Path) -> None:
        model.config.save_pretrained(directory)


class SavedInHalfPrecision(Healthy):
    def save(self, model: Any, directory: Path) -> None:
        half = TinyModel(model.config)
        half.load_state_dict(model.state_dict())
        half.bfloat16().save_pretrained(directory)


class PathIgnored(Healthy):
    def load(self) -> Any:
        return TinyAdapter(ModelConfig(from_scratch="tiny")).load()


class EndLostOnLoading(Healthy):
    def load(self) -> Any:
        if self.config.path is not None:
            self.end_of_turn = (PAD,)
        return super().load()


class BareErrors(Healthy):
    def load(self) -> Any:
        if self.config.path is not None:
            return TinyModel.from_pretrained(self.config.path)
        return super().load()


MUTANTS: dict[str, list[tuple[type[Healthy], str]]] = {
    "hidden_states_have_one_row_a_token_and_fill_the_cache": [
        (CacheForgotten, "the cache holds 0 tokens"),
        (LastStateMissing, "gave the shape"),
    ],
    "a_sequence_through_the_cache_equals_the_whole": [(PositionsStartAnew, "in pieces through the cache")],
    "the_familys_own_forward_gives_the_same": [
        (RenderedOtherwise, "of which render"),
        (OtherPositions, "gives other logits"),
    ],
    "images_encoded_apart_are_seen_the_same": [
        (EncodesSomethingElse, "encoded apart give other hidden states"),
        (EncodesByTheLanguageModel, "part_of\\(\\) says are the language model's"),
        (EncodesWhatItDoesNotTake, "encoded apart give other hidden states"),
        (EncodesWhatCannotBeJoined, "does not take what encode_images"),
        (EncodesPerhaps, "gave None; say True or False"),
    ],
    "continuations_in_one_row_do_not_see_each_other": [
        (ContinuationsMixed, "that must not see each other"),
        (OtherStatesWithoutACache, "in one row, without a cache"),
        (TreesRefused, "`takes_trees = False`"),
        (SaysNothingOfTrees, "takes_trees is None"),
    ],
    "padding_on_the_right_changes_nothing": [(PaddingAttended, "padding changes the hidden states")],
    "a_batch_equals_its_sequences_one_by_one": [(ImagesSortedBySize, "of a batch of mixed images differs")],
    "the_order_of_a_batch_changes_nothing": [(PositionsOfTheFirstRow, "a batch in another order")],
    "images_are_seen": [(Blind, "it is not seen")],
    "images_in_another_order_are_another_prompt": [(OneColourForAll, "two images in another order")],
    "an_image_belongs_to_its_own_sequence": [
        (NormalisedByTheBatch, "changes the sequence beside it"),
        (Blind, "in the second sequence"),
    ],
    "gradients_flow_through_the_cache_to_every_part": [
        (VisionWithoutGradients, "no gradient reaches the pixels"),
        (PromptWithoutGradients, "no gradient reaches the pixels"),
        (NeverAnyGradient, "run under no_grad"),
        (FrozenVision, "trains_vision = False"),
    ],
    "load_gives_a_model_with_a_head_over_the_vocabulary": [
        (NoTransformersModel, "gave Module; expected a PreTrainedModel"),
        (HeadAsAMatrix, r"lm_head\(\) gave Parameter"),
    ],
    "every_weight_belongs_to_a_part": [(OneUnknownPart, "gave {'head'}"), (NothingSees, "a part that sees")],
    "the_context_length_is_known_once_the_model_is_loaded": [(ContextUnknown, "context_length is None")],
    "the_same_seed_loads_the_same_weights_into_an_independent_copy": [
        (OneModelForAll, "changes another"),
        (OwnSeed, "two loads from one random state differ"),
    ],
    "the_weights_have_the_precision_that_the_config_says": [(PrecisionIgnored, "`dtype: bfloat16` most weights are")],
    "what_is_sampled_is_what_is_trained": [(DecodingOffByOne, "while sampling and recomputed")],
    "gradients_do_not_depend_on_what_is_read_together": [
        (TwiceTheGradientWithoutACache, "packed gives"),
    ],
    "nothing_forbidden_is_sampled": [(ForbiddenTooLate, "were not known when load")],
    "a_checkpoint_is_safetensors_and_no_pickle": [
        (Pickled, "pytorch_model.bin: a pickle"),
        (WeightsAlone, "expected a config.json"),
        (ConfigAlone, "expected safetensors"),
    ],
    "a_saved_model_computes_the_same_bits": [
        (SavedInHalfPrecision, "are not the same"),
        (PathIgnored, "are not the same"),
        (EndLostOnLoading, r"end_of_turn is \(258,\)"),
    ],
    "a_directory_without_a_model_is_a_model_error": [
        (BareErrors, "raised OSError"),
        (PathIgnored, "without an error"),
    ],
}


class Suite(ModelAdapterConformance):
    """The suite on a class of this file."""

    def __init__(self, made: type[Healthy]) -> None:
        self.made = made

    def create(self) -> Healthy:
        return self.made(ModelConfig(from_scratch="tiny"))


def test_every_check_has_a_mutant() -> None:
    """The checks of what goes into a model have theirs in a file of their own."""
    own = [name for name in checks_of(ModelAdapterConformance) if name not in checks_of(InputChecks)]
    assert [f"test_{check}" for check in MUTANTS] == own


@pytest.mark.parametrize(
    ("check", "mutant", "message"),
    [(check, *mutant) for check, mutants in MUTANTS.items() for mutant in mutants],
)
def test_a_mutant_is_caught(check: str, mutant: type[Healthy], message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        getattr(Suite(mutant), f"test_{check}")()


@pytest.mark.parametrize("made", [Healthy, TinyAdapter, WithItsOwn, NoTrees, EncodesNothing])
def test_a_healthy_adapter_passes(made: type[TinyAdapter]) -> None:
    check_model_adapter(lambda: made(ModelConfig(from_scratch="tiny")))


def test_a_frozen_vision_part_may_be_meant() -> None:
    suite = Suite(FrozenVision)
    suite.trains_vision = False
    suite.test_gradients_flow_through_the_cache_to_every_part()


def test_every_failure_is_listed() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_model_adapter(lambda: Blind(ModelConfig(from_scratch="tiny")))
    assert "images are seen: another image gives the same hidden states" in str(caught.value)
    assert "in another order are another prompt" in str(caught.value)
