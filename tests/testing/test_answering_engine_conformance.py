"""For every check of engines with a model of their own there is a bad engine that it catches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rllava_core.engines.protocol import AnswerSetup
from rllava_core.errors import ConfigError
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.draws import uniforms
from rllava_core.policy.sampling import Request, numbered
from rllava_core.testing import Conformance, ConformanceError, EngineConformance, check_answering_engine
from rllava_core.testing.conformance import checks_of
from rllava_core.testing.engines_answering import AnswerChecks

NOTHING = np.zeros(0, np.float32)


class Healthy:
    """Its model says what a hash of everything that it was told says."""

    def __init__(self, setup: AnswerSetup) -> None:
        assert setup.temperature > 0

    def generate(self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None) -> Any:
        epsilon = 0.0 if behaviour is None or seed is None else behaviour.epsilon
        return self.act(numbered(requests), seed, epsilon)

    def act(self, requests: Sequence[Request], seed: int | None, epsilon: float) -> Any:
        return [[self.one(request, number, seed, epsilon) for number in request.numbers] for request in requests]

    def one(self, request: Request, number: int, seed: int | None, epsilon: float) -> Any:
        if epsilon and request.choices is None:
            raise ConfigError("no choices")
        if epsilon:
            return chosen(request, int(uniforms(seed or 0, [number], 1)[0, 0] * len(request.choices or ())))
        return self.say(request, told(request) if seed is None else f"{told(request)} {seed} {number}")

    def say(self, request: Request, everything: str) -> Any:
        said = hashlib.sha256(everything.encode()).digest()
        if request.choices is None:
            return ActionSegment((), NOTHING, said.hex()[:8], ended=bool(said[0] % 2))
        return chosen(request, said[0] % len(request.choices))

    def forget(self) -> None:
        return

    def report(self) -> Mapping[str, Any]:
        return {"calls": 3}


def told(request: Request) -> str:
    return " ".join(segment.text for segment in request.context)


def chosen(request: Request, index: int) -> ActionSegment:
    assert request.choices is not None
    text = request.choice_texts[index]
    return ActionSegment(request.choices[index], NOTHING, text, choice=index, choices=request.choices)


class Changing(Healthy):
    def change(self, action: ActionSegment, request: Request) -> Any:
        return action

    def one(self, request: Request, number: int, seed: int | None, epsilon: float) -> Any:
        return self.change(super().one(request, number, seed, epsilon), request)


class ChoicesFirst(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None, epsilon: float) -> Any:
        return super().act(sorted(requests, key=lambda item: item.choices is None), seed, epsilon)


class OneOfEach(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None, epsilon: float) -> Any:
        return [actions[:1] for actions in super().act(requests, seed, epsilon)]


class NoText(Changing):
    def change(self, action: ActionSegment, request: Request) -> Any:
        return replace(action, text=None)


class ClaimsLogprobs(Changing):
    def change(self, action: ActionSegment, request: Request) -> Any:
        return replace(action, logprobs=np.zeros(1, np.float32))


class ClaimsTokens(Changing):
    def change(self, action: ActionSegment, request: Request) -> Any:
        return action if action.choice is not None else replace(action, tokens=(1, 2))


class GuessesAnEnd(Changing):
    """Answers a question of choices with a text that is none, as if all were well."""

    def change(self, action: ActionSegment, request: Request) -> Any:
        return ActionSegment((), NOTHING, "neither") if request.choices is not None else action


class KeepsTheChoices(Changing):
    def change(self, action: ActionSegment, request: Request) -> Any:
        return ActionSegment((), NOTHING, "neither", ended=False, choices=request.choices or ((1,),))


class ChoosesInText(Changing):
    def change(self, action: ActionSegment, request: Request) -> Any:
        return replace(action, choice=0, choices=((1,),))


class ChoiceOffByOne(Changing):
    def change(self, action: ActionSegment, request: Request) -> Any:
        if action.choice is None or action.choices is None:
            return action
        return replace(action, choice=(action.choice + 1) % len(action.choices))


class ChoiceBeyond(Changing):
    def change(self, action: ActionSegment, request: Request) -> Any:
        return action if action.choice is None else replace(action, choice=9)


class ChoicesOfAnother(Changing):
    def change(self, action: ActionSegment, request: Request) -> Any:
        return action if action.choice is None else replace(action, choices=((1,), (2,)))


class ChoicesCutOff(Changing):
    def change(self, action: ActionSegment, request: Request) -> Any:
        return action if action.choice is None else replace(action, ended=False)


class CallsCount(Healthy):
    calls = 0

    def say(self, request: Request, everything: str) -> Any:
        self.calls += 1
        return super().say(request, f"{everything} {self.calls}")


class SeedIgnored(CallsCount):
    """Greedy answers are always the same, drawn ones never."""

    def one(self, request: Request, number: int, seed: int | None, epsilon: float) -> Any:
        return Healthy.say(self, request, told(request)) if seed is None else super().one(request, number, 0, epsilon)


class NumbersOfItsOwn(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None, epsilon: float) -> Any:
        return super().act(numbered([replace(item, numbers=()) for item in requests]), seed, epsilon)


class ReadsItsNeighbours(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None, epsilon: float) -> Any:
        everything = " ".join(map(told, requests))
        return [[self.say(item, everything + told(item))] * item.count for item in requests]


class NoChance(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None, epsilon: float) -> Any:
        return super().act(requests, None if epsilon else seed, 0.0)


class OnlyTheFirstTwo(Healthy):
    def one(self, request: Request, number: int, seed: int | None, epsilon: float) -> Any:
        if epsilon and request.choices is not None:
            return chosen(request, number % 2)
        return super().one(request, number, seed, epsilon)


class WritesByChance(Healthy):
    def one(self, request: Request, number: int, seed: int | None, epsilon: float) -> Any:
        return super().one(request, number, seed, 0.0 if request.choices is None else epsilon)


class StumblesByChance(Healthy):
    def one(self, request: Request, number: int, seed: int | None, epsilon: float) -> Any:
        if epsilon and request.choices is None:
            raise TypeError("object of type 'NoneType' has no len()")
        return super().one(request, number, seed, epsilon)


class ReportsWords(Healthy):
    def report(self) -> Mapping[str, Any]:
        return {"cost": "nothing"}


class ReportsInfinity(Healthy):
    def report(self) -> Mapping[str, Any]:
        return {"cost": float("inf")}


MUTANTS: dict[str, list[tuple[type[Healthy], str]]] = {
    "its_own_model_answers_every_request_in_order": [
        (ChoicesFirst, r"gave \[1, 2, 3, 4, 1\] actions for requests of \[3, 1, 4, 2, 1\]"),
        (OneOfEach, r"gave \[1, 1, 1, 1, 1\] actions"),
        (NoText, "expected a string"),
        (ClaimsLogprobs, "nobody knows them"),
        (ClaimsTokens, "expected none"),
        (GuessesAnEnd, "'neither' is none of the choices, and yet has `ended`"),
        (KeepsTheChoices, "an action without a choice has choices"),
        (ChoosesInText, "free text was asked for, the action is choice 0"),
        (ChoiceOffByOne, "of another"),
        (ChoiceBeyond, "choice 9 was taken of"),
        (ChoicesOfAnother, "not those of its request"),
        (ChoicesCutOff, "a choice is a whole answer"),
    ],
    "its_own_model_answers_the_same_to_the_same": [
        (CallsCount, "without a seed two calls gave different actions"),
        (SeedIgnored, "with the same seed two calls gave different actions"),
    ],
    "its_own_model_draws_by_the_number_of_an_episode": [(NumbersOfItsOwn, "depends on the requests beside it")],
    "its_own_model_answers_alone_as_among_others": [(ReadsItsNeighbours, "answered beside it")],
    "its_own_model_is_not_asked_where_chance_decides": [
        (NoChance, "gave one of them 0 times"),
        (OnlyTheFirstTwo, "gave one of them 0 times"),
        (WritesByChance, "the model was asked instead"),
        (StumblesByChance, "raised TypeError"),
    ],
    "its_own_model_reports_numbers_by_name": [
        (ReportsWords, r"report\(\) raised ValueError"),
        (ReportsInfinity, "it must be finite"),
    ],
}


class Suite(EngineConformance):
    """The suite on a class of this file."""

    role = "rollout"
    own_model = True

    def __init__(self, made: type[Healthy]) -> None:
        self.made = made

    def create(self, setup: Any = None) -> Any:
        return self.made(setup)


def test_every_check_has_a_mutant() -> None:
    own = [name for name in checks_of(AnswerChecks) if name not in checks_of(Conformance)]
    assert [f"test_{check}" for check in MUTANTS] == own


@pytest.mark.parametrize(
    ("check", "mutant", "message"),
    [(check, *mutant) for check, mutants in MUTANTS.items() for mutant in mutants],
)
def test_a_mutant_is_caught(check: str, mutant: type[Healthy], message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        getattr(Suite(mutant), f"test_{check}")()


def test_a_healthy_engine_passes() -> None:
    check_answering_engine(Healthy)


def test_an_engine_need_not_report_nor_hold_to_the_choices() -> None:
    class Free(Healthy):
        report = None  # type: ignore[assignment]

        def say(self, request: Request, everything: str) -> Any:
            return ActionSegment((), NOTHING, "neither", ended=False)

    check_answering_engine(Free)


def test_the_kit_shows_conversations_that_have_messages_and_no_tokens() -> None:
    requests = Suite(Healthy).conversations()
    contexts = [segment for request in requests for segment in request.context if isinstance(segment, ContextSegment)]

    assert len(contexts) == 6
    assert all(segment.messages and not segment.tokens for segment in contexts)
    assert sum(len(segment.images) for segment in contexts) == 5
