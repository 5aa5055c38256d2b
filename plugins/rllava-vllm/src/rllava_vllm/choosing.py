"""Choices: the log-probs of all of them, exactly, and a draw among them here.

The choices of a request make a tree, by the tokens that they begin with alike. Every inner node is a question to vLLM:
the log-probs of the tokens that may follow. A choice's is their sum along its path, and the policy's distribution is
the softmax of these over the choices. So it is for the policy that is trained, and the draw is the one that the local
engine makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.draws import draw, uniforms
from rllava_core.policy.sampling import Request
from rllava_vllm.asking import SCORED, Ask, Said
from rllava_vllm.prompts import Prompt

Tokens = tuple[int, ...]


def questions(prompt: Prompt, choices: Sequence[Tokens]) -> list[Ask]:
    """What must be known to score the choices, a question for each of them beginnings that some have in common."""
    asks = []
    for begin, followers in _nodes(choices).items():
        for first in range(0, len(followers), SCORED):
            asks.append(Ask(prompt.followed_by(begin), scored=tuple(followers[first : first + SCORED])))
    return asks


def logprobs(choices: Sequence[Tokens], asks: Sequence[Ask], said: Sequence[Said], context: int) -> Tensor:
    """[C] float64 log-probs of the choices, from the answers to their `questions`. context: tokens of the prompt."""
    scores: dict[tuple[Tokens, int], float] = {}
    for ask, answer in zip(asks, said, strict=True):
        begin = ask.prompt.tokens[context:]
        scores |= {(begin, token): answer.scores[token] for token in ask.scored}
    sums = [sum(scores[choice[:place], token] for place, token in enumerate(choice)) for choice in choices]
    return torch.log_softmax(torch.tensor(sums, dtype=torch.float64), dim=0)


def choose(request: Request, row: Tensor, seed: int | None, epsilon: float) -> list[ActionSegment]:
    """An action for each of the request's episodes, from the [C] log-probs of the choices. Greedy without a seed.

    epsilon: probability of drawing uniformly instead, which greedy actions do without.
    """
    assert request.choices is not None
    if seed is not None and epsilon > 0:
        row = ((1 - epsilon) * row.exp() + epsilon / len(row)).log()
    points = None if seed is None else torch.from_numpy(uniforms(seed, request.numbers, 1)[:, 0].copy())
    return [
        ActionSegment(
            tokens=request.choices[index],
            logprobs=np.array([row[index]], dtype=np.float32),
            text=request.choice_texts[index],
            choice=index,
            choices=request.choices,
        )
        for index in draw(row.expand(request.count, -1), points).tolist()
    ]


def _nodes(choices: Iterable[Tokens]) -> dict[Tokens, list[int]]:
    """The tokens that may follow each beginning of a choice, in the order of the choices."""
    found: dict[Tokens, dict[int, None]] = {}
    for choice in choices:
        for place, token in enumerate(choice):
            found.setdefault(choice[:place], {})[token] = None
    return {begin: list(followers) for begin, followers in found.items()}
