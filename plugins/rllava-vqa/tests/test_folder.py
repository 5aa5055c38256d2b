"""Folders of classes: what is read, how it is split, and what is refused by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from rllava_core.errors import DataError
from rllava_core.mdp.images import ImageFile
from rllava_vqa.config import ClassFolderConfig
from rllava_vqa.datasets.folder import ClassFolder


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (8, 8), "green").save(path)
    return path


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    for name, count in (("dog", 20), ("cat", 10), ("axolotl", 2)):
        for index in range(count):
            picture(tmp_path / "animals" / name / f"{index:02}.png")
    return tmp_path / "animals"


def dataset(path: Path, **options: Any) -> ClassFolder:
    return ClassFolder(ClassFolderConfig(path=str(path), **options))


def error(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        dataset(path, **options)
    return str(caught.value)


def test_a_file_is_an_example_and_its_folder_the_answer(animals: Path) -> None:
    examples = dataset(animals, held_out_fraction=0, question="Which animal?").examples("train")
    assert len(examples) == 32
    first = examples[0]
    assert first.name == "axolotl/00.png"
    assert first.answer == "axolotl"
    assert first.fields == {"question": "Which animal?"}
    assert first.images == (ImageFile(animals / "axolotl" / "00.png"),)
    assert first.choices is None
    assert [example.name for example in examples] == sorted(example.name for example in examples)


def test_every_class_contributes_to_both_splits_always_the_same(animals: Path) -> None:
    one, other = dataset(animals), dataset(animals)
    assert Counter(example.answer for example in one.examples("held_out")) == {"dog": 2, "cat": 1, "axolotl": 1}
    assert Counter(example.answer for example in one.examples("train")) == {"dog": 18, "cat": 9, "axolotl": 1}
    names = {example.name for split in ("train", "held_out") for example in one.examples(split)}
    assert len(names) == 32
    assert [e.name for e in one.examples("held_out")] == [e.name for e in other.examples("held_out")]


def test_a_file_that_is_added_moves_no_other_into_the_held_out_ones(animals: Path) -> None:
    def held_out() -> set[str]:
        return {example.name for example in dataset(animals).examples("held_out") if example.answer == "dog"}

    before = held_out()
    picture(animals / "dog" / "000.png")  # sorts before all the others
    assert held_out() <= before | {"dog/000.png"}


def test_with_nothing_held_out_evaluation_says_what_to_set(animals: Path) -> None:
    with pytest.raises(DataError, match="nothing is held out to evaluate on; set the data set's held_out_fraction"):
        dataset(animals, held_out_fraction=0).examples("held_out")


def test_the_classes_can_be_the_choices(animals: Path) -> None:
    for example in dataset(animals, classes_as_choices=True).examples("held_out"):
        assert example.choices == ("axolotl", "cat", "dog")


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "bmp", "tif", "TIFF", "gif"])
def test_the_usual_formats_are_images(tmp_path: Path, suffix: str) -> None:
    picture(tmp_path / "green" / f"a.{suffix}")
    (example,) = dataset(tmp_path, held_out_fraction=0).examples("train")
    assert example.images[0].load().size == (8, 8)


def test_hidden_files_and_folders_are_passed_over(animals: Path) -> None:
    (animals / ".DS_Store").write_text("")
    (animals / "cat" / ".thumbnail").write_text("")
    (animals / ".cache").mkdir()
    assert len(dataset(animals, held_out_fraction=0).examples("train")) == 32


def test_a_missing_folder_a_file_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    assert error(tmp_path / "absent").startswith(f"{tmp_path / 'absent'}: no such folder")
    file = picture(tmp_path / "a.png")
    assert "not a folder" in error(file)
    assert "no sub-folders; put the images of each answer into a sub-folder" in error(tmp_path)


def test_a_class_without_images_is_named(animals: Path) -> None:
    (animals / "yeti").mkdir()
    assert error(animals) == f"{animals / 'yeti'}: no image in this sub-folder; add some or remove it"


def test_a_class_of_one_image_cannot_be_split(animals: Path) -> None:
    picture(animals / "yeti" / "only.png")
    assert f"{animals / 'yeti'}: one image cannot be both trained on and held out" in error(animals)
    assert len(dataset(animals, held_out_fraction=0).examples("train")) == 33


def test_what_is_no_image_is_named(animals: Path) -> None:
    (animals / "cat" / "notes.txt").write_text("miaow")
    assert error(animals).startswith(f"{animals / 'cat' / 'notes.txt'}: not an image; remove it")


def test_an_image_outside_the_classes_is_named(animals: Path) -> None:
    picture(animals / "stray.png")
    assert error(animals).startswith(f"{animals / 'stray.png'}: not in a sub-folder")


def test_a_folder_inside_a_class_is_named(animals: Path) -> None:
    picture(animals / "cat" / "more" / "a.png")
    assert f"{animals / 'cat' / 'more'}: a folder inside the sub-folder of an answer" in error(animals)


def test_a_damaged_image_stops_the_run_before_it_begins(animals: Path) -> None:
    (animals / "cat" / "bad.jpg").write_text("no picture")
    assert error(animals) == f"image {animals / 'cat' / 'bad.jpg'}: not an image that Pillow can read"
    assert len(dataset(animals, verify_images=False, held_out_fraction=0).examples("train")) == 33


def test_problems_are_told_together(animals: Path) -> None:
    for index in range(7):
        (animals / "cat" / f"{index}.txt").write_text("")
    lines = error(animals).splitlines()
    assert lines[0] == f"{animals} has 7 problems:"
    assert len(lines) == 7
    assert lines[-1] == "  and 2 more"


def test_one_class_leaves_nothing_to_choose_from(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "cat" / "b.png")
    assert "needs two at least" in error(tmp_path, classes_as_choices=True)
