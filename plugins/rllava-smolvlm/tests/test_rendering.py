"""Token ids, tiles and masks are those of the families' own processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from rllava_core.errors import DataError
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message

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
PRESETS = ["tiny", "tiny-idefics3"]


def test_every_conversation_is_tried(bench: Any) -> None:
    assert list(bench.conversations()) == CONVERSATIONS


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_rendered_as_by_the_real_processor(bench: Any, preset: str, split: bool, name: str) -> None:
    adapter = bench.adapter(from_scratch=preset, split_images=split)
    messages = bench.conversations()[name]
    expected = bench.processed(adapter.processor, messages)

    tokens, features = bench.rendered(adapter, messages)

    assert tokens == expected["input_ids"][0].tolist()
    if features:
        media = adapter.collate(features)
        assert set(media) == {"pixel_values", "pixel_attention_mask"} == set(expected) - {"input_ids", "attention_mask"}
        assert torch.equal(media["pixel_values"], expected["pixel_values"])
        assert torch.equal(media["pixel_attention_mask"], expected["pixel_attention_mask"].bool())
        # Tiles are never padded.
        assert media["pixel_attention_mask"].all()


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((8, 8), (2, 2)),
        ((64, 64), (2, 2)),
        ((500, 250), (1, 2)),
        ((32, 64), (2, 1)),
        ((33, 64), (2, 2)),
        ((200, 1), (1, 2)),
        ((1, 200), (2, 1)),
    ],
)
def test_an_image_is_cut_into_rows_and_columns(bench: Any, size: tuple[int, int], grid: tuple[int, int]) -> None:
    adapter = bench.adapter(split_images=True)
    features = adapter.preprocess(bench.picture(*size))
    rows, columns = grid

    text = adapter.image_text(features)

    assert features["grid"].tolist() == [[rows, columns]]
    assert len(features["pixel_values"]) == rows * columns + 1
    assert adapter.feature_count(features) == 16 * (rows * columns + 1) == text.count("<image>")
    assert text.count("\n") == rows + 1
    assert text.count(f"<row_{rows}_col_{columns}>") == 1
    assert text.endswith("<global-img>" + "<image>" * 16 + "<fake_token_around_image>")


def test_an_image_that_is_not_cut_is_one_tile(bench: Any) -> None:
    adapter = bench.adapter()
    features = adapter.preprocess(bench.picture(64, 32))

    frame = "<fake_token_around_image>"
    assert adapter.image_text(features) == f"{frame}<global-img>{'<image>' * 16}{frame}"
    assert features["pixel_values"].shape == (1, 3, 32, 32)


def test_the_longest_edge_decides_how_many_tiles_there_are(bench: Any) -> None:
    def tokens(**options: Any) -> int:
        adapter = bench.adapter(**options)
        return int(adapter.feature_count(adapter.preprocess(bench.picture(40, 40))))

    assert tokens() == tokens(longest_edge=128) == 16
    assert tokens(split_images=True) == 5 * 16
    assert tokens(split_images=True, longest_edge=32) == 16
    assert tokens(split_images=True, longest_edge=96) == 10 * 16


def test_a_tile_for_which_the_tokenizer_has_no_name_is_named_in_letters(bench: Any) -> None:
    """As the family's own processor does. Here 5×5 tiles, of which the tokenizer knows 4×4."""
    adapter = bench.adapter(split_images=True, longest_edge=160)
    messages = (Message.user(bench.picture(40, 40), "?"),)
    tokens, _ = bench.rendered(adapter, messages)
    assert tokens == bench.processed(adapter.processor, messages)["input_ids"][0].tolist()


def test_media_of_a_batch_are_its_tiles_in_reading_order(bench: Any) -> None:
    adapter = bench.adapter(split_images=True)
    features = [adapter.preprocess(bench.picture(*size)) for size in ((40, 40), (64, 32), (8, 8))]
    media = adapter.collate(features)

    assert media["pixel_values"].shape == (1, 5 + 3 + 5, 3, 32, 32)
    assert torch.equal(media["pixel_values"][0, 5:8], features[1]["pixel_values"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_conversation_goes_on_in_the_template_of_the_released_checkpoints(bench: Any, preset: str) -> None:
    """They write a space before an answer, which is the first letter that such a model says."""
    adapter = bench.adapter(from_scratch=preset)
    adapter.processor.chat_template = DEFAULT_CHAT_TEMPLATE
    first, answer, later = bench.conversations()["several turns"]
    opening, seen = bench.rendered(adapter, [first])
    whole, features = bench.rendered(adapter, [first, answer, later])

    continued = adapter.render([later], features[len(seen) :], continues=True)

    assert whole == [*opening, *adapter.encode(" A wall."), adapter.end_of_turn[0], *continued]


@pytest.mark.parametrize("brightness", [0, 127, 128, 255])
@pytest.mark.parametrize("split", [False, True])
def test_an_image_of_one_colour_is_not_taken_for_padding(bench: Any, brightness: int, split: bool) -> None:
    """No brightness becomes exactly 0 with the families' mean of 0.5, which is 127.5 of 255."""
    adapter = bench.adapter(split_images=split)
    image = Image.from_array(np.full((32, 64, 3), brightness, np.uint8))
    features = adapter.preprocess(image)
    model = adapter.load()

    pooled = model.model.get_image_features(**adapter.collate([features])).pooler_output

    assert sum(len(item) for item in pooled) == adapter.feature_count(features)


def test_pixels_that_the_model_would_take_for_padding_are_refused(bench: Any) -> None:
    """The model drops tiles of zeros, so that the images behind them would move into their place."""
    adapter = bench.adapter(split_images=True)
    adapter.processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    pixels = np.full((64, 64, 3), 200, np.uint8)
    pixels[:40, :40] = 0  # the first tile, and some of the others

    with pytest.raises(DataError, match=r"night\.png: its pixels become exactly 0"):
        adapter.preprocess(Image(pixels, "night.png"))
    adapter.preprocess(Image(np.full((64, 64, 3), 1, np.uint8), "dark.png"))


@pytest.mark.parametrize(
    "token", ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<end_of_utterance>"]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_special_token_in_the_text_is_refused(bench: Any, preset: str, token: str) -> None:
    adapter = bench.adapter(from_scratch=preset)
    with pytest.raises(DataError, match=f"special token '{token}'"):
        adapter.render([Message.user(f"Ignore this {token} please")], [])


@pytest.mark.parametrize("preset", PRESETS)
def test_no_token_that_frames_an_image_can_be_sampled(bench: Any, preset: str) -> None:
    adapter = bench.adapter(from_scratch=preset)
    adapter.load()
    names = adapter.tokenizer.convert_ids_to_tokens(list(adapter.forbidden_tokens))
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    assert sorted(names) == sorted(["<image>", "<fake_token_around_image>", "<global-img>", *rows])
