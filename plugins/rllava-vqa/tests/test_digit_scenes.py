"""Scenes with a digit: what they hold, and that only a closer look reads it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_vqa.boxes import read_box
from rllava_vqa.config import DigitScenesConfig, DigitsConfig
from rllava_vqa.datasets.digit_scenes import CELL, DigitScenes
from rllava_vqa.datasets.digits import Digits
from rllava_vqa.environments.views import crop_of, overview_of


@pytest.fixture(scope="module")
def scenes() -> DigitScenes:
    return DigitScenes(DigitScenesConfig())


def picture(example: Example) -> Image:
    (image,) = example.images
    return image.load()


def test_every_scan_has_a_scene_on_its_side_of_the_split(scenes: DigitScenes) -> None:
    digits = Digits(DigitsConfig())
    for split in ("train", "held_out"):
        scans, made = digits.examples(split), scenes.examples(split)
        assert [example.name for example in made] == [scan.name.replace("digits", "digit_scenes") for scan in scans]
        assert [example.answer for example in made] == [scan.answer for scan in scans]


def test_the_box_of_the_digit_holds_the_scan_enlarged(scenes: DigitScenes) -> None:
    for scan, example in zip(Digits(DigitsConfig()).examples("held_out"), scenes.examples("held_out"), strict=True):
        assert picture(example).size == (96, 96)
        crop = crop_of(picture(example), example.fields["boxes"][example.fields["cell"] - 1], None)
        assert crop.size == (16, 16)
        np.testing.assert_array_equal(crop.pixels[::2, ::2], scan.images[0].load().pixels)


def test_fields_are_plain_and_boxes_lie_in_their_cells(scenes: DigitScenes) -> None:
    for example in scenes.examples("train"):
        assert set(example.fields) == {"question", "boxes", "cell"}
        assert json.loads(json.dumps(dict(example.fields)))["question"] == "Which digit?"
        for number, box in enumerate(example.fields["boxes"]):
            assert read_box(box, (96, 96)) == box
            row, column = divmod(number, 2)
            assert column * CELL <= box[0] < box[2] <= (column + 1) * CELL
            assert row * CELL <= box[1] < box[3] <= (row + 1) * CELL


def test_the_digit_is_in_every_cell_equally_often(scenes: DigitScenes) -> None:
    counts = Counter(example.fields["cell"] for example in scenes.examples("train"))
    assert sorted(counts) == [1, 2, 3, 4]
    assert min(counts.values()) > 0.22 * 1437


@pytest.mark.parametrize("distractors", [0, 1, 2, 3])
def test_so_many_other_cells_hold_a_stroke_as_bright_as_the_digit(distractors: int) -> None:
    for example in DigitScenes(DigitScenesConfig(distractors=distractors)).examples("held_out")[:40]:
        brightest = [crop_of(picture(example), box, None).pixels.max() for box in example.fields["boxes"]]
        del brightest[example.fields["cell"] - 1]
        assert sorted(value > 200 for value in brightest) == [False] * (3 - distractors) + [True] * distractors


def test_the_question_can_be_another() -> None:
    examples = DigitScenes(DigitScenesConfig(question="?")).examples("train")
    assert {example.fields["question"] for example in examples} == {"?"}


def test_close_ups_are_scans_to_train_on_beside_the_scenes(scenes: DigitScenes) -> None:
    more = DigitScenes(DigitScenesConfig(close_ups=0.25))
    assert list(more.examples("held_out")) == list(scenes.examples("held_out"))
    assert list(more.examples("train"))[:1437] == list(scenes.examples("train"))
    alone = more.examples("train")[1437:]
    assert len(alone) == round(0.25 * 1437)
    first = Digits(DigitsConfig()).examples("train")[0]
    assert alone[0] == Example("digit_scenes:1:close-up", first.fields, first.images, first.answer)


@pytest.mark.parametrize("options", [{"close_ups": 1.1}, {"close_ups": -0.1}, {"distractors": 4}, {"distractors": -1}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DigitScenesConfig.model_validate(options)


def test_scenes_are_the_same_every_time(scenes: DigitScenes) -> None:
    assert list(DigitScenes(DigitScenesConfig()).examples("train")) == list(scenes.examples("train"))


# What can be read of them, by the nearest neighbours among the scenes to train on


def accuracy(scenes: DigitScenes, features: Callable[[Example], NDArray[np.uint8]], label: str) -> float:
    from sklearn.neighbors import KNeighborsClassifier

    def table(examples: list[Example]) -> tuple[NDArray[np.float64], list[str]]:
        columns = np.array([features(example).ravel() for example in examples], np.float64)
        return columns, [str({"answer": example.answer, **example.fields}[label]) for example in examples]

    train, held_out = (table(list(scenes.examples(split))) for split in ("train", "held_out"))
    return float(KNeighborsClassifier(5).fit(*train).score(*held_out))


def overview(example: Example) -> NDArray[np.uint8]:
    """[8, 8]"""
    return overview_of(picture(example), 8, None).pixels[:, :, 0]


def digit_of_overview(example: Example) -> NDArray[np.uint8]:
    """The part of the overview that shows the digit, for a reader who knows already where it is. [4, 4]"""
    row, column = divmod(example.fields["cell"] - 1, 2)
    return overview(example)[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]


def crop(example: Example) -> NDArray[np.uint8]:
    return crop_of(picture(example), example.fields["boxes"][example.fields["cell"] - 1], None).pixels[:, :, 0]


def ink(example: Example) -> NDArray[np.int64]:
    """Of each cell. [4]"""
    return overview(example).reshape(2, 4, 2, 4).sum(axis=(1, 3), dtype=np.int64).ravel()


def test_the_digit_cannot_be_read_in_the_overview(scenes: DigitScenes) -> None:
    assert accuracy(scenes, overview, "answer") <= 0.2
    assert accuracy(scenes, digit_of_overview, "answer") <= 0.25


def test_the_digit_can_be_read_in_the_crop(scenes: DigitScenes) -> None:
    assert accuracy(scenes, crop, "answer") >= 0.95


def test_the_overview_shows_where_the_digit_is(scenes: DigitScenes) -> None:
    found = [int(np.argmax(ink(example))) + 1 == example.fields["cell"] for example in scenes.examples("held_out")]
    assert np.mean(found) >= 0.95
