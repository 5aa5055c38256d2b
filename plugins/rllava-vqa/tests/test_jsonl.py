"""JSONL files: what is read, and what a message says of a line that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pydantic import ValidationError

from rllava_core.errors import DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import ImageFile
from rllava_vqa.config import JsonLinesConfig
from rllava_vqa.datasets.jsonl import JsonLines

GOOD = {"image": "a.png", "question": "What?", "answer": "cat"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(("a", "b", "c")):
        PIL.Image.fromarray(np.full((8, 8, 3), 40 * index, np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, *records: Any, name: str = "train.jsonl") -> Path:
    """Write records, or lines as they are if they are strings."""
    path = folder / name
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> list[Example]:
    options.setdefault("held_out_fraction", 0)
    return list(JsonLines(JsonLinesConfig(path=str(path), **options)).examples("train"))


def record(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (GOOD | changes).items() if value is not ...}


def error(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


# What is read


def test_a_line_is_an_example(folder: Path) -> None:
    path = write(folder, GOOD, record(image="b.png", answer="dog"))
    first, second = read(path)
    assert first.name == f"{path}:1"
    assert first.fields == {"question": "What?"}
    assert first.answer == "cat"
    assert first.choices is None
    assert second.images == (ImageFile(folder / "b.png", source=f"{path}:2"),)
    assert second.images[0].load().pixels[0, 0, 0] == 40


def test_columns_have_the_names_the_config_gives(folder: Path) -> None:
    path = write(folder, {"picture": "a.png", "problem": "What?", "label": 7, "options": ["7", 8], "question": "no"})
    (example,) = read(path, image="picture", question="problem", answer="label", choices="options")
    assert example.fields == {"question": "What?", "problem": "What?"}, "{question} is the column that was named"
    assert example.answer == "7"
    assert example.choices == ("7", "8")


def test_a_prompt_may_name_other_columns_of_one_value_but_not_the_answer(folder: Path) -> None:
    path = write(folder, record(hint="It purrs.", year=1999, weight=4.5, tame=True, tags=["x"], box={}, note=None))
    assert read(path)[0].fields == {"question": "What?", "hint": "It purrs.", "year": 1999, "weight": 4.5, "tame": True}


@pytest.mark.parametrize(("image", "names"), [("a.png", ["a"]), (["b.png", "a.png"], ["b", "a"]), (None, []), ([], [])])
def test_an_example_has_one_image_or_several_or_none(folder: Path, image: Any, names: list[str]) -> None:
    (example,) = read(write(folder, record(image=image)))
    assert [source.path.stem for source in example.images if isinstance(source, ImageFile)] == names


def test_columns_can_be_declared_absent(folder: Path) -> None:
    (example,) = read(write(folder, {"topic": "cats"}), image=None, question=None, answer=None)
    assert (example.fields, example.images, example.answer) == ({"topic": "cats"}, (), None)


@pytest.mark.parametrize(
    ("answer", "text"), [(42, "42"), (1.5, "1.5"), (-3, "-3"), (0, "0"), ("042", "042"), (" cat ", " cat "), ("é", "é")]
)
def test_numbers_become_text_and_text_stays(folder: Path, answer: Any, text: str) -> None:
    assert read(write(folder, record(answer=answer)))[0].answer == text


def test_blank_lines_are_passed_over_and_counted(folder: Path) -> None:
    path = write(folder, "", GOOD, "   ", GOOD, "")
    assert [example.name for example in read(path)] == [f"{path}:2", f"{path}:4"]


def test_byte_order_mark_and_windows_line_ends_are_read(folder: Path) -> None:
    path = folder / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode())
    assert len(read(path)) == 2


def test_separators_inside_text_do_not_end_a_line(folder: Path) -> None:
    path = write(folder, json.dumps(record(question="one\u2028two\u0085three"), ensure_ascii=False))
    assert read(path)[0].fields["question"] == "one\u2028two\u0085three"


def test_image_paths_start_at_the_file_or_at_the_root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = write(tmp_path_factory.mktemp("lists"), GOOD)
    assert read(elsewhere, root=str(folder))[0].images[0].load().size == (8, 8)
    assert "no such file" in error(elsewhere)
    absolute = write(folder, record(image=str(folder / "c.png")), name="absolute.jsonl")
    assert read(absolute, root="nowhere")[0].images[0].load().pixels[0, 0, 0] == 80


def test_the_path_starts_at_the_current_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, GOOD)
    monkeypatch.chdir(folder)
    assert read(Path("train.jsonl"))[0].name == "train.jsonl:1"


# The split


def many(folder: Path, count: int = 100) -> Path:
    return write(folder, *(record(question=f"What is {index}?") for index in range(count)))


def names(examples: Any) -> list[str]:
    return [example.name for example in examples]


def test_a_tenth_is_held_out_always_the_same(folder: Path) -> None:
    path = many(folder)
    one, other = (JsonLines(JsonLinesConfig(path=str(path))) for _ in range(2))
    held_out, train = names(one.examples("held_out")), names(one.examples("train"))
    assert len(held_out) == 10
    assert sorted([*held_out, *train]) == sorted(f"{path}:{line}" for line in range(1, 101))
    assert names(other.examples("held_out")) == held_out
    assert names(other.examples("train")) == train


def test_what_is_held_out_depends_on_the_lines_and_not_on_their_order(folder: Path) -> None:
    path = many(folder)
    held_out = {
        example.fields["question"] for example in JsonLines(JsonLinesConfig(path=str(path))).examples("held_out")
    }
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    again = {example.fields["question"] for example in JsonLines(JsonLinesConfig(path=str(path))).examples("held_out")}
    assert again == held_out


def test_examples_stay_in_the_order_of_the_file(folder: Path) -> None:
    dataset = JsonLines(JsonLinesConfig(path=str(many(folder))))
    for split in ("train", "held_out"):
        lines = [int(name.rpartition(":")[2]) for name in names(dataset.examples(split))]
        assert lines == sorted(lines)


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.5, 5), (3, 0.4, 1)])
def test_both_splits_get_an_example(folder: Path, count: int, fraction: float, held_out: int) -> None:
    dataset = JsonLines(JsonLinesConfig(path=str(many(folder, count)), held_out_fraction=fraction))
    assert len(dataset.examples("held_out")) == held_out
    assert len(dataset.examples("train")) == count - held_out


def test_one_example_cannot_be_split(folder: Path) -> None:
    assert "one example cannot be both trained on and held out" in error(many(folder, 1), held_out_fraction=0.1)


def test_held_out_examples_can_come_from_a_file_of_their_own(folder: Path) -> None:
    train = many(folder, 5)
    test = write(folder, record(answer="dog"), name="test.jsonl")
    dataset = JsonLines(JsonLinesConfig(path=str(train), held_out_path=str(test)))
    assert len(dataset.examples("train")) == 5
    assert names(dataset.examples("held_out")) == [f"{test}:1"]


def test_the_held_out_file_is_checked_as_well(folder: Path) -> None:
    train = many(folder, 5)
    test = write(folder, "{", name="test.jsonl")
    assert f"{test}:1: not JSON" in error(train, held_out_path=str(test))


def test_with_nothing_held_out_evaluation_says_what_to_set(folder: Path) -> None:
    dataset = JsonLines(JsonLinesConfig(path=str(many(folder, 3)), held_out_fraction=0))
    assert len(dataset.examples("train")) == 3
    with pytest.raises(DataError, match="nothing is held out to evaluate on; set the data set's held_out_path"):
        dataset.examples("held_out")


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_is_a_fraction(fraction: float) -> None:
    with pytest.raises(ValidationError):
        JsonLinesConfig(path="train.jsonl", held_out_fraction=fraction)


# Boxes


def test_boxes_are_read_from_their_column_in_whole_pixels(folder: Path) -> None:
    path = write(folder, record(regions=[[0, 0, 4, 4], [1.5, 2.0, 6.1, 8]]), record(regions=None), record(regions=[]))
    first, *others = read(path, boxes="regions")
    assert first.fields == {"question": "What?", "boxes": ((0, 0, 4, 4), (1, 2, 7, 8))}
    assert [example.fields for example in others] == [{"question": "What?"}] * 2


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 4, 9]], "regions[0] is [0, 0, 4, 9], which is not inside the image of 8x8 pixels"),
        ([[0, 0, 4, 4], [-1, 0, 4, 4]], "regions[1] is [-1, 0, 4, 4], which is not inside the image of 8x8 pixels"),
        ([[4, 0, 4, 4]], "regions[0] is [4, 0, 4, 4], expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1"),
        ([[0, 4, 4, 0]], "regions[0] is [0, 4, 4, 0], expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1"),
        ([[0, 0, 4]], "regions[0] is [0, 0, 4], expected four numbers [x0, y0, x1, y1] in pixels"),
        ([[0, 0, 4, "4"]], 'regions[0] is [0, 0, 4, "4"], expected four numbers'),
        ([[0, 0, 4, True]], "regions[0] is [0, 0, 4, true], expected four numbers"),
        ([0, 0, 4, 4], "regions[0] is 0, expected four numbers"),
        ("0 0 4 4", 'regions is "0 0 4 4", expected a list of [x0, y0, x1, y1], or null for no boxes'),
        ({"x0": 1}, 'regions is {"x0": 1}, expected a list'),
        (..., "no column 'regions'"),
    ],
)
def test_bad_boxes_are_named_with_file_and_line(folder: Path, boxes: Any, message: str) -> None:
    path = write(folder, record(regions=None), record(regions=boxes))
    assert error(path, boxes="regions").startswith(f"{path}:2: {message}")


@pytest.mark.parametrize(("image", "count"), [(["a.png", "b.png"], 2), (None, 0)])
def test_boxes_refer_to_one_image(folder: Path, image: Any, count: int) -> None:
    path = write(folder, record(image=image, regions=[[0, 0, 4, 4]]))
    assert error(path, boxes="regions") == f"{path}:1: regions refers to one image, the line has {count}"


def test_without_looking_at_images_boxes_are_not_compared_with_them(folder: Path) -> None:
    path = write(folder, record(regions=[[0, 0, 99, 99]]))
    assert read(path, boxes="regions", verify_images=False)[0].fields["boxes"] == ((0, 0, 99, 99),)
    inverted = write(folder, record(regions=[[9, 0, 0, 99]]), name="inverted.jsonl")
    assert "with x0 < x1" in error(inverted, boxes="regions", verify_images=False)


# What is refused


def test_a_missing_file_is_named(folder: Path) -> None:
    assert error(folder / "absent.jsonl").startswith(f"{folder / 'absent.jsonl'}: no such file")
    assert "cannot be read" in error(folder)


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_a_file_without_examples_is_refused(folder: Path, lines: list[str]) -> None:
    assert "no examples in it" in error(write(folder, *lines))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'image': 'a.png'}", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[", "not JSON"),
        ('[{"image": "a.png"}]', "is not an object; expected one such as"),
        ('"text"', '"text" is not an object'),
        ("null", "null is not an object"),
        ('{"answer": NaN}', "NaN is not a JSON number"),
        ('{"answer": ' + "9" * 5000 + "}", "not JSON that can be read"),
        ("[" * 200_000, "not JSON that can be read"),
    ],
)
def test_what_is_no_json_object_is_refused(folder: Path, line: str, message: str) -> None:
    text = error(write(folder, GOOD, line))
    assert text.startswith(f"{folder / 'train.jsonl'}:2: ")
    assert message in text


def test_what_is_not_utf8_is_refused(folder: Path) -> None:
    path = folder / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + '{"question": "é"}'.encode("latin-1"))
    assert error(path) == f"{path}:2: not UTF-8 (byte 0xe9 at position 15); save the file as UTF-8"


@pytest.mark.parametrize("column", ["image", "question", "answer"])
def test_a_missing_column_is_named_with_those_that_are_there(folder: Path, column: str) -> None:
    text = error(write(folder, GOOD, record(**{column: ..., "topic": "cats"})))
    present = ", ".join(repr(name) for name in [*(name for name in GOOD if name != column), "topic"])
    assert f"train.jsonl:2: no column {column!r}; it has {present} " in text


def test_a_column_of_a_similar_name_is_suggested(folder: Path) -> None:
    assert "no column 'image'; did you mean 'images'? it has" in error(write(folder, record(image=..., images="a.png")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": 3}, "image is 3, expected a path, a list of paths, or null for no image"),
        ({"image": ""}, 'image is "", expected a path'),
        ({"image": ["a.png", None]}, 'image is ["a.png", null], expected a path'),
        ({"image": {"bytes": "AAAA"}}, "expected a path"),
        ({"image": "https://example.org/a.png"}, "nothing is downloaded"),
        ({"image": "a\0.png"}, "expected the path of a file"),
        ({"image": "x" * 5000}, "no such file"),
        ({"image": "."}, "no such file"),
        ({"question": None}, "question is null, expected text"),
        ({"question": 7}, "question is 7, expected text"),
        ({"question": "\ud800"}, "half of a surrogate pair"),
        ({"answer": True}, "answer is true, expected text or a number"),
        ({"answer": None}, "answer is null, expected text or a number"),
        ({"answer": ["cat"]}, 'answer is ["cat"], expected text or a number'),
        ({"answer": " "}, "answer is empty"),
        ({"hint": "\udfff"}, "hint is"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    text = error(write(folder, GOOD, GOOD, record(**changes)))
    assert text.startswith(f"{folder / 'train.jsonl'}:3: ")
    assert message in text
    assert len(text) < 500


def test_a_number_beyond_range_is_refused(folder: Path) -> None:
    line = '{"image": null, "question": "?", "answer": 1e999}'
    assert "answer is a number too large to read" in error(write(folder, line))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("cat, dog", "expected a list of possible answers"),
        (["cat"], "expected two different answers at least"),
        (["cat", "cat"], "none twice"),
        (["cat", None], "choices[1] is null, expected text or a number"),
        (["dog", "cow"], "answer 'cat' is not among its choices ['dog', 'cow']"),
        (..., "no column 'choices'"),
    ],
)
def test_choices_that_leave_no_right_choice_are_refused(folder: Path, choices: Any, message: str) -> None:
    assert message in error(write(folder, record(choices=choices)), choices="choices")


def test_a_missing_image_is_named_with_its_line(folder: Path) -> None:
    text = error(write(folder, GOOD, record(image="absent.png")))
    assert text.startswith(f'{folder / "train.jsonl"}:2: image "absent.png": no such file in {folder}')


def test_a_damaged_image_stops_the_run_before_it_begins(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    PIL.Image.fromarray(noise).save(folder / "bad.png")
    (folder / "bad.png").write_bytes((folder / "bad.png").read_bytes()[:1000])
    path = write(folder, GOOD, record(image=["a.png", "bad.png"]))
    assert f"{path}:2: image {folder / 'bad.png'}: truncated or damaged" in error(path)
    unverified = read(path, verify_images=False)
    assert len(unverified) == 2
    with pytest.raises(DataError, match=r"train\.jsonl:2: image .*bad\.png"):
        unverified[1].images[1].load()


def test_an_image_that_many_lines_share_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = ImageFile.load
    monkeypatch.setattr(ImageFile, "load", lambda self: (loaded.append(self.path.name), load(self))[1])
    read(write(folder, *[GOOD] * 5, record(image="b.png")))
    assert loaded == ["a.png", "b.png"]


def test_the_first_five_bad_lines_are_told_and_the_others_counted(folder: Path) -> None:
    path = write(folder, GOOD, *["oops"] * 8)
    lines = error(path).splitlines()
    assert lines[0] == f"{path} has 8 problems:"
    assert [line.strip().partition(": ")[0] for line in lines[1:6]] == [f"{path}:{number}" for number in range(2, 7)]
    assert lines[6:] == ["  and 3 more"]


def test_a_misspelt_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        JsonLinesConfig.model_validate({"path": "train.jsonl", "images": "image"})
