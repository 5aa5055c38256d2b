"""Scenes with one handwritten digit each, which is lost in an overview: a task for looking twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rllava_core.mdp.examples import Example, Split
from rllava_core.mdp.images import Image
from rllava_vqa.boxes import Box
from rllava_vqa.config import DigitScenesConfig, DigitsConfig
from rllava_vqa.datasets.digits import Digits

COLUMNS = ROWS = 2
SCAN = 8
"""Pixels a side of a scan."""

SCALE = 2
"""Pixels of the scene for one of a scan."""

CELL = 48
"""Pixels a side of a cell. The digit of 16 lies anywhere in it, so that what little an overview keeps of its shape
depends more on where it lies than on what it is."""

STROKE_LENGTHS = (1.0, 3.0)
"""Of the strokes that are no digit, in pixels of a scan: less ink than a digit, and as bright."""


class DigitScenes:
    """A dark scene of 96×96 pixels in 2×2 cells. One holds a scan of `digits`, others a stroke; where, says no field.

    An example has the fields `question`; `boxes`, of 16×16 pixels around what each cell holds, row by row; and `cell`,
    the number of the box with the digit from 1, for tests and analyses. The answer is the digit. One scene a scan, and
    the split of `digits`: no held-out scan is seen in training. The same scenes in every run.

    Close-ups, if the config asks for them, are examples to train on that show a scan alone. They are read at a glance,
    so a policy that has yet to learn to look can learn to read; none is held out.

    Raises DataError if scikit-learn cannot be imported.
    """

    def __init__(self, config: DigitScenesConfig) -> None:
        self._config = config
        digits = Digits(DigitsConfig(question=config.question))
        train, held_out = digits.examples("train"), digits.examples("held_out")
        shown_alone = train[: round(config.close_ups * len(train))]
        self._examples: dict[Split, tuple[Example, ...]] = {
            "train": (*map(self._scene, train), *map(_close_up, shown_alone)),
            "held_out": tuple(map(self._scene, held_out)),
        }

    def examples(self, split: Split) -> Sequence[Example]:
        """360 scenes of held-out scans; or 1,437 of the others, and the close-ups."""
        return self._examples[split]

    def _scene(self, digit: Example) -> Example:
        name = digit.name.replace("digits:", "digit_scenes:")
        random = np.random.default_rng(int(digit.name.partition(":")[2]))
        cells = random.permutation(ROWS * COLUMNS)
        boxes = [_box(cell, random) for cell in range(ROWS * COLUMNS)]
        pixels = np.zeros((CELL * ROWS, CELL * COLUMNS), np.uint8)
        _draw(pixels, boxes[cells[0]], digit.images[0].load().pixels[:, :, 0])
        for cell in cells[1 : 1 + self._config.distractors]:
            _draw(pixels, boxes[cell], _stroke(random))
        fields = {**digit.fields, "boxes": tuple(boxes), "cell": int(cells[0]) + 1}
        return Example(name, fields, (Image.from_array(pixels, name),), digit.answer)


def _close_up(digit: Example) -> Example:
    name = digit.name.replace("digits:", "digit_scenes:") + ":close-up"
    return Example(name, digit.fields, digit.images, digit.answer)


def _box(cell: int, random: np.random.Generator) -> Box:
    row, column = divmod(cell, COLUMNS)
    side = SCAN * SCALE
    left, top = (int(start + random.integers(CELL - side + 1)) for start in (column * CELL, row * CELL))
    return left, top, left + side, top + side


def _draw(scene: NDArray[np.uint8], box: Box, scan: NDArray[np.uint8]) -> None:
    """Enlarge a scan, [8, 8], into a box of the scene."""
    x0, y0, x1, y1 = box
    scene[y0:y1, x0:x1] = np.kron(scan, np.ones((SCALE, SCALE), np.uint8))


def _stroke(random: np.random.Generator) -> NDArray[np.uint8]:
    """A straight stroke of the pen across the middle, at any angle. [8, 8] uint8"""
    length, angle = random.uniform(*STROKE_LENGTHS), random.uniform(0, np.pi)
    direction = np.array([np.cos(angle), np.sin(angle)])
    place = np.indices((SCAN, SCAN)).transpose(1, 2, 0) - (SCAN - 1) / 2  # [8, 8, 2], from the middle
    along = np.clip(place @ direction, -length / 2, length / 2)
    distance = np.linalg.norm(place - along[:, :, None] * direction, axis=-1)
    brightness: NDArray[np.uint8] = np.round(255 * np.clip(1.5 - distance, 0, 1)).astype(np.uint8)
    return brightness
