"""What values hold, compared in depth, and what makes a text or a set of choices unusable: shared by the suites."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from rllava_core.mdp.images import Image


def content(value: Any) -> Any:
    """The value as nested tuples that later changes of it do not reach; equal contents compare equal.

    Pictures count by their pixels, whatever their digest says: it is computed once, and pixels may change after that.
    Of two objects that cannot be compared, only the types do.
    """
    if isinstance(value, Image):
        return ("Image", value.pixels.shape, hashlib.sha256(value.pixels.tobytes()).hexdigest())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = (content(getattr(value, field.name)) for field in dataclasses.fields(value))
        return (type(value).__qualname__, *parts)
    if isinstance(value, Mapping):
        return ("mapping", frozenset((content(key), content(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(content(item) for item in value)
    if isinstance(value, set | frozenset):
        return frozenset(content(item) for item in value)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        return ("array", array.shape, array.tobytes()) if array.ndim else array.item()
    if isinstance(value, float) and math.isnan(value):
        return "nan"  # which equals itself
    return value if _compares(value) else type(value).__qualname__


def digest(value: Any) -> str:
    """A hash of the value's content that is the same in every process: sets have no order in it."""

    def canonical(part: Any) -> str:
        if isinstance(part, tuple):
            return f"({','.join(map(canonical, part))})"
        if isinstance(part, frozenset):
            return f"{{{','.join(sorted(map(canonical, part)))}}}"
        return repr(part)

    return hashlib.sha256(canonical(content(value)).encode(errors="backslashreplace")).hexdigest()


def text_problem(text: Any) -> str | None:
    """Why no tokenizer could take this as text; None if one can."""
    if not isinstance(text, str):
        return f"is {shortened(text)}, not a str"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"is {shortened(text)}, which holds half of a surrogate pair and so is not text"
    return None


def image_problem(image: Any) -> str | None:
    """Why no model could be shown this as a picture; None if it can."""
    made = "which Image.from_array and Image.from_pil make"
    if not isinstance(image, Image):
        return f"is {shortened(image)}; expected an rllava_core.mdp.images.Image, {made}"
    pixels = image.pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        return f"has pixels of {pixels.dtype} {pixels.shape}; expected uint8 [height, width, 3], {made}"
    return None


def choices_problem(choices: Any) -> str | None:
    """Why this cannot be a discrete action set; None if it can."""
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        return f"are {shortened(choices)}; expected a tuple of texts, or None for free text"
    for choice in choices:
        if problem := text_problem(choice):
            return f"are {shortened(choices)}; one of them {problem}"
    if len(choices) < 2 or len(set(choices)) < len(choices) or "" in choices:
        return f"are {shortened(choices)}; expected at least two different, non-empty texts"
    return None


def shortened(value: Any) -> str:
    """A value as messages show it, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _compares(value: Any) -> bool:
    return isinstance(value, Hashable) and type(value).__hash__ is not object.__hash__
