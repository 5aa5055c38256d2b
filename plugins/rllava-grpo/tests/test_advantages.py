"""Advantages: worked numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rllava_core.algorithms.policy_gradient import Rollouts
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Trajectory, conversation
from rllava_grpo.algorithm import GRPO
from rllava_grpo.config import GRPOConfig


def advantages(returns: list[float], groups: list[int], **options: Any) -> list[float]:
    """Of trajectories with these returns."""
    action = ActionSegment((1, 2), np.full(2, -1, np.float32), "")
    turns = conversation([ContextSegment((1,)), action], [0.25])
    trajectories = [
        Trajectory(None, 0, group, turns, True, score=value - 0.25)
        for value, group in zip(returns, groups, strict=True)
    ]
    found: torch.Tensor = GRPO(GRPOConfig(**options)).advantages(Rollouts.of(trajectories))
    return found.tolist()


def test_half_of_a_group_is_right() -> None:
    """Mean 1/2; the sample deviation of 1, 0, 0, 1 is √(1/3) = 0.57735; 0.5 / 0.57745 = 0.86588."""
    found = advantages([1, 0, 0, 1], [0, 0, 0, 0], epsilon=1e-4)
    assert found == pytest.approx([0.86588, -0.86588, -0.86588, 0.86588], abs=1e-5)


def test_one_of_a_group_is_right() -> None:
    """Mean 1/4, deviation 1/2: 0.75 / 0.5 and −0.25 / 0.5."""
    assert advantages([0, 0, 1, 0], [0] * 4, epsilon=1e-9) == pytest.approx([-0.5, -0.5, 1.5, -0.5])


def test_returns_of_two_are_one_deviation_of_root_two_apart() -> None:
    assert advantages([3, 1], [0, 0], epsilon=1e-9) == pytest.approx([2**-0.5, -(2**-0.5)])


def test_each_group_has_its_own_mean_and_deviation() -> None:
    found = advantages([1, 0, 10, 30, 0, 1], [0, 0, 7, 7, 3, 3], epsilon=1e-9)
    assert found == pytest.approx([2**-0.5, -(2**-0.5), -(2**-0.5), 2**-0.5, -(2**-0.5), 2**-0.5])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_a_group_of_equal_returns_teaches_nothing(scale: str, value: float) -> None:
    assert advantages([value] * 8, [0] * 8, scale=scale) == pytest.approx([0.0] * 8, abs=1e-3)


def test_the_scale_of_the_batch_is_the_deviation_of_all_centred_returns() -> None:
    """Centred ½, −½, 2, −2: deviation √(8.5 / 3) = 1.68325."""
    found = advantages([1, 0, 5, 1], [0, 0, 1, 1], scale="batch", epsilon=1e-9)
    assert found == pytest.approx([0.29704, -0.29704, 1.18818, -1.18818], abs=1e-5)


def test_without_a_scale_returns_are_only_centred() -> None:
    assert advantages([1, 0, 5, 1], [0, 0, 1, 1], scale="none") == pytest.approx([0.5, -0.5, 2, -2])


def test_epsilon_is_added_to_the_deviation() -> None:
    assert advantages([0, 0, 1, 0], [0] * 4, epsilon=0.5) == pytest.approx([-0.25, -0.25, 0.75, -0.25])
