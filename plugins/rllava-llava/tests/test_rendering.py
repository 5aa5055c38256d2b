"""Token ids and pixels are those of the family's own processor, and as many as the model makes features."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rllava_core.errors import DataError, ModelError
from rllava_core.mdp.messages import Message

PRESETS = ("tiny", "tiny-next", "tiny-onevision")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_conversation_is_rendered_as_by_the_real_processor(bench: Any, preset: str) -> None:
    """LLaVA-OneVision's too, if its images are given to it as each the only one of its sample."""
    adapter = bench.adapter(preset)
    for name, messages in bench.conversations().items():
        expected = bench.processed(adapter, messages)
        features = [adapter.preprocess(image) for image in bench.images(messages)]

        tokens = adapter.render(messages, features)

        assert list(tokens) == expected.pop("input_ids")[0].tolist(), name
        assert (tokens[0] == adapter.tokenizer.bos_token_id) == (preset != "tiny-onevision")
        del expected["attention_mask"]
        media = adapter.collate(features) if features else {}
        if preset != "tiny" and features:
            # The real processor pads every image to as many tiles as the largest of its batch has.
            padded = expected["pixel_values"]
            kept = [rows[: len(item["pixel_values"])] for rows, item in zip(padded, features, strict=True)]
            expected["pixel_values"] = torch.cat(kept)
        assert set(media) == set(expected), name
        assert all(torch.equal(media[key], values) for key, values in expected.items()), name


def test_without_tiling_images_are_those_of_a_sample_of_several(bench: Any) -> None:
    adapter = bench.adapter("tiny-onevision", tiling=False)
    for name in ("images around the text", "images side by side", "several turns"):
        messages = bench.conversations()[name]
        expected = bench.processed(adapter, messages, nested=True)
        features = [adapter.preprocess(image) for image in bench.images(messages)]

        assert list(adapter.render(messages, features)) == expected["input_ids"][0].tolist(), name
        media = adapter.collate(features)
        assert torch.equal(media["pixel_values"], expected["pixel_values"].flatten(0, 1))
        assert torch.equal(media["image_sizes"], expected["image_sizes"])
        assert [adapter.feature_count(item) for item in features] == [17] * len(features)


@pytest.mark.parametrize("preset", [*PRESETS, "untiled"])
def test_every_image_has_as_many_tokens_as_the_model_makes_features(bench: Any, preset: str) -> None:
    adapter = bench.adapter("tiny-onevision", tiling=False) if preset == "untiled" else bench.adapter(preset)
    model = adapter.load().eval()
    sizes = [(8, 8), (32, 32), (64, 32), (33, 47), (200, 100), (4, 300), (300, 4), (1, 1), (1, 100), (97, 31)]
    features = [adapter.preprocess(bench.picture(*size)) for size in sizes]

    with torch.no_grad():
        made = model.model.get_image_features(**adapter.collate(features)).pooler_output

    assert [len(item) for item in made] == [adapter.feature_count(item) for item in features]


@pytest.mark.parametrize("preset", PRESETS)
def test_images_are_told_apart_by_random_weights(bench: Any, preset: str) -> None:
    """If the features of all images were alike, nothing would be learnt from them."""
    torch.manual_seed(0)
    adapter = bench.adapter(preset)
    model = adapter.load().eval()
    features = [adapter.preprocess(bench.picture(32, 32, seed)) for seed in range(8)]

    with torch.no_grad():
        made = torch.stack(model.model.get_image_features(**adapter.collate(features)).pooler_output)  # [N, T, H]

    assert made.std(dim=0).mean() > 0.3 * made.std()


@pytest.mark.parametrize("token", ["<image>", "</s>", "<s>", "<pad>"])
def test_a_special_token_in_the_text_is_refused(bench: Any, token: str) -> None:
    with pytest.raises(DataError, match=f"special token '{token}'"):
        bench.adapter().render([Message.user(f"Ignore this {token} please")], [])


def test_more_or_fewer_images_than_the_template_shows_are_refused(bench: Any) -> None:
    adapter = bench.adapter()
    features = adapter.preprocess(bench.picture(8, 8))
    with pytest.raises(ModelError, match="the chat template shows 0 of 1 images"):
        adapter.render([Message.user("no image")], [features])


def test_llava_next_cannot_do_without_tiles(bench: Any) -> None:
    with pytest.raises(ModelError, match=r"LLaVA-NeXT tiles every image"):
        bench.adapter("tiny-next", tiling=False)


def test_a_later_turn_of_a_tokenizer_that_marks_the_beginning_of_a_text(bench: Any) -> None:
    """SentencePiece writes a space before a text, and a later turn is no beginning of a text."""
    adapter = bench.adapter()
    adapter.load()
    later = adapter.render([Message.user("And now?")], [], continues=True)
    assert adapter.tokenizer.convert_ids_to_tokens(later[0]) == "USER"
