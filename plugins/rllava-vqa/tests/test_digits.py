"""The digits that come with scikit-learn."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

from rllava_core.errors import DataError
from rllava_core.mdp.images import Image
from rllava_vqa.config import DigitsConfig
from rllava_vqa.datasets.digits import Digits


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits(DigitsConfig())


def test_every_fifth_scan_is_held_out(digits: Digits) -> None:
    train, held_out = digits.examples("train"), digits.examples("held_out")
    assert (len(train), len(held_out)) == (1437, 360)
    assert [example.name for example in held_out[:3]] == ["digits:0", "digits:5", "digits:10"]
    assert [example.name for example in train[:5]] == ["digits:1", "digits:2", "digits:3", "digits:4", "digits:6"]
    assert len({example.name for example in [*train, *held_out]}) == 1797


def test_both_splits_hold_every_digit(digits: Digits) -> None:
    for split in ("train", "held_out"):
        counts = Counter(example.answer for example in digits.examples(split))
        assert sorted(counts) == [str(digit) for digit in range(10)]
        assert min(counts.values()) > 0.07 * sum(counts.values())


def test_an_example_is_a_scan_a_question_and_its_digit(digits: Digits) -> None:
    from sklearn.datasets import load_digits

    scans = load_digits()
    example = digits.examples("held_out")[7]
    assert example.name == "digits:35"
    assert example.fields == {"question": "Which digit?"}
    assert example.answer == str(scans.target[35])
    assert example.choices is None
    (image,) = example.images
    assert isinstance(image, Image)
    assert image.size == (8, 8)
    for channel in range(3):
        np.testing.assert_array_equal(image.pixels[:, :, channel], np.round(scans.images[35] * 255 / 16))
    assert image.pixels.max() == 255


def test_the_question_can_be_another() -> None:
    example = Digits(DigitsConfig(question="Read the number.")).examples("train")[0]
    assert example.fields["question"] == "Read the number."


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        Digits(DigitsConfig())
