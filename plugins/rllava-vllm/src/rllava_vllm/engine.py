"""The rollout engine: requests of the loop to questions for vLLM, and its answers to actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rllava_core.engines.protocol import RolloutSetup
from rllava_core.errors import ConfigError, ModelError
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.checks import check_length
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request, numbered
from rllava_core.policy.trained import checkpoint_weights
from rllava_vllm import choosing
from rllava_vllm.asking import Ask, Host, Said, Terms, first_seed, runs, terms_of
from rllava_vllm.config import VLLMConfig
from rllava_vllm.prompts import Prompt, prompt_of


@dataclass(frozen=True)
class _Question:
    """A request, what vLLM reads for it, and which of all questions are asked for its sake."""

    request: Request
    prompt: Prompt
    asks: list[Ask]


class VLLMRolloutEngine:
    """Samples by a vLLM that holds weights of its own, which `sync` replaces by the policy's.

    `generate` may run in one thread while the policy is trained in another: it reads the terms of the policy's
    distribution as they were when it began, and a server finishes what it was asked before it takes new weights.
    """

    def __init__(self, config: VLLMConfig, setup: RolloutSetup, host: Host | None = None) -> None:
        self.config = config
        self._media = setup.media
        terms_of(setup.policy)  # refused before anything is started
        self._host = host or _host(config, setup.policy)
        self.sync(setup.policy)

    def generate(
        self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None
    ) -> list[list[ActionSegment]]:
        adapter, terms = self._adapter, self._terms
        behaviour = behaviour or Behaviour()
        if behaviour.action_values is not None:
            raise ConfigError("engine.rollout vllm cannot act by the values of heads; use engine.rollout: local")
        for request in requests:
            self._check(request, adapter, behaviour)
        questions = [self._question(request, seed, adapter) for request in numbered(requests)]
        asked = [ask for question in questions for ask in question.asks]
        said = iter(self._host.answer(asked, terms) if asked else [])
        answers = [[next(said) for _ in question.asks] for question in questions]
        actions = [
            _written(question, found, adapter)
            if question.request.choices is None
            else _chosen(question, found, seed, behaviour)
            for question, found in zip(questions, answers, strict=True)
        ]
        return actions if seed is not None else self._at_temperature(questions, actions, terms)

    def forget(self) -> None:
        self._host.rest()

    def close(self) -> None:
        self._host.close()

    def sync(self, policy: Policy) -> None:
        self._terms = terms_of(policy)
        self._adapter = policy.adapter
        self._host.load(checkpoint_weights(policy.model))

    def _check(self, request: Request, adapter: ModelAdapter, behaviour: Behaviour) -> None:
        check_length(request.length, adapter, request.name)
        if self.config.max_length is not None and request.length > self.config.max_length:
            raise ModelError(
                f"{request.name}: {request.length} tokens, and engine.rollout.max_length is {self.config.max_length}"
            )
        if request.choices is None and not behaviour.is_policy:
            raise ConfigError(
                f"{request.name}: the environment asks for free text, and there is no acting at random, or by values, "
                "where no choices are offered"
            )

    def _question(self, request: Request, seed: int | None, adapter: ModelAdapter) -> _Question:
        prompt = prompt_of(request.context, adapter, self._media, request.name)
        if request.choices is not None:
            return _Question(request, prompt, choosing.questions(prompt, request.choices))
        if seed is None:
            return _Question(request, prompt, [Ask(prompt, 1, request.max_tokens)])
        begin = first_seed(seed)
        together = runs(request.numbers, self.config.max_sequences)
        asks = [Ask(prompt, count, request.max_tokens, begin + number) for number, count in together]
        return _Question(request, prompt, asks)

    def _at_temperature(
        self, questions: Sequence[_Question], actions: list[list[ActionSegment]], terms: Terms
    ) -> list[list[ActionSegment]]:
        """The same greedy actions with the policy's log-probs: vLLM takes no temperature where it draws nothing, so
        every token is scored in its place, which reads from the cache what was read already."""
        texts = [number for number, question in enumerate(questions) if question.request.choices is None]
        if terms.temperature == 1.0 or not texts:
            return actions
        first = {number: actions[number][0] for number in texts}
        asks = [
            Ask(questions[number].prompt.followed_by(action.tokens[:place]), scored=(token,))
            for number, action in first.items()
            for place, token in enumerate(action.tokens)
        ]
        said = iter(self._host.answer(asks, terms))
        results = list(actions)
        for number, action in first.items():
            scores = np.array([next(said)[0].scores[token] for token in action.tokens], dtype=np.float32)
            results[number] = [replace(action, logprobs=scores)] * len(actions[number])
        return results


def _host(config: VLLMConfig, policy: Policy) -> Host:
    # vLLM is needed in the one case only, and takes seconds to import.
    if config.mode == "server":
        from rllava_vllm.server import Server

        return Server(config, policy)
    from rllava_vllm.colocated import Colocated

    return Colocated(config, policy)


def _written(question: _Question, answers: Sequence[Sequence[Said]], adapter: ModelAdapter) -> list[ActionSegment]:
    actions = [_action(said, adapter) for group in answers for said in group]
    count = question.request.count
    return actions * count if len(actions) < count else actions  # one answer where all of them are the greedy one


def _action(said: Said, adapter: ModelAdapter) -> ActionSegment:
    ended = said.tokens[-1] in adapter.end_of_turn
    text = adapter.decode(said.tokens[:-1] if ended else said.tokens)
    return ActionSegment(said.tokens, np.array(said.logprobs, dtype=np.float32), text, ended)


def _chosen(
    question: _Question, answers: Sequence[Sequence[Said]], seed: int | None, behaviour: Behaviour
) -> list[ActionSegment]:
    request = question.request
    assert request.choices is not None
    said = [group[0] for group in answers]
    row = choosing.logprobs(request.choices, question.asks, said, len(question.prompt.tokens))
    return choosing.choose(request, row, seed, behaviour.epsilon)
