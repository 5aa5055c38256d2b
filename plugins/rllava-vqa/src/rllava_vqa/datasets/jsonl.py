"""Examples from a JSONL file: one object a line with image paths, a question and an answer."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rllava_core.errors import DataError
from rllava_core.mdp.examples import Example, Split
from rllava_core.mdp.images import ImageFile
from rllava_vqa.boxes import Box, BoxError, read_box
from rllava_vqa.config import JsonLinesConfig
from rllava_vqa.datasets.held_out import held_out_indices
from rllava_vqa.datasets.problems import raise_problems

Value = TypeVar("Value", bound=str | int | float)


class JsonLines:
    """One example a line of a UTF-8 file; blank lines are passed over.

    A prompt may name `{question}` and every other column of text or a number, but not the answer. Boxes, where the
    config names their column, are the field `boxes`, of whole pixels.

    Raises DataError that names file and line of the first few lines that cannot be used, and counts the others.
    """

    def __init__(self, config: JsonLinesConfig) -> None:
        self._config = config
        examples, lines = _Reader(config, Path(config.path).expanduser()).read()
        if config.held_out_path is not None:
            self._train = examples
            self._held_out, _ = _Reader(config, Path(config.held_out_path).expanduser()).read()
            return
        if len(examples) == 1 and config.held_out_fraction > 0:
            raise DataError(
                f"{config.path}: one example cannot be both trained on and held out; add more, name a held_out_path, "
                "or set held_out_fraction to 0"
            )
        held_out = held_out_indices(lines, config.held_out_fraction)
        self._train = [example for index, example in enumerate(examples) if index not in held_out]
        self._held_out = [example for index, example in enumerate(examples) if index in held_out]

    def examples(self, split: Split) -> Sequence[Example]:
        """In the order of the file. Raises DataError for the held-out examples if none were to be held out."""
        if split == "train":
            return tuple(self._train)
        if not self._held_out:
            raise DataError(
                f"{self._config.path}: nothing is held out to evaluate on; set the data set's held_out_path, or its "
                "held_out_fraction above 0"
            )
        return tuple(self._held_out)


class _LineError(Exception):
    """What is wrong with a line, without file and number."""


class _Reader:
    """Reads one file; remembers the images that it has found good and their sizes, for many lines may share one."""

    def __init__(self, config: JsonLinesConfig, path: Path) -> None:
        self._config = config
        self._path = path
        self._root = Path(config.root).expanduser() if config.root is not None else path.parent
        self._sizes: dict[Path, tuple[int, int] | None] = {}

    def read(self) -> tuple[list[Example], list[str]]:
        """The examples and, for the split, the lines they stand on."""
        examples, lines, problems = [], [], []
        for number, raw in enumerate(self._raw_lines(), start=1):
            if not raw.strip():
                continue
            name = f"{self._path}:{number}"
            try:
                line = _decode(raw)
                examples.append(self._example(name, _parse(line)))
                lines.append(line)
            except _LineError as error:
                problems.append(f"{name}: {error}")
            except DataError as error:  # an image's, which names the line already
                problems.append(str(error))
        raise_problems(problems, str(self._path))
        if not examples:
            raise DataError(f"{self._path}: no examples in it; expected one JSON object a line")
        return examples, lines

    def _raw_lines(self) -> list[bytes]:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{self._path}: no such file (from {Path.cwd()})") from None
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read ({error.strerror or error})") from None
        # Splitting bytes at \n alone: str.splitlines would also split at separators that JSON strings may hold.
        return content.removeprefix(b"\xef\xbb\xbf").split(b"\n")

    def _example(self, name: str, record: Mapping[str, Any]) -> Example:
        config = self._config
        special = {config.image, config.question, config.answer, config.choices, config.boxes}
        fields: dict[str, Any] = {
            column: _clean(column, value)
            for column, value in record.items()
            if column not in special and isinstance(value, str | int | float)
        }
        images: tuple[ImageFile, ...] = ()
        answer, choices = None, None
        if config.question is not None:
            question = _question(config.question, _column(record, config.question, "question"))
            fields |= {config.question: question, "question": question}
        if config.answer is not None:
            answer = _answer(config.answer, _column(record, config.answer, "answer"))
        if config.choices is not None:
            choices = _choices(config.choices, _column(record, config.choices, "choices"))
        if answer is not None and choices is not None and answer not in choices:
            raise _LineError(f"answer {answer!r} is not among its choices {list(choices)}, so it can never be given")
        if config.image is not None:
            images = self._images(name, config.image, _column(record, config.image, "image"))
        if config.boxes is not None and (boxes := self._boxes(config.boxes, record, images)):
            fields |= {"boxes": boxes}
        return Example(name=name, fields=fields, images=images, answer=answer, choices=choices)

    def _images(self, name: str, column: str, value: Any) -> tuple[ImageFile, ...]:
        if value is None:
            return ()
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
            raise _LineError(f"{column} is {_show(value)}, expected a path, a list of paths, or null for no image")
        return tuple(self._image(name, column, _clean(column, path)) for path in paths)

    def _boxes(self, column: str, record: Mapping[str, Any], images: Sequence[ImageFile]) -> tuple[Box, ...]:
        """Checked against the image as far as its size is known: with `verify_images`."""
        value = _column(record, column, "boxes")
        if value is None or value == []:
            return ()
        if not isinstance(value, list):
            raise _LineError(f"{column} is {_show(value)}, expected a list of [x0, y0, x1, y1], or null for no boxes")
        if len(images) != 1:
            raise _LineError(f"{column} refers to one image, the line has {len(images)}")
        boxes = []
        for index, box in enumerate(value):
            try:
                boxes.append(read_box(box, self._sizes[images[0].path]))
            except BoxError as error:
                raise _LineError(f"{column}[{index}] is {error}") from None
        return tuple(boxes)

    def _image(self, name: str, column: str, path: str) -> ImageFile:
        if "://" in path or "\0" in path:
            raise _LineError(f"{column} is {_show(path)}, expected the path of a file; nothing is downloaded")
        file = ImageFile(self._root / path, source=name)
        if file.path not in self._sizes:
            if not _is_file(file.path):
                raise _LineError(f"image {_show(path)}: no such file in {self._root} (option 'root' of the data set)")
            self._sizes[file.path] = file.load().size if self._config.verify_images else None
        return file


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, such as an image itself as text
        return False


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise _LineError(
            f"not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1}); save the file as UTF-8"
        ) from None


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _LineError(
            f"not JSON ({error.msg} at column {error.colno}); expected one whole object on each line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long to read, objects too deeply nested
        raise _LineError(f"not JSON that can be read ({error})") from None
    if not isinstance(record, dict):
        raise _LineError(f'{_show(record)} is not an object; expected one such as {{"image": …, "question": …}}')
    return record


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _column(record: Mapping[str, Any], column: str, option: str) -> Any:
    if column in record:
        return record[column]
    close = difflib.get_close_matches(column, record, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    present = ", ".join(repr(name) for name in record) or "none"
    raise _LineError(
        f"no column {column!r}; {hint}it has {present} (the data set's option {option!r} names the column)"
    )


def _question(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _LineError(f"{column} is {_show(value)}, expected text")
    return _clean(column, value)


def _answer(column: str, value: Any) -> str:
    """Text as it is, numbers as text. `true` is refused: only the user knows if it means 'true', 'True' or 'yes'."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _LineError(f"{column} is {_show(value)}, expected text or a number")
    text = str(_clean(column, value))
    if not text.strip():
        raise _LineError(f"{column} is empty; an empty answer would be rewarded for saying nothing")
    return text


def _choices(column: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _LineError(f"{column} is {_show(value)}, expected a list of possible answers")
    choices = tuple(_answer(f"{column}[{index}]", choice) for index, choice in enumerate(value))
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise _LineError(f"{column} is {_show(value)}, expected two different answers at least and none twice")
    return choices


def _clean(column: str, value: Value) -> Value:
    """The value itself, unless it is one that no tokenizer or template can take."""
    if isinstance(value, float) and not math.isfinite(value):
        raise _LineError(f"{column} is a number too large to read")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise _LineError(f"{column} is {_show(value)}, which holds half of a surrogate pair and so is not text")
    return value


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
