"""How actions are chosen: by the greatest value, exploring, or by the policy itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rllava_core.errors import ConfigError, TrainingError
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Head
from rllava_core.policy.sampling import Sampler

from .asking import ask, ask_choices, assert_frequencies


def q(heads: Mapping[str, Any]) -> Any:
    return heads["q"]


def test_actions_may_be_those_of_the_greatest_value(toy: Any) -> None:
    """Of the choices that there are; in states with fewer choices the other values mean nothing."""
    policy = toy.policy(heads={"q": Head(4)})
    plain = toy.Plain(policy.model)
    requests = [
        ask_choices(toy.context("?", toy.picture(8, 8, seed)), choices=("a", "b", "c", "dd")[: 2 + seed % 3])
        for seed in range(12)
    ]
    sampler = Sampler(policy, MediaStore(policy.adapter))

    answers = sampler.sample(requests, 0, Behaviour(q))

    for request, [action] in zip(requests, answers, strict=True):
        values = policy.heads["q"](plain.left(request.context))[: len(request.choices or ())]
        assert action.choice == int(values.argmax())
        assert action.logprobs.tolist() == [0.0]
    assert len({action.choice for [action] in answers}) > 1


@pytest.mark.parametrize("values", [q, None], ids=["values", "policy"])
def test_exploring_is_drawing_one_of_the_choices_now_and_then(toy: Any, values: Any) -> None:
    policy = toy.policy(heads={"q": Head(3)})
    prompt, choices = toy.context("?", toy.picture(8, 8)), ("a", "bc", "d")
    if values is None:
        scores, _ = toy.Plain(policy.model).choices(prompt.tokens, prompt.images, [item.encode() for item in choices])
        own = scores.exp().tolist()
    else:
        best = int(policy.heads["q"](toy.Plain(policy.model).left((prompt,))).argmax())
        own = [float(number == best) for number in range(3)]
    expected = {number: 0.7 * probability + 0.1 for number, probability in enumerate(own)}
    sampler = Sampler(policy, MediaStore(policy.adapter))
    request = ask_choices(prompt, choices=choices, count=4000)

    [actions] = sampler.sample([request], 11, Behaviour(values, epsilon=0.3))

    assert_frequencies(Counter(action.choice for action in actions), expected)
    for action in actions:
        np.testing.assert_allclose(np.exp(action.logprobs[0]), expected[action.choice], rtol=1e-6)
    [greedy] = sampler.sample([replace(request, count=5)], None, Behaviour(values, epsilon=0.3))
    assert {action.choice for action in greedy} == {int(np.argmax(own))}


def test_other_numbers_of_choices_are_explored_each_by_its_own(toy: Any) -> None:
    policy = toy.policy()
    prompt = toy.context("?")
    requests = [ask_choices(prompt, choices=tuple("abcd"[:count]), count=2000) for count in (2, 4)]

    answers = Sampler(policy, MediaStore(policy.adapter)).sample(requests, 1, Behaviour(epsilon=1.0))

    for count, actions in zip((2, 4), answers, strict=True):
        np.testing.assert_allclose([action.logprobs[0] for action in actions], np.log(1 / count), rtol=1e-6)
        found = Counter(action.choice for action in actions)
        assert all(abs(found[number] - 2000 / count) < 5 * (2000 / count) ** 0.5 for number in range(count))


@pytest.mark.parametrize("behaviour", [Behaviour(q), Behaviour(epsilon=0.1)])
def test_free_text_has_no_values_and_is_not_explored(toy: Any, behaviour: Behaviour) -> None:
    policy = toy.policy(heads={"q": Head(3)})
    with pytest.raises(ConfigError, match=r"^train\.jsonl:12: the environment asks for free text, .* no choices"):
        Sampler(policy, MediaStore(policy.adapter)).sample([ask(toy.context("?"), name="train.jsonl:12")], 0, behaviour)


def test_more_choices_than_values_are_refused_by_name(toy: Any) -> None:
    policy = toy.policy(heads={"q": Head(2)})
    requests = [ask_choices(toy.context("?"), choices=("a", "b")), ask_choices(toy.context("?!"), choices=tuple("abc"))]
    requests[1] = replace(requests[1], name="train.jsonl:12")
    with pytest.raises(TrainingError, match=r"^train\.jsonl:12: the environment offers 3 choices, .* values 2,"):
        Sampler(policy, MediaStore(policy.adapter)).sample(requests, 0, Behaviour(q))
