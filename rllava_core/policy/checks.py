"""Fail closed: what must hold before a batch is trained on. A violation is an error that names the trajectory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from rllava_core.errors import InvariantError, ModelError
from rllava_core.mdp.trajectory import ContextSegment, Segment, Trajectory
from rllava_core.policy.adapter import Features, ModelAdapter


def check_context(segment: ContextSegment, features: Sequence[Features], adapter: ModelAdapter, name: str) -> None:
    """There are tokens, and image tokens = image features. Raises InvariantError."""
    if not segment.tokens:
        raise InvariantError(f"{name}: a prompt or observation without tokens")
    placeholders = segment.tokens.count(adapter.image_token)
    expected = sum(adapter.feature_count(item) for item in features)
    if placeholders != expected:
        raise InvariantError(
            f"{name}: {placeholders} image tokens for {len(features)} images with {expected} features; "
            "the prompt was cut through an image, or its text contains the placeholder"
        )


def check_length(length: int, adapter: ModelAdapter, name: str) -> None:
    """Nothing is ever truncated: a sequence that is too long is refused. Raises ModelError."""
    if length > adapter.context_length:
        raise ModelError(
            f"{name}: {length} tokens, the model's context is {adapter.context_length}; "
            "use smaller images, a shorter prompt or fewer new tokens"
        )


def check_trajectory(trajectory: Trajectory, adapter: ModelAdapter, forbidden: frozenset[int]) -> None:
    """Contexts, decisions and log-probs fit together, and nothing forbidden was sampled. Raises InvariantError.

    forbidden: the adapter's forbidden tokens, of which there may be hundreds, as a set.
    """
    name = trajectory.name
    if not trajectory.turns:
        raise InvariantError(f"{name}: a trajectory without turns")
    if trajectory.final is not None and trajectory.terminated:
        raise InvariantError(f"{name}: a terminated episode has no state in which it was left")
    if trajectory.final is not None:
        _check_shown(trajectory.final, 0, adapter, name)
    for number, turn in enumerate(trajectory.turns):
        where, action = f"{name}, turn {number + 1}", turn.action
        _check_shown(turn.context, len(action.tokens), adapter, where)
        if not action.tokens:
            raise InvariantError(f"{where}: an action without tokens")
        if action.logprobs.shape != (action.decisions,):
            raise InvariantError(f"{where}: {action.logprobs.shape} log-probs for {action.decisions} decisions")
        # Actions are short: a loop over their numbers is faster than a call of NumPy's.
        if not all(-math.inf < logprob <= 1e-4 for logprob in action.logprobs.tolist()):
            raise InvariantError(f"{where}: behaviour log-probs must be finite and not positive: {action.logprobs}")
        if action.choice is not None:
            if action.choices is None or not 0 <= action.choice < len(action.choices):
                raise InvariantError(f"{where}: choice {action.choice} of {action.choices}")
            if action.choices[action.choice] != action.tokens:
                raise InvariantError(f"{where}: the tokens are not those of choice {action.choice}")
        if not forbidden.isdisjoint(action.tokens):
            never = sorted(forbidden.intersection(action.tokens))
            raise InvariantError(f"{where}: the action holds tokens that may not be sampled: {never}")


def _check_shown(context: Sequence[Segment], more: int, adapter: ModelAdapter, where: str) -> None:
    """A context begins and ends with something shown, and leaves room for `more` tokens."""
    if not context or not all(isinstance(context[place], ContextSegment) for place in (0, -1)):
        raise InvariantError(f"{where}: what the policy sees begins and ends with what the environment showed")
    check_length(sum(len(segment.tokens) for segment in context) + more, adapter, where)


def check_recomputed(trajectories: Sequence[Trajectory], logprobs: torch.Tensor, limit: float) -> float:
    """Mean |behaviour log-prob − recomputed| in nats, of a policy that has not changed since it sampled.

    A gap beyond `limit` means that what is trained is not what was sampled (another image, another position, another
    mask). Raises InvariantError that names the worst trajectory.
    """
    recomputed = logprobs.detach().float().cpu().numpy()
    recorded = np.concatenate([action.logprobs for trajectory in trajectories for action in trajectory.actions])
    gaps = np.abs(recomputed - recorded)
    mean = float(gaps.mean())
    if not mean <= limit:
        worst = int(np.nanargmax(gaps)) if not np.isnan(gaps).all() else 0
        ends = np.cumsum([trajectory.decisions for trajectory in trajectories])
        culprit = trajectories[int(np.searchsorted(ends, worst, side="right"))]
        raise InvariantError(
            f"log-probs while sampling and recomputed differ by {mean:.3g} nats on average (limit {limit:g}); "
            f"worst on {culprit.name}: {recorded[worst]:.4f} sampled, {recomputed[worst]:.4f} recomputed"
        )
    return mean
