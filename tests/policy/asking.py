"""What tests ask a sampler, and how they look at what it draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rllava_core.mdp.trajectory import ActionSegment, Segment
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request, Sampler

ROUNDING = 2.0**-23
"""Log-probs are recorded as float32."""


def draw(policy: Policy, requests: list[Request], seed: int | None = 0) -> list[list[ActionSegment]]:
    return Sampler(policy, MediaStore(policy.adapter)).sample(requests, seed)


def ask(*context: Segment, count: int = 1, max_tokens: int = 8, name: str = "example 7") -> Request:
    return Request(context, count, max_tokens, name)


def ask_choices(*context: Segment, choices: tuple[str, ...], count: int = 1, name: str = "example 7") -> Request:
    tokens = tuple(tuple(choice.encode()) for choice in choices)
    return Request(context, count, 1, name, tokens, choices)


def assert_frequencies(found: Mapping[Any, int], probabilities: Mapping[Any, float]) -> None:
    """Pearson's χ² within five standard deviations of its mean; outcomes expected less than 5 times are one cell."""
    draws = sum(found.values())
    assert set(found) <= set(probabilities)
    np.testing.assert_allclose(sum(probabilities.values()), 1.0, atol=1e-6)
    rare = [outcome for outcome, probability in probabilities.items() if probability * draws < 5]
    cells = [(found.get(outcome, 0), p * draws) for outcome, p in probabilities.items() if outcome not in rare]
    if rare:
        cells.append((sum(found.get(item, 0) for item in rare), max(1.0, draws * sum(probabilities[i] for i in rare))))
    freedom = len(cells) - 1
    assert freedom >= 2
    assert sum((seen - expected) ** 2 / expected for seen, expected in cells) < freedom + 5 * (2 * freedom) ** 0.5
