"""The shared maths against plain Python in float64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rllava_core.algorithms.maths import (
    aggregation_weights,
    clipped,
    counted,
    group_mean,
    group_std,
    kl_estimate,
    sums,
    truncated_importance,
)

EXACT = {"rtol": 0.0, "atol": 1e-12}
VALUES = [1.0, 0.0, 0.5, -3.0, 2.5, 2.5, 0.1, 7.0]
GROUPS = [4, 4, 9, 4, 9, 0, 9, 9]  # any labels, in any order, of any size


def test_means_and_deviations_are_those_of_each_group() -> None:
    values, group = torch.tensor(VALUES, dtype=torch.float64), torch.tensor(GROUPS)
    members = {label: [v for v, g in zip(VALUES, GROUPS, strict=True) if g == label] for label in set(GROUPS)}
    means = [statistics.fmean(members[label]) for label in GROUPS]
    deviations = [statistics.stdev(members[label]) if len(members[label]) > 1 else 0.0 for label in GROUPS]

    torch.testing.assert_close(group_mean(values, group), torch.tensor(means, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(group_std(values, group), torch.tensor(deviations, dtype=torch.float64), **EXACT)


def test_a_group_of_equal_returns_has_a_deviation_of_almost_nothing() -> None:
    values, group = torch.full((8,), 0.1), torch.zeros(8, dtype=torch.long)
    assert group_std(values, group).max() < 1e-6
    assert (values - group_mean(values, group)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        ("k1", lambda p, q: p - q),
        ("k2", lambda p, q: (p - q) ** 2 / 2),
        ("k3", lambda p, q: math.exp(q - p) - 1 - (q - p)),
    ],
)
def test_divergence_estimates_are_their_formulas(estimator: Any, formula: Callable[[float, float], float]) -> None:
    policy, reference = [-0.1, -2.0, -0.5, -4.0], [-0.1, -1.0, -3.5, -4.1]
    expected = [formula(p, q) for p, q in zip(policy, reference, strict=True)]

    found = kl_estimate(torch.tensor(policy).double(), torch.tensor(reference).double(), estimator)

    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("estimator", "tolerance"), [("k1", 1e-9), ("k3", 1e-9), ("k2", 0.06)])
def test_their_expectation_under_the_policy_is_the_divergence(estimator: Any, tolerance: float) -> None:
    """k1 and k3 exactly, k2 to second order for policies that are close (J. Schulman, 2020)."""
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    divergence = sum(float(p) * math.log(p / q) for p, q in zip(policy, reference, strict=True))

    estimates = kl_estimate(policy.log(), reference.log(), estimator)

    assert float((policy * estimates).sum()) == pytest.approx(divergence, rel=tolerance)


def test_k3_keeps_small_divergences() -> None:
    """exp(r) − 1 − r loses everything in float32 where r is small; the true value is about r²/2."""
    ratio = 3e-4
    [found] = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0 + ratio]), "k3").tolist()
    assert found == pytest.approx(ratio**2 / 2, rel=0.15)
    assert (kl_estimate(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]), "k3") == 0).all()


@pytest.mark.parametrize(
    ("mode", "length", "expected"),
    [
        # Three trajectories of 1, 4 and 2 decisions.
        ("sequence", None, [1 / 3, *[1 / 12] * 4, *[1 / 6] * 2]),
        ("token", None, [1 / 7] * 7),
        ("constant", 16, [1 / 48] * 7),
    ],
)
def test_weights_of_decisions(mode: Any, length: int | None, expected: list[float]) -> None:
    found = aggregation_weights(torch.tensor([1, 4, 2]), mode, length)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("ratio", [0.1, 0.79, 0.81, 1.0, 1.27, 1.29, 5.0])
def test_the_surrogate_is_clipped_where_the_step_would_go_too_far(ratio: float, advantage: float) -> None:
    low, high = 0.2, 0.28
    bounded = min(max(ratio, 0.8), 1.28)
    value = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)

    surrogate = clipped(value, torch.tensor([advantage], dtype=torch.float64), low, high)
    surrogate.sum().backward()

    assert surrogate.item() == pytest.approx(min(ratio * advantage, bounded * advantage))
    too_far = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
    assert value.grad is not None
    assert value.grad.item() == pytest.approx(0.0 if too_far else advantage)


@pytest.mark.parametrize("cap", [1.0, 1.5, 100.0])
def test_importance_is_a_ratio_of_probabilities_with_a_cap(cap: float) -> None:
    trained = [[-1.0, -2.0], [-0.5], [-3.0, -0.1, -2.0]]
    sampled = [[-1.2, -1.5], [-2.5], [-2.0, -0.4, -2.0]]
    flat = [torch.tensor([value for row in rows for value in row], dtype=torch.float64) for rows in (trained, sampled)]
    decisions = torch.tensor([2, 1, 3])

    tokens, sequences = [], []
    for own, others in zip(trained, sampled, strict=True):
        ratios = [math.exp(one) / math.exp(other) for one, other in zip(own, others, strict=True)]
        tokens += [min(ratio, cap) for ratio in ratios]
        sequences += [min(math.prod(ratios), cap)] * len(ratios)

    assert truncated_importance(*flat, decisions, "token", cap).tolist() == pytest.approx(tokens)
    assert truncated_importance(*flat, decisions, "sequence", cap).tolist() == pytest.approx(sequences)


def test_consecutive_stretches_are_summed_and_counted_each_for_itself() -> None:
    lengths = torch.tensor([3, 1, 2])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert sums(values, lengths).tolist() == [7.0, 8.0, 48.0]
    assert sums(lengths, torch.tensor([2, 1])).tolist() == [4, 2]
    assert counted(lengths).tolist() == [0, 1, 2, 0, 0, 1]
