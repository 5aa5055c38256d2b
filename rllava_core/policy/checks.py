"""Fail closed: what must hold before a batch is trained on. A violation is an error that names the trajectory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


WORST_SHOWN = 3


@dataclass(frozen=True)
class Gaps:
    """|log-prob while sampling − recomputed| of the decisions of trajectories, in nats.

    ratio: mean of exp of it, 1 where the two agree.
    """

    mean: float
    largest: float
    ratio: float


def check_recomputed(
    trajectories: Sequence[Trajectory],
    logprobs: torch.Tensor,
    adapter: ModelAdapter,
    limit: float,
    token_limit: float | None = None,
) -> Gaps:
    """A policy that has not changed since it sampled has the log-probs that were recorded.

    logprobs: [D] recomputed, of the decisions of all trajectories. limit, token_limit: of the mean gap and of the
    largest. Beyond them what is trained is not what was sampled: another image, another position, another mask, or
    weights that were never handed over. Raises InvariantError that names the worst decisions.
    """
    recomputed = logprobs.detach().float().cpu().numpy()
    recorded = np.concatenate([action.logprobs for trajectory in trajectories for action in trajectory.actions])
    gaps = np.abs(recomputed - recorded)
    mean, largest = float(gaps.mean()), float(gaps.max())
    too_far = f"{mean:.3g} nats on average (training.max_logprob_gap is {limit:g})" if not mean <= limit else ""
    if token_limit is not None and not largest <= token_limit:
        too_far = too_far or f"up to {largest:.3g} nats (training.max_token_gap is {token_limit:g})"
    if too_far:
        # What is no number is farther away than any number.
        order = np.argsort(-np.nan_to_num(gaps, nan=np.inf), kind="stable")[:WORST_SHOWN].tolist()
        worst = [
            f"{_named(trajectories, place, adapter)}: {recorded[place]:.4f} sampled, {recomputed[place]:.4f} recomputed"
            for place in order
        ]
        raise InvariantError(
            f"log-probs while sampling and recomputed differ by {too_far}; worst on {'; '.join(worst)}"
        )
    return Gaps(mean, largest, float(np.exp(gaps).mean()))


def _named(trajectories: Sequence[Trajectory], place: int, adapter: ModelAdapter) -> str:
    """Whose decision number `place` of all is, and which."""
    for trajectory in trajectories:
        for number, turn in enumerate(trajectory.turns):
            action = turn.action
            if place < action.decisions:
                tokens = action.tokens if action.choice is not None else action.tokens[place : place + 1]
                where = f"turn {number + 1}, " if len(trajectory.turns) > 1 else ""
                kind = "choice" if action.choice is not None else f"token {place + 1}"
                return f"{trajectory.name}, {where}{kind} {adapter.decode(tokens)!r}"
            place -= action.decisions
    raise AssertionError("unreachable")
