"""Boxes: regions of an image in pixels, [x0, y0, x1, y1], of which x1 and y1 lie just outside."""

from __future__ import annotations

import json
import math
from typing import Any, TypeAlias

from rllava_core.mdp.images import MAX_ASPECT_RATIO

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom; the pixels x0 … x1 - 1 of the rows y0 … y1 - 1."""


class BoxError(ValueError):
    """What is wrong with a box, without saying where it stands."""


def read_box(value: Any, size: tuple[int, int] | None = None) -> Box:
    """A box from four numbers; fractions of a pixel are rounded outwards, so that nothing is cut off.

    size: (width, height) of the image in pixels; None where it is not known yet. Raises BoxError for anything but four
    finite numbers with x0 < x1 and y0 < y1, for a box that is not wholly inside the image, and for one beyond 200:1,
    of which no image can be made.
    """
    if not isinstance(value, list | tuple) or len(value) != 4 or not all(_is_finite(number) for number in value):
        raise BoxError(f"{shown(value)}, expected four numbers [x0, y0, x1, y1] in pixels")
    x0, y0, x1, y1 = value
    if not (x0 < x1 and y0 < y1):
        raise BoxError(f"{shown(value)}, expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    if min(x0, y0) < 0 or (size is not None and (x1 > size[0] or y1 > size[1])):
        image = "the image" if size is None else f"the image of {size[0]}x{size[1]} pixels"
        raise BoxError(f"{shown(value)}, which is not inside {image}")
    box = (math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))
    width, height = box[2] - box[0], box[3] - box[1]
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BoxError(f"{shown(value)}, an aspect ratio beyond {MAX_ASPECT_RATIO}:1; expected a wider box")
    return box


def grid_boxes(size: tuple[int, int], columns: int, rows: int) -> tuple[Box, ...]:
    """The cells of a grid over an image of (width, height) pixels, row by row; sides differ by a pixel at most.

    Raises BoxError if the image has fewer pixels a side than the grid has cells.
    """
    width, height = size
    if width < columns or height < rows:
        raise BoxError(f"an image of {width}x{height} pixels cannot be cut into {columns}x{rows} cells")
    across = [width * column // columns for column in range(columns + 1)]
    down = [height * row // rows for row in range(rows + 1)]
    return tuple(
        read_box((across[column], down[row], across[column + 1], down[row + 1]))
        for row in range(rows)
        for column in range(columns)
    )


def shown(value: Any) -> str:
    """A value as messages show it, like the JSON it may have come from."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:59] + "…"


def _is_finite(number: Any) -> bool:
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return isinstance(number, int) or math.isfinite(number)
