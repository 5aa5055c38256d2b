"""For every check of sampling there is a bad engine that it catches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rllava_core.engines.config import LocalRolloutConfig
from rllava_core.engines.local_rollout import LocalRolloutEngine
from rllava_core.engines.protocol import RolloutSetup
from rllava_core.errors import ModelError
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request
from rllava_core.testing import Conformance, ConformanceError, EngineConformance, check_rollout_engine
from rllava_core.testing.conformance import checks_of
from rllava_core.testing.engines_rollout import RolloutChecks

Actions = list[list[ActionSegment]]


class Healthy(LocalRolloutEngine):
    """The local engine, typed as loosely as mutants need."""

    def __init__(self, setup: RolloutSetup) -> None:
        super().__init__(LocalRolloutConfig(), setup)

    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().generate(requests, seed)


class Changing(Healthy):
    """Gives out actions that are not what was sampled."""

    def change(self, action: ActionSegment) -> Any:
        return action

    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return [[self.change(action) for action in actions] for actions in super().generate(requests, seed)]


class WithACopy(Healthy):
    """Samples from a copy of the policy that is not quite the same."""

    def change(self, policy: Policy) -> None:
        raise NotImplementedError

    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        original, self._policy = self._policy, copy.deepcopy(self._policy)
        self.change(self._policy)
        try:
            return super().generate(requests, seed)
        finally:
            self._policy = original


class ChoicesFirst(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().generate(sorted(requests, key=lambda item: item.choices is None), seed)


class OneOfEach(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().generate([replace(item, count=1) for item in requests], seed)


class DoublePrecision(Changing):
    def change(self, action: ActionSegment) -> Any:
        return replace(action, logprobs=action.logprobs.astype(np.float64))


class LogprobOfEveryChoiceToken(Changing):
    def change(self, action: ActionSegment) -> Any:
        return replace(action, logprobs=np.full(len(action.tokens), -1.0, np.float32))


class ChoiceOffByOne(Changing):
    def change(self, action: ActionSegment) -> Any:
        if action.choice is None or action.choices is None:
            return action
        return replace(action, choice=(action.choice + 1) % len(action.choices))


class ChoicesCutOff(Changing):
    def change(self, action: ActionSegment) -> Any:
        return action if action.choice is None else replace(action, ended=False)


class SeedIgnored(Healthy):
    calls = 0

    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        self.calls += 1
        return super().generate(requests, None if seed is None else self.calls)


class AlwaysTheSameSeed(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().generate(requests, None if seed is None else 0)


class GlobalRandomState(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        mixed = None if seed is None else seed + torch.initial_seed()
        return super().generate(requests, mixed)


class GroupOfCopies(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        first = super().generate([replace(item, count=1) for item in requests], seed)
        return [[action] * item.count for item, [action] in zip(requests, first, strict=True)]


class NeverGreedy(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().generate(requests, seed or 0)


class RandomWithoutASeed(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().generate(requests, torch.seed() if seed is None else seed)


class ShortestLimitForAll(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        limit = min(item.max_tokens for item in requests)
        return super().generate([replace(item, max_tokens=limit) for item in requests], seed)


class OneTokenTooMany(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().generate([replace(item, max_tokens=item.max_tokens + 1) for item in requests], seed)


class OneTokenTooFew(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().generate([replace(item, max_tokens=max(1, item.max_tokens - 1)) for item in requests], seed)


class AlwaysEnded(Changing):
    def change(self, action: ActionSegment) -> Any:
        return replace(action, ended=True)


class TextWithTheEnd(Changing):
    def change(self, action: ActionSegment) -> Any:
        return action if action.choice is not None else replace(action, text=action.text + "</s>")


class KnowsOneEnd(WithACopy):
    def change(self, policy: Policy) -> None:
        policy.adapter.end_of_turn = policy.adapter.end_of_turn[:1]


class TemperatureIgnored(WithACopy):
    def change(self, policy: Policy) -> None:
        policy.temperature = 1.0


class RoundedLogprobs(Changing):
    def change(self, action: ActionSegment) -> Any:
        return replace(action, logprobs=action.logprobs.round(1))


class NothingForbidden(WithACopy):
    def change(self, policy: Policy) -> None:
        policy.forbidden.zero_()


class TwentyLikeliest(WithACopy):
    def change(self, policy: Policy) -> None:
        whole = policy.next_token_logprobs

        def cut(hidden: Tensor) -> Tensor:
            logprobs = whole(hidden)
            least = logprobs.topk(20, dim=-1).values[:, -1:]
            return torch.log_softmax(logprobs.masked_fill(logprobs < least, -torch.inf), dim=-1)

        policy.next_token_logprobs = cut  # type: ignore[method-assign]


class UniformChoices(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        generator = np.random.default_rng(seed)
        answers = super().generate(requests, seed)
        for item, actions in zip(requests, answers, strict=True):
            for place in range(len(actions) if item.choices is not None else 0):
                assert item.choices is not None
                index = int(generator.integers(len(item.choices)))
                actions[place] = replace(
                    actions[place], choice=index, tokens=item.choices[index], text=item.choice_texts[index]
                )
        return answers


class NeverSynced(Healthy):
    def sync(self, policy: Policy) -> None:
        return


class SyncedOnce(Healthy):
    """Keeps a copy, and takes a policy that it knows for unchanged."""

    known: Policy | None = None

    def sync(self, policy: Policy) -> None:
        if policy is not self.known:
            self.known, self._policy = policy, copy.deepcopy(policy)


class GradientsOff(Healthy):
    def __init__(self, setup: RolloutSetup) -> None:
        super().__init__(setup)
        setup.policy.requires_grad_(False)


class HalvesTheWeights(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        answers = super().generate(requests, seed)
        self._policy.half().float()
        return answers


class LeavesGradients(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        for parameter in self._policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return super().generate(requests, seed)


class CutsTheContext(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().generate([self._cut(item) for item in requests], seed)

    def _cut(self, item: Request) -> Request:
        room = self._policy.adapter.context_length - item.max_tokens
        first: Any = item.context[0]
        return replace(item, context=(replace(first, tokens=first.tokens[-room:]), *item.context[1:]))


class NamesNoRequest(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        try:
            return super().generate(requests, seed)
        except ModelError:
            raise ModelError("too long") from None


class AssertsTheLength(Healthy):
    def generate(self, requests: Sequence[Request], seed: int | None) -> Actions:
        try:
            return super().generate(requests, seed)
        except ModelError:
            raise ValueError("too long") from None


MUTANTS: dict[str, list[tuple[type[Healthy], str]]] = {
    "every_request_gets_its_actions_in_order": [
        (ChoicesFirst, r"gave \[1, 2, 3, 4, 1\] actions for requests of \[3, 1, 4, 2, 1\]"),
        (OneOfEach, r"gave \[1, 1, 1, 1, 1\] actions"),
        (DoublePrecision, "expected float32"),
        (LogprobOfEveryChoiceToken, "one for each of 1 decisions"),
        (ChoiceOffByOne, "of another"),
        (ChoicesCutOff, "a choice is a whole answer"),
    ],
    "the_same_seed_gives_the_same_actions_and_another_seed_others": [
        (SeedIgnored, "the same seed gave other actions"),
        (AlwaysTheSameSeed, "another seed gave the same actions"),
        (GlobalRandomState, "torch's global random state"),
    ],
    "the_members_of_a_group_are_drawn_one_by_one": [(GroupOfCopies, "one was copied to all")],
    "without_a_seed_actions_are_the_most_probable_ones": [
        (NeverGreedy, "the most probable ones are"),
        (RandomWithoutASeed, "two calls gave different actions"),
    ],
    "neighbours_do_not_change_an_answer": [(ShortestLimitForAll, "sampled beside it")],
    "answers_end_with_the_end_of_turn_or_at_their_limit": [
        (OneTokenTooMany, "its max_tokens is"),
        (OneTokenTooFew, "was cut at"),
        (AlwaysEnded, "`ended` is True"),
        (TextWithTheEnd, "its tokens decode to"),
        (KnowsOneEnd, "goes on after the end|`ended` is False"),
    ],
    "log_probs_are_those_of_the_policy": [
        (TemperatureIgnored, "another temperature"),
        (RoundedLogprobs, "log-probs differ by"),
    ],
    "nothing_forbidden_is_sampled": [(NothingForbidden, "forbidden tokens .* were sampled")],
    "choices_come_as_often_as_the_policy_says": [
        (TemperatureIgnored, "choice . came"),
        (UniformChoices, "choice . came"),
    ],
    "tokens_come_as_often_as_the_policy_says": [
        (TemperatureIgnored, "token .* came"),
        (TwentyLikeliest, "token .* came"),
    ],
    "after_a_sync_the_new_weights_sample": [
        (NeverSynced, r"after sync\(\) with another policy"),
        (SyncedOnce, r"after a step and sync\(\)"),
    ],
    "sampling_changes_no_weight_and_leaves_no_gradient": [
        (HalvesTheWeights, "changed the weights"),
        (LeavesGradients, "left gradients on"),
        (GradientsOff, "switched off the gradients"),
    ],
    "a_request_that_does_not_fit_is_refused_by_name": [
        (CutsTheContext, "something was cut"),
        (NamesNoRequest, "does not name the request"),
        (AssertsTheLength, "raised ValueError"),
    ],
}


class Suite(EngineConformance):
    """The suite on a class of this file."""

    role = "rollout"

    def __init__(self, made: type[Healthy]) -> None:
        self.made = made

    def create(self, setup: Any = None) -> Healthy:
        return self.made(setup)


def test_every_check_has_a_mutant() -> None:
    own = [name for name in checks_of(RolloutChecks) if name not in checks_of(Conformance)]
    assert [f"test_{check}" for check in MUTANTS] == own


@pytest.mark.parametrize(
    ("check", "mutant", "message"),
    [(check, *mutant) for check, mutants in MUTANTS.items() for mutant in mutants],
)
def test_a_mutant_is_caught(check: str, mutant: type[Healthy], message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        getattr(Suite(mutant), f"test_{check}")()


def test_a_healthy_engine_passes() -> None:
    check_rollout_engine(Healthy)


def test_an_engine_may_return_no_log_probs_but_samples_from_the_right_weights() -> None:
    class WithoutLogprobs(Changing):
        def change(self, action: ActionSegment) -> Any:
            return replace(action, logprobs=np.zeros_like(action.logprobs))

    check_rollout_engine(WithoutLogprobs, logprobs=False)
    with pytest.raises(ConformanceError, match="log probs are those of the policy"):
        check_rollout_engine(WithoutLogprobs)


def test_every_failure_is_listed() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_rollout_engine(TemperatureIgnored)
    assert "choices come as often as the policy says: choice" in str(caught.value)
    assert "tokens come as often as the policy says: token" in str(caught.value)
