"""Requests to questions, and answers to actions, with a vLLM that is a script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from rllava_core.engines.protocol import RolloutSetup
from rllava_core.errors import ConfigError, InvariantError, ModelError
from rllava_core.mdp.trajectory import ContextSegment
from rllava_core.policy.batch import BatchBuilder
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request, Sampler
from rllava_core.testing.rollouts import Shown, picture, request, tiny_policy
from rllava_vllm.asking import NEVER, SCORED, Ask, Said, Terms, first_seed, runs, terms_of
from rllava_vllm.config import VLLMConfig
from rllava_vllm.engine import VLLMRolloutEngine
from rllava_vllm.prompts import Prompt, prompt_of

TERMS = Terms(0.7, (3, 260), (257,))


class Script:
    """Answers as the policy itself would, one token at a time, and remembers what it was asked."""

    def __init__(self, policy: Policy, media: MediaStore) -> None:
        self.policy, self.media = policy, media
        self.asked: list[Ask] = []
        self.loaded = 0
        self.rested = 0

    def answer(self, asks: Sequence[Ask], terms: Terms) -> list[list[Said]]:
        self.asked += asks
        return [[self._said(ask, number) for number in range(ask.count)] for ask in asks]

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.loaded += len(dict(weights))

    def rest(self) -> None:
        self.rested += 1

    def _said(self, ask: Ask, number: int) -> Said:
        if ask.scored:
            row = self._next(ask)
            return Said((ask.scored[0],), (0.0,), {token: float(row[token]) for token in ask.scored})
        token = 65 + number if ask.seed is not None else int(self._next(ask).argmax())
        return Said((token, 257), (-1.0, -0.5), {})

    def _next(self, ask: Ask) -> Tensor:
        builder = BatchBuilder(self.policy.adapter, self.media)
        builder.add_context((ContextSegment(ask.prompt.tokens),), "script")
        with torch.no_grad():
            memory = self.policy.prefill(builder.build())
            return self.policy.next_token_logprobs(memory.last)[0]


def engine_of(policy: Policy, **options: object) -> tuple[VLLMRolloutEngine, Script]:
    media = MediaStore(policy.adapter)
    script = Script(policy, media)
    setup = RolloutSetup(policy, media, nullcontext)
    return VLLMRolloutEngine(VLLMConfig(**options), setup, script), script


def ask_for(policy: Policy, shown: Shown, count: int = 1, numbers: tuple[int, ...] = ()) -> Request:
    asked = request(policy.adapter, MediaStore(policy.adapter), shown, count)
    return Request(**{**asked.__dict__, "numbers": numbers})


def test_every_sampling_parameter_is_the_policys() -> None:
    parameters = Ask(Prompt((1, 2), (), "x"), 4, 9, seed=11).parameters(TERMS)
    assert parameters["temperature"] == 0.7
    assert parameters["logit_bias"] == {3: NEVER, 260: NEVER}
    assert parameters["stop_token_ids"] == [257]
    assert parameters["ignore_eos"] is True
    assert (parameters["n"], parameters["max_tokens"], parameters["seed"]) == (4, 9, 11)
    assert (parameters["top_p"], parameters["top_k"], parameters["min_p"]) == (1.0, 0, 0.0)
    # What is ruled out has no share, not a small one.
    shares = torch.log_softmax(torch.tensor([50.0, -100.0 + NEVER]) / 0.01, dim=0).exp()
    assert shares.tolist() == [1.0, 0.0]


def test_without_a_seed_nothing_is_drawn_and_scores_are_at_the_policys_temperature() -> None:
    assert Ask(Prompt((1,), (), "x")).parameters(TERMS)["temperature"] == 0.0
    assert "seed" not in Ask(Prompt((1,), (), "x")).parameters(TERMS)
    scoring = Ask(Prompt((1,), (), "x"), scored=(5, 6)).parameters(TERMS)
    assert scoring["temperature"] == 0.7
    assert scoring["logprob_token_ids"] == [5, 6]


def test_what_is_drawn_depends_on_the_seed_and_the_number_of_an_episode_alone() -> None:
    """However requests are put together: the answer of episode n is drawn by the seed of n."""
    policy = tiny_policy(temperature=1.0)

    def seeds(*numbers: tuple[int, ...]) -> dict[int, int]:
        engine, script = engine_of(policy, max_sequences=3)
        shown = Shown((picture(), "?"), max_tokens=3)
        engine.generate([ask_for(policy, shown, len(given), given) for given in numbers], 7)
        order = [number for given in numbers for number in given]
        drawn = [ask.seed + place for ask in script.asked for place in range(ask.count) if ask.seed is not None]
        return dict(zip(order, drawn, strict=True))

    together, apart = seeds((0, 1, 2, 3, 4, 9)), seeds((9,), (4, 3), (2, 0, 1))
    assert together == apart
    assert len(set(together.values())) == 6
    far = [first_seed(seed) for seed in range(200)]
    assert min(abs(one - two) for one, two in pairwise(sorted(far))) > 10**6
    assert all(0 <= seed < 2**62 for seed in far)


def test_runs_of_numbers() -> None:
    assert runs((3, 4, 5, 9, 10, 2), 64) == [(3, 3), (9, 2), (2, 1)]
    assert runs((0, 1, 2, 3, 4), 2) == [(0, 2), (2, 2), (4, 1)]


@pytest.mark.parametrize("choices", [("0", "1", "2"), ("yes", "no!", "yep", "y"), ("a", "b", "cd", "ce")])
@pytest.mark.parametrize("seed", [None, 5])
def test_choices_are_scored_and_drawn_as_the_local_engine_does(choices: tuple[str, ...], seed: int | None) -> None:
    policy = tiny_policy(temperature=1.5)
    engine, script = engine_of(policy)
    asked = ask_for(policy, Shown(("Which?",), choices), 12, tuple(range(20, 32)))
    [found] = engine.generate([asked], seed)
    [expected] = Sampler(policy, MediaStore(policy.adapter)).sample([asked], seed)
    assert [action.choice for action in found] == [action.choice for action in expected]
    gaps = [abs(one.logprobs[0] - two.logprobs[0]) for one, two in zip(found, expected, strict=True)]
    assert max(gaps) < 1e-5
    assert all(ask.scored and ask.max_tokens == 1 for ask in script.asked)
    beginnings = {choice[:place] for choice in asked.choices or () for place in range(len(choice))}
    assert len(script.asked) == len(beginnings)  # each is read once, whatever begins with it


def test_many_choices_are_scored_in_several_questions() -> None:
    policy = tiny_policy(temperature=1.0)
    engine, script = engine_of(policy)
    texts = tuple(chr(code) for code in range(33, 127)) + tuple(
        f"{code}{code}" for code in "abcdefghijklmnopqrstuvwxyz"
    )
    base = ask_for(policy, Shown(("Which?",), texts), 3)
    tokens = tuple((number,) for number in range(250))
    asked = Request(base.context, 3, 1, "many", tokens, tuple(map(str, range(250))))
    engine.generate([asked], 0)
    assert [len(ask.scored) for ask in script.asked] == [SCORED, 250 - SCORED]


def test_epsilon_mixes_in_every_choice_and_is_in_the_log_prob() -> None:
    policy = tiny_policy(temperature=1.0)
    engine, _ = engine_of(policy)
    asked = ask_for(policy, Shown(("Which?",), ("a", "b", "c", "d")), 40)
    [uniform] = engine.generate([asked], 3, Behaviour(epsilon=1.0))
    assert {action.choice for action in uniform} == {0, 1, 2, 3}
    np.testing.assert_allclose([action.logprobs[0] for action in uniform], math.log(0.25), atol=1e-6)
    [mixed] = engine.generate([asked], 3, Behaviour(epsilon=0.5))
    [local] = Sampler(policy, MediaStore(policy.adapter)).sample([asked], 3, Behaviour(epsilon=0.5))
    assert [action.choice for action in mixed] == [action.choice for action in local]
    [greedy] = engine.generate([asked], None, Behaviour(epsilon=1.0))
    assert len({action.choice for action in greedy}) == 1


def test_greedy_text_at_a_temperature_is_scored_again() -> None:
    """vLLM divides by no temperature where it draws nothing; the policy's log-probs are those at its temperature."""
    policy = tiny_policy(temperature=1.7)
    engine, script = engine_of(policy)
    asked = ask_for(policy, Shown(("Say",), max_tokens=4), 2)
    [first, second] = engine.generate([asked], None)[0]
    scored = [ask for ask in script.asked if ask.scored]
    assert [ask.scored[0] for ask in scored] == list(first.tokens)
    assert [len(ask.prompt.tokens) - len(asked.context[0].tokens) for ask in scored] == [0, 1]
    assert first.logprobs.tolist() == second.logprobs.tolist()
    assert first.logprobs.tolist() != [-1.0, -0.5]
    at_one, plain = engine_of(tiny_policy(temperature=1.0))
    [action, _] = at_one.generate([asked], None)[0]
    assert action.logprobs.tolist() == [-1.0, -0.5]
    assert not any(ask.scored for ask in plain.asked)


def test_text_ends_with_the_end_of_its_turn() -> None:
    policy = tiny_policy(temperature=1.0)
    engine, _ = engine_of(policy)
    [actions] = engine.generate([ask_for(policy, Shown(("Say",), max_tokens=4), 3)], 1)
    assert [action.text for action in actions] == ["A", "B", "C"]
    assert all(action.ended and action.tokens[-1] == 257 for action in actions)


def test_a_prompt_says_where_each_image_is() -> None:
    policy = tiny_policy()
    media = MediaStore(policy.adapter)
    first, second = picture(8, 24, 1), picture(12, 8, 2)
    asked = request(policy.adapter, media, Shown(("Is ", first, second, "?")))
    prompt = prompt_of(asked.context, policy.adapter, media, "x")
    assert [(item.digest, item.length) for item in prompt.pictures] == [(first.digest, 12), (second.digest, 6)]
    for item in prompt.pictures:
        shown = prompt.tokens[item.offset : item.offset + item.length]
        assert set(shown) == {policy.adapter.image_token}
    # The very tensors that the trainer reads.
    assert prompt.pictures[0].features is media.features([first])[0]
    broken = ContextSegment(asked.context[0].tokens[:8], asked.context[0].images)
    with pytest.raises(InvariantError, match="side by side"):
        prompt_of((broken,), policy.adapter, media, "x")


def test_what_cannot_be_sampled_exactly_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.01 to 2"):
        terms_of(tiny_policy(temperature=4.0))
    crowded = tiny_policy(temperature=1.0)
    crowded.adapter.forbidden_tokens = tuple(range(2000))  # type: ignore[misc]
    with pytest.raises(ModelError, match="2000 tokens"):
        terms_of(crowded)
    engine, _ = engine_of(tiny_policy(temperature=1.0), max_length=20)
    policy = tiny_policy(temperature=1.0)
    with pytest.raises(ModelError, match=r"max_length is 20"):
        engine.generate([ask_for(policy, Shown(("x" * 30,)))], 0)
    with pytest.raises(ConfigError, match="values of heads"):
        engine.generate([ask_for(policy, Shown(("?",), ("a", "b")))], 0, Behaviour(lambda heads: heads["q"]))
    with pytest.raises(ConfigError, match="free text"):
        engine.generate([ask_for(policy, Shown(("?",)))], 0, Behaviour(epsilon=1.0))


def test_sync_hands_over_all_weights_and_forget_lets_rest() -> None:
    policy = tiny_policy(temperature=1.0)
    engine, script = engine_of(policy)
    assert script.loaded == len(list(policy.model.parameters()))
    engine.forget()
    assert script.rested == 1
    assert engine.generate([], 0) == []
