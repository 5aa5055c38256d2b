"""Sampling: an explicit decode loop over a key-value cache. A context is prefilled once for all its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from rllava_core.mdp.trajectory import ActionSegment, Segment
from rllava_core.policy.batch import BatchBuilder, PolicyBatch
from rllava_core.policy.checks import check_length
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy


@dataclass(frozen=True)
class Request:
    """A context to continue.

    context: the conversation so far.
    count: how many actions to sample (a group).
    choices: token ids of the discrete actions, and their texts; None for free text.
    max_tokens: limit of a free-text action, end of turn included.
    name: for messages.
    """

    context: tuple[Segment, ...]
    count: int
    max_tokens: int
    name: str
    choices: tuple[tuple[int, ...], ...] | None = None
    choice_texts: tuple[str, ...] = ()


@torch.inference_mode()
def sample(
    policy: Policy, media: MediaStore, requests: Sequence[Request], generator: Generator | None
) -> list[list[ActionSegment]]:
    """`count` actions for each request, with the log-prob of every decision. Greedy without a generator."""
    results: list[list[ActionSegment]] = [[] for _ in requests]
    for kind in (_sample_choices, _sample_text):
        own = [
            number
            for number, request in enumerate(requests)
            if (request.choices is not None) == (kind is _sample_choices)
        ]
        if own:
            answers = kind(policy, media, [requests[number] for number in own], generator)
            for number, answer in zip(own, answers, strict=True):
                results[number] = answer
    return results


def _sample_choices(
    policy: Policy, media: MediaStore, requests: Sequence[Request], generator: Generator | None
) -> list[list[ActionSegment]]:
    builder = BatchBuilder(policy.adapter, media)
    states = []
    for request in requests:
        assert request.choices is not None
        check_length(_length(request) + max(map(len, request.choices)), policy.adapter, request.name)
        states.append(builder.add_choices(builder.add_context(request.context, request.name), request.choices))
    logprobs = policy.choice_logprobs(builder.build().to(policy.device))  # [U, C]
    results = []
    for request, state in zip(requests, states, strict=True):
        assert request.choices is not None
        row = logprobs[state]
        drawn = _draw(row.expand(request.count, -1), generator)
        results.append(
            [
                ActionSegment(
                    tokens=request.choices[index],
                    logprobs=np.array([row[index].item()], dtype=np.float32),
                    text=request.choice_texts[index],
                    choice=index,
                    choices=request.choices,
                )
                for index in drawn.tolist()
            ]
        )
    return results


def _sample_text(
    policy: Policy, media: MediaStore, requests: Sequence[Request], generator: Generator | None
) -> list[list[ActionSegment]]:
    builder = BatchBuilder(policy.adapter, media)
    prefixes, limits = [], []
    for request in requests:
        check_length(_length(request) + request.max_tokens, policy.adapter, request.name)
        prefixes += [builder.add_context(request.context, request.name)] * request.count
        limits += [request.max_tokens] * request.count
    batch = builder.build().to(policy.device)
    answers = _decode(policy, batch, torch.tensor(prefixes, device=policy.device), limits, generator)
    waiting = iter(answers)
    return [[_action(policy, *next(waiting)) for _ in range(request.count)] for request in requests]


def _decode(
    policy: Policy, batch: PolicyBatch, prefix: Tensor, limits: Sequence[int], generator: Generator | None
) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probs of one sequence for each entry of `prefix` [N]; finished sequences leave the batch."""
    adapter = policy.adapter
    answers: list[tuple[list[int], list[float]]] = [([], []) for _ in limits]
    last, cache = policy.prefill(batch)
    logprobs = policy.next_token_logprobs(last)[prefix]  # [N, V]
    cache.batch_select_indices(prefix)
    mask = batch.prefix_mask[prefix]
    position = batch.next_position[prefix]
    running = torch.arange(len(limits), device=prefix.device)
    limit = torch.tensor(limits, device=prefix.device)
    ends = torch.tensor(adapter.end_of_turn, device=prefix.device)
    axes = batch.prefix_positions.shape[0]
    for step in range(max(limits)):
        tokens = _draw(logprobs, generator)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        for number, token, logprob in zip(running.tolist(), tokens.tolist(), chosen.tolist(), strict=True):
            answers[number][0].append(token)
            answers[number][1].append(logprob)
        stay = (~torch.isin(tokens, ends) & (limit[running] > step + 1)).nonzero()[:, 0]
        if stay.numel() == 0:
            break
        if stay.numel() < running.numel():
            cache.batch_select_indices(stay)
            running, tokens, mask, position = running[stay], tokens[stay], mask[stay], position[stay]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = adapter.hidden_states(
            policy.model,
            tokens=tokens[:, None],
            attention_mask=mask,
            positions=position.expand(axes, -1)[:, :, None],
            media={},
            cache=cache,
        )
        logprobs = policy.next_token_logprobs(hidden[:, -1])
        position = position + 1
    return answers


def _draw(logprobs: Tensor, generator: Generator | None) -> Tensor:
    """One index a row of [N, V] log-probs: drawn, or the most probable without a generator."""
    if generator is None:
        return logprobs.argmax(dim=-1)
    return torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]


def _action(policy: Policy, tokens: list[int], logprobs: list[float]) -> ActionSegment:
    ended = tokens[-1] in policy.adapter.end_of_turn
    text = policy.adapter.decode(tokens[:-1] if ended else tokens)
    return ActionSegment(tuple(tokens), np.array(logprobs, dtype=np.float32), text, ended)


def _length(request: Request) -> int:
    return sum(len(segment.tokens) for segment in request.context)
