"""Shared maths of policy-gradient algorithms: groups, divergences, aggregation, clipping."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """[N] mean over each value's group. values: [N]; group: [N] integer labels."""
    total, count = _of_group(values, group)
    return (total / count).to(values.dtype)


def group_std(values: Tensor, group: Tensor) -> Tensor:
    """[N] sample standard deviation (n − 1) of each value's group; zero for a group of one."""
    total, count = _of_group((values - group_mean(values, group)) ** 2, group)
    return (total / (count - 1).clamp(min=1)).sqrt().to(values.dtype)


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate of KL(π ‖ π_ref) from samples of π, elementwise (J. Schulman, "Approximating KL divergence", 2020).

    With r = log π_ref − log π: k1 = −r (unbiased), k2 = r²/2 (low variance), k3 = exp(r) − 1 − r (unbiased, ≥ 0).
    """
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return torch.expm1(log_ratio) - log_ratio


def aggregation_weights(
    decisions: Tensor, mode: Literal["sequence", "token", "constant"], length: int | None = None
) -> Tensor:
    """[D] weight of each decision in the loss. decisions: [N] number of decisions of each trajectory.

    sequence: 1/(N·T_i); token: 1/D; constant: 1/(N·length).
    """
    count = len(decisions)
    if mode == "sequence":
        per_trajectory = 1.0 / (count * decisions.to(torch.float32))
    elif mode == "token":
        per_trajectory = torch.full((count,), 1.0 / float(decisions.sum()))
    else:
        assert length is not None
        per_trajectory = torch.full((count,), 1.0 / (count * length))
    return per_trajectory.repeat_interleave(decisions)


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """The clipped surrogate min(ρA, clip(ρ, 1 − low, 1 + high)·A), elementwise (arXiv:1707.06347, eq. 7)."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def truncated_importance(
    trained: Tensor, sampled: Tensor, decisions: Tensor, per: Literal["token", "sequence"], cap: float
) -> Tensor:
    """[D] min(π_trained / π_sampled, cap) of each decision, or of all of its trajectory (arXiv:1802.01561, sec. 4.1).

    trained, sampled: [D] log-probs; decisions: [N] how many each trajectory has.
    """
    log_ratio = trained - sampled
    if per == "sequence":
        log_ratio = sums(log_ratio, decisions).repeat_interleave(decisions)
    return log_ratio.exp().clamp(max=cap)


def sums(values: Tensor, lengths: Tensor) -> Tensor:
    """[N] sums of consecutive stretches. values: [sum of lengths]; lengths: [N], all positive."""
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    return values.new_zeros(len(lengths)).index_add_(0, owner, values)


def counted(lengths: Tensor) -> Tensor:
    """[sum of lengths] 0, 1, … of each of N consecutive stretches."""
    return torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)


def _of_group(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """[N] sum over each value's group and size of the group, in float64: the mean of equal values is that value."""
    labels, place = group.unique(return_inverse=True)
    total = torch.zeros(len(labels), dtype=torch.float64, device=values.device).index_add_(0, place, values.double())
    return total[place], place.bincount(minlength=len(labels))[place]
