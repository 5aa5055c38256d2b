"""Sampling: an explicit decode loop over a key-value cache, which is kept from one turn of an episode to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rllava_core.errors import ConfigError, TrainingError
from rllava_core.mdp.trajectory import ActionSegment, Segment
from rllava_core.policy.batch import BatchBuilder, PolicyBatch
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.checks import check_length
from rllava_core.policy.draws import draw, uniforms
from rllava_core.policy.media import MediaStore
from rllava_core.policy.memory import Memory, give_back
from rllava_core.policy.policy import Policy


@dataclass(frozen=True)
class Request:
    """A context to continue.

    context: the conversation so far.
    count: how many actions to sample (a group).
    choices: token ids of the discrete actions, and their texts; None for free text.
    max_tokens: limit of a free-text action, end of turn included.
    name: for messages.
    numbers: of the episodes that the actions are for, among all of a step. What is drawn for one depends on the seed
        and its number alone, however requests are put together, or shared out over processes; without them, the actions
        of all requests of a call are numbered in their order.
    """

    context: tuple[Segment, ...]
    count: int
    max_tokens: int
    name: str
    choices: tuple[tuple[int, ...], ...] | None = None
    choice_texts: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the context and of the longest action."""
        longest = self.max_tokens if self.choices is None else max(map(len, self.choices))
        return sum(len(segment.tokens) for segment in self.context) + longest


class Sampler:
    """Samples actions, and keeps what the policy has read for requests that continue it.

    A request whose context is that of a request of the call before, an action and an observation (the very same
    objects), reads these two only. What no request of a call continues is dropped.
    """

    def __init__(self, policy: Policy, media: MediaStore) -> None:
        self._policy = policy
        self._media = media
        self._kept: list[_Kept] = []

    def forget(self) -> None:
        """Drop what was kept: the weights have changed, or the episodes are over."""
        self._kept = []

    @torch.inference_mode()
    def sample(
        self,
        requests: Sequence[Request],
        seed: int | None,
        behaviour: Behaviour | None = None,
        max_sequences: int = 512,
    ) -> list[list[ActionSegment]]:
        """`count` actions for each request, with the log-prob of every decision. Greedy without a seed.

        max_sequences: how many are sampled at once.
        """
        for request in requests:
            check_length(request.length, self._policy.adapter, request.name)
        requests = numbered(requests)
        behaviour = behaviour or Behaviour()
        kept: list[_Kept] = []
        results: dict[int, list[ActionSegment]] = {}
        for chunk in self._chunks(requests, max_sequences):
            asked = [requests[number] for number in chunk.numbers]
            actions, memory = self._answer(asked, chunk.kept, seed, behaviour)
            results.update(zip(chunk.numbers, actions, strict=True))
            kept.append(memory)
        self._kept = kept
        return [results[number] for number in range(len(requests))]

    def _chunks(self, requests: Sequence[Request], limit: int) -> Iterator[_Chunk]:
        """Requests of one kind that continue the same memory, or that continue none, in their order."""
        chunks: list[_Chunk] = []
        for number, request in enumerate(requests):
            key = _key(request.context[:-2])
            kept = next((item for item in self._kept if key in item.rows), None)
            free = (
                chunk
                for chunk in chunks
                if chunk.kept is kept
                and chunk.discrete == (request.choices is not None)
                and chunk.sequences + request.count <= limit
            )
            chunk = next(free, None)
            if chunk is None:  # a group that is larger than the limit goes alone
                chunk = _Chunk(kept, request.choices is not None, [], 0)
                chunks.append(chunk)
            chunk.numbers.append(number)
            chunk.sequences += request.count
        yield from chunks

    def _answer(
        self, requests: Sequence[Request], kept: _Kept | None, seed: int | None, behaviour: Behaviour
    ) -> tuple[list[list[ActionSegment]], _Kept]:
        builder = BatchBuilder(self._policy.adapter, self._media)
        rows = []
        for request in requests:
            if kept is None:
                rows.append(builder.add_context(request.context, request.name))
            else:
                seen = kept.rows[_key(request.context[:-2])]
                start = kept.next_positions[seen]
                rows.append(builder.add_context(request.context[-2:], request.name, seen, start))
        before = None if kept is None else kept.memory
        if requests[0].choices is not None:
            actions, memory = self._choose(builder, requests, rows, before, seed, behaviour)
        elif behaviour.is_policy:
            actions, memory = self._write(builder, requests, rows, before, seed)
        else:
            raise ConfigError(
                f"{requests[0].name}: the environment asks for free text, and there is no acting at random, or by "
                "values, where no choices are offered"
            )
        contexts = [request.context for request in requests]
        known = {_key(context): row for context, row in zip(contexts, rows, strict=True)}
        return actions, _Kept(memory, memory.next_position.tolist(), known, contexts)

    def _choose(
        self,
        builder: BatchBuilder,
        requests: Sequence[Request],
        rows: Sequence[int],
        before: Memory | None,
        seed: int | None,
        behaviour: Behaviour,
    ) -> tuple[list[list[ActionSegment]], Memory]:
        policy = self._policy
        offered = [request.choices or () for request in requests]
        states = []
        if behaviour.action_values is None:
            states = [builder.add_choices(row, choices) for row, choices in zip(rows, offered, strict=True)]
        batch = builder.build().to(policy.device)
        memory = policy.prefill(batch, before)
        counts = torch.tensor([len(choices) for choices in offered], device=policy.device)
        if behaviour.action_values is None:
            logprobs = policy.choice_logprobs(batch, memory)[states]  # [requests, C]
        else:
            values = behaviour.action_values(policy.head_outputs(memory.last))[rows]
            logprobs = _best(values, counts, requests)
        if seed is not None and behaviour.epsilon > 0:
            logprobs = _mixed(logprobs, counts, behaviour.epsilon)
        results = []
        for request, row in zip(requests, logprobs, strict=True):
            assert request.choices is not None
            points = _points(seed, request.numbers, 1, policy.device)
            drawn = draw(row.expand(request.count, -1), None if points is None else points[0]).tolist()
            chosen = row[drawn].tolist()
            results.append(
                [
                    ActionSegment(
                        tokens=request.choices[index],
                        logprobs=np.array([logprob], dtype=np.float32),
                        text=request.choice_texts[index],
                        choice=index,
                        choices=request.choices,
                    )
                    for index, logprob in zip(drawn, chosen, strict=True)
                ]
            )
        return results, memory

    def _write(
        self,
        builder: BatchBuilder,
        requests: Sequence[Request],
        rows: Sequence[int],
        before: Memory | None,
        seed: int | None,
    ) -> tuple[list[list[ActionSegment]], Memory]:
        policy = self._policy
        batch = builder.build().to(policy.device)
        memory = policy.prefill(batch, before)
        sequences = [row for row, request in zip(rows, requests, strict=True) for _ in range(request.count)]
        limits = [request.max_tokens for request in requests for _ in range(request.count)]
        numbers = [number for request in requests for number in request.numbers]
        points = _points(seed, numbers, max(limits), policy.device)
        answers = iter(_decode(policy, batch, memory, sequences, limits, points))
        texts: dict[tuple[int, ...], str] = {}
        actions = [[_action(policy, texts, *next(answers)) for _ in range(request.count)] for request in requests]
        return actions, memory


@dataclass
class _Chunk:
    """Requests, by number, that are answered together."""

    kept: _Kept | None
    discrete: bool
    numbers: list[int]
    sequences: int


@dataclass(frozen=True)
class _Kept:
    """What the policy has read: the row of its memory for each context, which is known by the identity of its segments.

    contexts: held so that no other segment can take the identity of one of theirs.
    """

    memory: Memory
    next_positions: list[int]
    rows: dict[tuple[int, ...], int]
    contexts: list[tuple[Segment, ...]]


def _key(context: Sequence[Segment]) -> tuple[int, ...]:
    return tuple(map(id, context))


def numbered(requests: Sequence[Request]) -> list[Request]:
    """The same requests; those without numbers of their episodes get them, in their order."""
    found, free = [], 0
    for request in requests:
        if request.numbers and len(request.numbers) != request.count:
            raise ValueError(f"{request.name}: {len(request.numbers)} numbers for {request.count} actions")
        found.append(request if request.numbers else replace(request, numbers=tuple(range(free, free + request.count))))
        free += request.count
    return found


def _points(seed: int | None, numbers: Sequence[int], places: int, device: torch.device) -> Tensor | None:
    """[places, N] what to draw the first tokens of episodes by; None to be greedy."""
    if seed is None:
        return None
    return torch.from_numpy(uniforms(seed, numbers, places).T.copy()).to(device)


def _decode(
    policy: Policy,
    batch: PolicyBatch,
    memory: Memory,
    sequences: Sequence[int],
    limits: Sequence[int],
    points: Tensor | None,
) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probs of one answer for each entry of `sequences`, the row of the memory that it continues.

    points: [places, N] what to draw the tokens by. Sequences that have ended leave the batch.
    """
    adapter = policy.adapter
    answers: list[tuple[list[int], list[float]]] = [([], []) for _ in limits]
    rows = torch.tensor(sequences, device=policy.device)
    logprobs = policy.next_token_logprobs(memory.last)[rows]  # [N, V]
    going = memory.continued(rows)
    cache, mask, position = going.cache, going.mask, going.next_position
    running = torch.arange(len(limits), device=rows.device)
    limit = torch.tensor(limits, device=rows.device)
    ends = torch.tensor(adapter.end_of_turn, device=rows.device)
    axes = batch.prefix_positions.shape[0]
    written = 0
    for step in range(max(limits)):
        tokens = draw(logprobs, None if points is None else points[step][running])
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
        written += 1
    give_back(cache, written)
    return answers


def _best(values: Tensor, counts: Tensor, requests: Sequence[Request]) -> Tensor:
    """[N, C] log-probs of the policy that takes the choice of the greatest value: 0 and -inf."""
    most = int(counts.max())
    if most > values.shape[1]:
        request = next(request for request in requests if len(request.choices or ()) == most)
        raise TrainingError(
            f"{request.name}: the environment offers {most} choices, and the policy values {values.shape[1]}, as many "
            "as the first observation had"
        )
    allowed = torch.arange(values.shape[1], device=values.device) < counts[:, None]
    best = values.masked_fill(~allowed, -torch.inf).argmax(dim=1, keepdim=True)
    return torch.full_like(values, -torch.inf).scatter(1, best, 0.0)


def _mixed(logprobs: Tensor, counts: Tensor, epsilon: float) -> Tensor:
    """[N, C]: with probability epsilon one of the first `counts` choices, each as likely."""
    allowed = torch.arange(logprobs.shape[1], device=logprobs.device) < counts[:, None]
    return ((1 - epsilon) * logprobs.exp() + epsilon * allowed / counts[:, None]).log()


def _action(
    policy: Policy, texts: dict[tuple[int, ...], str], tokens: list[int], logprobs: list[float]
) -> ActionSegment:
    """texts: of the answers before, for the members of a group repeat each other."""
    ended = tokens[-1] in policy.adapter.end_of_turn
    sampled = tuple(tokens)
    if sampled not in texts:
        texts[sampled] = policy.adapter.decode(sampled[:-1] if ended else sampled)
    return ActionSegment(sampled, np.array(logprobs, dtype=np.float32), texts[sampled], ended)
