"""The learning rate as a function of the step."""

from __future__ import annotations

from typing import Any

import pytest

from rllava_core.config import TrainingSection
from rllava_core.training.schedule import learning_rate


def rates(**options: Any) -> list[float]:
    training = TrainingSection(steps=10, learning_rate=1.0, **options)
    return [learning_rate(training, step) for step in range(10)]


def test_a_constant_rate_stays() -> None:
    assert rates() == [1.0] * 10


def test_a_warm_up_rises_evenly_to_the_peak() -> None:
    assert rates(warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])


def test_a_linear_rate_would_be_zero_after_the_last_step() -> None:
    assert rates(schedule="linear") == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert rates(schedule="linear", warmup_steps=5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_cosine_falls_slowly_at_both_ends() -> None:
    # (1 + cos(pi * k / 10)) / 2
    expected = [1, 0.975528, 0.904508, 0.793893, 0.654508, 0.5, 0.345492, 0.206107, 0.095492, 0.024472]
    assert rates(schedule="cosine") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_never_leaves_it(schedule: str) -> None:
    assert rates(schedule=schedule, warmup_steps=20) == pytest.approx([(step + 1) / 20 for step in range(10)])
