"""Token ids, pixels and positions are those of the real processor and model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AddedToken

from rllava_core.errors import DataError, InvariantError, ModelError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message, TextPart
from rllava_core.mdp.trajectory import ContextSegment
from rllava_core.policy.batch import BatchBuilder
from rllava_core.policy.media import MediaStore

CONVERSATIONS = [
    "text alone",
    "an image before the text",
    "an image after the text",
    "images around the text",
    "images side by side",
    "an image alone",
    "an image that is shrunk",
    "a system message",
    "several turns",
    "letters beyond ASCII",
]


def test_every_conversation_is_tried(bench: Any) -> None:
    assert list(bench.conversations()) == CONVERSATIONS


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_rendered_as_by_the_real_processor(bench: Any, name: str) -> None:
    adapter = bench.adapter()
    messages = bench.conversations()[name]
    expected = bench.processed(adapter, messages)

    prompt = bench.prompt(adapter, *messages)

    assert list(prompt.tokens) == expected["input_ids"][0].tolist()
    if prompt.images:
        media = adapter.collate([adapter.preprocess(image) for image in prompt.images])
        assert set(media) == {"pixel_values", "image_grid_thw"}
        assert torch.equal(media["pixel_values"], expected["pixel_values"])
        assert torch.equal(media["image_grid_thw"], expected["image_grid_thw"])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_positions_are_the_model_s_own(bench: Any, name: str) -> None:
    adapter = bench.adapter()
    model = adapter.load()
    inputs = bench.processed(adapter, bench.conversations()[name])
    tokens = torch.cat([inputs["input_ids"], torch.tensor([adapter.encode(" and more")])], dim=1)
    expected, _ = model.model.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == adapter.image_token).int(),
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=torch.ones_like(tokens),
    )
    features = [{"image_grid_thw": grid[None]} for grid in inputs.get("image_grid_thw", [])]

    assert torch.equal(adapter.positions(tokens[0].tolist(), features, 0), expected[:, 0])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_positions_go_on_from_piece_to_piece(bench: Any, name: str) -> None:
    """A sequence in two pieces, wherever it is cut outside an image, has the positions of the whole."""
    adapter = bench.adapter()
    prompt = bench.prompt(adapter, *bench.conversations()[name])
    tokens = prompt.tokens
    features = [adapter.preprocess(image) for image in prompt.images]
    whole = adapter.positions(tokens, features, 0)
    for cut in range(1, len(tokens)):
        if tokens[cut - 1] == tokens[cut] == adapter.image_token:
            continue
        shown = sum(
            1
            for place in range(1, cut)
            if tokens[place] == adapter.image_token and tokens[place - 1] != adapter.image_token
        )
        first = adapter.positions(tokens[:cut], features[:shown], 0)
        second = adapter.positions(tokens[cut:], features[shown:], int(first.max()) + 1)
        assert torch.equal(torch.cat([first, second], dim=1), whole), cut


def test_adjacent_images_are_laid_out_one_after_the_other(bench: Any) -> None:
    adapter = bench.adapter()
    grids = [{"image_grid_thw": torch.tensor([[1, 4, 8]])}, {"image_grid_thw": torch.tensor([[1, 4, 2]])}]

    positions = adapter.positions([adapter.image_token] * 10 + [5], grids, 7)

    assert positions.tolist() == [
        [7] * 8 + [11] * 2 + [13],
        [7] * 4 + [8] * 4 + [11, 12] + [13],
        [7, 8, 9, 10] * 2 + [11, 11] + [13],
    ]


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 64), (33, 47), (200, 100), (4, 300), (1, 1)])
def test_a_rendered_prompt_holds_one_placeholder_for_each_image_feature(bench: Any, size: tuple[int, int]) -> None:
    adapter = bench.adapter()
    model = adapter.load()
    features = adapter.preprocess(bench.picture(*size))

    tokens = adapter.render([Message.user(bench.picture(*size), "?")], [features])
    pooled = model.model.get_image_features(**adapter.collate([features])).pooler_output

    assert tokens.count(adapter.image_token) == adapter.feature_count(features) == sum(len(item) for item in pooled)
    height, width = features["image_grid_thw"][0, 1:].tolist()
    assert 32 * 32 <= height * width * 4 * 4 <= 64 * 64


def test_a_prompt_that_was_cut_through_an_image_is_refused(bench: Any) -> None:
    """Peers crash deep in the model, or train on the wrong pixels: "image tokens and features do not match"."""
    adapter = bench.adapter()
    adapter.load()
    prompt = bench.prompt(adapter, Message.user("Which digit?", bench.picture(32, 32)))
    first = prompt.tokens.index(adapter.image_token)
    builder = BatchBuilder(adapter, MediaStore(adapter))
    builder.add_context([prompt], "whole")

    with pytest.raises(InvariantError, match=r"train\.jsonl:12: 3 image tokens for 1 images with 16 features"):
        builder.add_context([ContextSegment(prompt.tokens[: first + 3], prompt.images)], "train.jsonl:12")


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>", "<|video_pad|>"])
def test_a_special_token_in_the_text_is_refused(bench: Any, token: str) -> None:
    adapter = bench.adapter()
    with pytest.raises(DataError, match=rf"special token '{token}'".replace("|", r"\|")):
        adapter.render([Message.user(f"Ignore this {token} please")], [])


def test_encoded_text_never_holds_a_special_token(bench: Any) -> None:
    """What is encoded here comes from data: choices and answers."""
    adapter = bench.adapter()
    special = set(adapter.tokenizer.get_added_vocab().values())
    tokens = adapter.encode("<|im_end|><|image_pad|> x")
    assert tokens
    assert not special & set(tokens)
    assert adapter.decode(tokens) == "<|im_end|><|image_pad|> x"


@pytest.mark.parametrize("text", ["seven", " 7 .", "a  b\n", "Größe 数字 🙂", "system user assistant", ""])
def test_decoding_gives_back_what_was_encoded(bench: Any, text: str) -> None:
    adapter = bench.adapter()
    assert adapter.decode(adapter.encode(text)) == text


def test_decoding_leaves_special_tokens_out(bench: Any) -> None:
    adapter = bench.adapter()
    assert adapter.decode((*adapter.encode("no"), *adapter.end_of_turn, adapter.pad_token)) == "no"


@pytest.mark.parametrize(("width", "height"), [(804, 4), (4, 804), (202, 1)])
def test_an_image_that_is_too_narrow_is_refused_by_name(bench: Any, width: int, height: int) -> None:
    narrow = Image(np.zeros((height, width, 3), np.uint8), "holiday.png")
    with pytest.raises(DataError, match=r"holiday\.png: .*aspect ratio"):
        bench.adapter().preprocess(narrow)


def test_more_or_fewer_images_than_the_template_shows_are_refused(bench: Any) -> None:
    adapter = bench.adapter()
    features = adapter.preprocess(bench.picture(8, 8))
    with pytest.raises(ModelError, match="the chat template shows 0 of 1 images"):
        adapter.render([Message.user("no image")], [features])
    with pytest.raises(ModelError, match="the chat template shows 1 of 0 images"):
        adapter.render([Message.user(bench.picture(8, 8))], [])


def test_images_can_be_kept_larger_or_smaller(bench: Any) -> None:
    picture = bench.picture(64, 64)

    def tokens(**options: Any) -> int:
        adapter = bench.adapter(**options)
        return int(adapter.feature_count(adapter.preprocess(picture)))

    assert tokens() == 64  # patches of 4, merged 2×2
    assert tokens(max_pixels=32 * 32) == 16
    assert tokens(min_pixels=128 * 128, max_pixels=256 * 256) == 256
    assert tokens(min_pixels=16 * 16) == 64
    assert bench.adapter().feature_count(bench.adapter().preprocess(bench.picture(8, 8))) == 16
    smaller = bench.adapter(min_pixels=8 * 8)
    assert smaller.feature_count(smaller.preprocess(bench.picture(8, 8))) == 1


def test_limits_on_pixels_are_those_of_the_processor_that_is_saved(bench: Any, tmp_path: Any) -> None:
    from transformers import AutoProcessor

    adapter = bench.adapter(max_pixels=32 * 32)
    adapter.save(adapter.load(), tmp_path)
    picture = bench.picture(64, 64)

    loaded = AutoProcessor.from_pretrained(tmp_path).image_processor(images=[picture.to_pil()], return_tensors="pt")

    assert torch.equal(loaded["pixel_values"], adapter.preprocess(picture)["pixel_values"])


def test_a_later_observation_may_say_anything(bench: Any) -> None:
    """The words that the adapter itself finds the end of a turn by, too."""
    adapter = bench.adapter()
    said = (Message.user("An answer. of one word, please"),)
    before = (Message.user("Go!"),)
    whole = adapter.render((*before, Message("assistant", (TextPart("yes"),)), *said), ())
    first = adapter.render(before, ())
    answer = (*adapter.encode("yes"), adapter.end_of_turn[0])
    assert first + answer + adapter.render(said, (), continues=True) == whole


def test_words_that_were_added_to_a_tokenizer_may_be_asked_about(bench: Any) -> None:
    """<think> is one token of later families, and no special one."""
    adapter = bench.adapter()
    adapter.tokenizer.add_tokens([AddedToken("<think>", special=False)])
    adapter.render((Message.user("Write <think> first."),), ())
    with pytest.raises(DataError, match="special token"):
        adapter.render((Message.user("Write <|im_end|> first."),), ())
