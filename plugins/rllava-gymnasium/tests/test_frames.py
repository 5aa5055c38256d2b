"""Frames as images: sizes, copies, and renderings that are no frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rllava_core.errors import ConfigError
from rllava_gymnasium.environment import Gymnasium
from rllava_gymnasium.frames import image_of

CHECKS = np.kron([[0, 200], [200, 0]], np.ones((4, 4))).astype(np.uint8)[:, :, None].repeat(3, axis=2)  # [8, 8, 3]


def test_a_frame_stays_as_it_was_rendered() -> None:
    frame = CHECKS.copy()
    image = image_of(frame, (8, 8), "here")
    frame[:] = 7
    assert np.array_equal(image.pixels, CHECKS)
    assert image.source == "here"


def test_a_smaller_frame_holds_the_means_of_areas() -> None:
    assert np.array_equal(image_of(CHECKS, (2, 2), "").pixels[:, :, 0], [[0, 200], [200, 0]])
    assert np.array_equal(image_of(CHECKS, (1, 2), "").pixels[:, :, 0], [[100], [100]])


def test_a_larger_frame_has_hard_edges() -> None:
    image = image_of(CHECKS, (16, 24), "")
    assert image.size == (16, 24)
    assert np.array_equal(image.pixels, CHECKS.repeat(3, axis=0).repeat(2, axis=1))


def test_a_frame_may_be_a_view() -> None:
    flipped = CHECKS[:, ::-1]
    assert np.array_equal(image_of(flipped, None, "").pixels, flipped)
    assert image_of(flipped, (4, 4), "").pixels[0, 0, 0] == 200


@pytest.mark.parametrize(
    ("rendered", "message"),
    [
        (None, r"rendered nothing \(None\)"),
        ([CHECKS], "rendered a list of 1 frames"),
        ("ansi", "rendered a str"),
        (CHECKS / 255, r"rendered float64 \[8, 8, 3\]"),
        (CHECKS[:, :, 0], r"rendered uint8 \[8, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"rendered uint8 \[8, 8, 4\]"),
        (np.zeros((0, 8, 3), np.uint8), r"rendered uint8 \[0, 8, 3\]"),
    ],
    ids=["none", "list", "text", "floats", "grey", "alpha", "empty"],
)
def test_anything_else_is_refused_before_the_run(
    rendered: Any, message: str, make: Callable[..., Gymnasium], dial: Callable[..., str]
) -> None:
    with pytest.raises(ConfigError, match=rf"task\.environment: Dial.*{message}; expected an array of uint8 \[height"):
        make(dial(frame=rendered))
