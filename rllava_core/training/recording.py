"""What a rollout engine answered, so that the same episodes can be played again without the weights that it had.

An episode is its seed and its actions. What environments said of them is not kept: they say it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from rllava_core.engines.protocol import RolloutEngine
from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request

Turns = list[dict[int, ActionSegment]]
"""By turn, and by the number of the episode among all of a step."""


class Recorder:
    """Passes on what an engine answers, and keeps it."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self.turns: Turns = []

    def generate(
        self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None
    ) -> list[list[ActionSegment]]:
        answers = self._engine.generate(requests, seed, behaviour)
        self.turns.append(
            {
                number: action
                for request, actions in zip(requests, answers, strict=True)
                for number, action in zip(request.numbers, actions, strict=True)
            }
        )
        return answers

    def forget(self) -> None:
        self._engine.forget()

    def sync(self, policy: Policy) -> None:
        self._engine.sync(policy)


class Recorded:
    """Answers what was recorded. Raises TrainingError where an environment does not do again what it did."""

    def __init__(self, turns: Turns) -> None:
        self._turns = iter(turns)

    def generate(
        self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None
    ) -> list[list[ActionSegment]]:
        turn = next(self._turns, {})
        for request in requests:
            if not turn.keys() >= set(request.numbers):
                raise TrainingError(
                    f"{request.name}: the environment goes on where it ended before the run was interrupted, so the "
                    "episodes sampled ahead cannot be played back; remove the newest checkpoint to resume from the one "
                    "before"
                )
        # Of the same renderer as those of the requests.
        return [[replace(turn[number], choices=request.choices) for number in request.numbers] for request in requests]

    def forget(self) -> None:
        return

    def sync(self, policy: Policy) -> None:
        return


def merged(parts: Iterable[Turns]) -> Turns:
    """The turns of episodes that several processes have played."""
    turns: Turns = []
    for part in parts:
        for place, turn in enumerate(part):
            if place == len(turns):
                turns.append({})
            turns[place] |= turn
    return turns


def turns_state(turns: Turns) -> list[dict[str, Any]]:
    """As tensors and texts, for a checkpoint."""
    return [_turn_state(list(turn), list(turn.values())) for turn in turns]


def turns_of(state: Sequence[Mapping[str, Any]]) -> Turns:
    """The opposite of `turns_state`."""
    return [_turn_of(turn) for turn in state]


def _turn_state(numbers: Sequence[int], actions: Sequence[ActionSegment]) -> dict[str, Any]:
    return {
        "numbers": torch.tensor(numbers),
        "tokens": torch.tensor(list(chain.from_iterable(action.tokens for action in actions))),
        "lengths": torch.tensor([len(action.tokens) for action in actions]),
        "logprobs": torch.from_numpy(np.concatenate([action.logprobs for action in actions])),
        "decisions": torch.tensor([len(action.logprobs) for action in actions]),
        "choices": torch.tensor([-1 if action.choice is None else action.choice for action in actions]),
        "ended": torch.tensor([action.ended for action in actions]),
        "texts": [action.text for action in actions],
    }


def _turn_of(state: Mapping[str, Any]) -> dict[int, ActionSegment]:
    rows = zip(
        state["numbers"].tolist(),
        state["tokens"].split(state["lengths"].tolist()),
        state["logprobs"].split(state["decisions"].tolist()),
        state["texts"],
        state["ended"].tolist(),
        state["choices"].tolist(),
        strict=True,
    )
    return {
        number: ActionSegment(
            tuple(tokens.tolist()), logprobs.numpy().copy(), text, ended, None if choice < 0 else choice
        )
        for number, tokens, logprobs, text, ended, choice in rows
    }
