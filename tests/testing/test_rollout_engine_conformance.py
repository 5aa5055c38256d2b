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
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request
from rllava_core.testing import Conformance, ConformanceError, EngineConformance, check_rollout_engine
from rllava_core.testing.conformance import checks_of
from rllava_core.testing.engines_rollout import RolloutChecks

Actions = list[list[ActionSegment]]


class Healthy(LocalRolloutEngine):
    """The local engine, typed as loosely as mutants need, which override `act`."""

    behaviour: Behaviour | None = None

    def __init__(self, setup: RolloutSetup) -> None:
        super().__init__(LocalRolloutConfig(), setup)

    def generate(self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None) -> Actions:
        self.behaviour = behaviour
        return self.act(requests, seed)

    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().generate(requests, seed, self.behaviour)


class Changing(Healthy):
    """Gives out actions that are not what was sampled."""

    def change(self, action: ActionSegment) -> Any:
        return action

    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return [[self.change(action) for action in actions] for actions in super().act(requests, seed)]


class WithACopy(Healthy):
    """Samples from a copy of the policy that is not quite the same."""

    def change(self, policy: Policy) -> None:
        raise NotImplementedError

    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        original = self._policy
        changed = copy.deepcopy(original)
        self.change(changed)
        self.sync(changed)
        try:
            return super().act(requests, seed)
        finally:
            self.sync(original)


class ChoicesFirst(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().act(sorted(requests, key=lambda item: item.choices is None), seed)


class OneOfEach(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().act([replace(item, count=1) for item in requests], seed)


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

    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        self.calls += 1
        return super().act(requests, None if seed is None else self.calls)


class AlwaysTheSameSeed(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().act(requests, None if seed is None else 0)


class GlobalRandomState(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        mixed = None if seed is None else seed + torch.initial_seed()
        return super().act(requests, mixed)


class GroupOfCopies(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        first = super().act([replace(item, count=1) for item in requests], seed)
        return [[action] * item.count for item, [action] in zip(requests, first, strict=True)]


class NeverGreedy(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().act(requests, seed or 0)


class RandomWithoutASeed(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().act(requests, torch.seed() if seed is None else seed)


class ShortestLimitForAll(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        limit = min(item.max_tokens for item in requests)
        return super().act([replace(item, max_tokens=limit) for item in requests], seed)


class OneTokenTooMany(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().act([replace(item, max_tokens=item.max_tokens + 1) for item in requests], seed)


class OneTokenTooFew(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().act([replace(item, max_tokens=max(1, item.max_tokens - 1)) for item in requests], seed)


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
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        generator = np.random.default_rng(seed)
        answers = super().act(requests, seed)
        for item, actions in zip(requests, answers, strict=True):
            for place in range(len(actions) if item.choices is not None else 0):
                assert item.choices is not None
                index = int(generator.integers(len(item.choices)))
                actions[place] = replace(
                    actions[place], choice=index, tokens=item.choices[index], text=item.choice_texts[index]
                )
        return answers


class NeverSynced(Healthy):
    known: Policy | None = None

    def sync(self, policy: Policy) -> None:
        if self.known is None:
            self.known = policy
            super().sync(policy)


class SyncedOnce(Healthy):
    """Keeps a copy, and takes a policy that it knows for unchanged."""

    known: Policy | None = None

    def sync(self, policy: Policy) -> None:
        if policy is not self.known:
            self.known = policy
            super().sync(copy.deepcopy(policy))


class ReadsTheLastObservation(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().act([replace(item, context=item.context[-1:]) for item in requests], seed)


class TurnsOfAnother(Healthy):
    """Goes on from what it has read for the request beside it."""

    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        for kept in self._sampler._kept:
            order = list(kept.rows.values())
            kept.rows.update(zip(kept.rows, order[1:] + order[:1], strict=True))
        return super().act(requests, seed)


class PositionsStartAnew(Healthy):
    """Numbers the tokens of every turn from zero."""

    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        for kept in self._sampler._kept:
            kept.next_positions[:] = [0] * len(kept.next_positions)
        return super().act(requests, seed)


class ForgetsTheWeights(Healthy):
    def forget(self) -> None:
        super().forget()
        changed = copy.deepcopy(self._policy)
        changed.temperature *= 2
        self.sync(changed)


class BehaviourIgnored(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        self.behaviour = None
        return super().act(requests, seed)


class EpsilonIgnored(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        if self.behaviour is not None:
            self.behaviour = replace(self.behaviour, epsilon=0.0)
        return super().act(requests, seed)


class ExploresWithoutASeed(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        explores = self.behaviour is not None and self.behaviour.epsilon > 0
        return super().act(requests, 0 if explores and seed is None else seed)


class CertainOfWhatItExplores(Changing):
    def change(self, action: ActionSegment) -> Any:
        explores = self.behaviour is not None and self.behaviour.epsilon > 0
        return replace(action, logprobs=np.zeros_like(action.logprobs)) if explores else action


class ValuesOfOneChoiceMore(Healthy):
    """Takes a value beyond the last choice for one of the last choice."""

    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        answers = super().act(requests, seed)
        if self.behaviour is None:
            return answers
        for item, actions in zip(requests, answers, strict=True):
            assert item.choices is not None
            last = len(item.choices) - 1
            actions[0] = replace(actions[0], choice=last, tokens=item.choices[last], text=item.choice_texts[last])
        return answers


class GradientsOff(Healthy):
    def __init__(self, setup: RolloutSetup) -> None:
        super().__init__(setup)
        setup.policy.requires_grad_(False)


class HalvesTheWeights(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        answers = super().act(requests, seed)
        self._policy.half().float()
        return answers


class LeavesGradients(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        for parameter in self._policy.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return super().act(requests, seed)


class CutsTheContext(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        return super().act([self._cut(item) for item in requests], seed)

    def _cut(self, item: Request) -> Request:
        room = self._policy.adapter.context_length - item.max_tokens
        first: Any = item.context[0]
        return replace(item, context=(replace(first, tokens=first.tokens[-room:]), *item.context[1:]))


class NamesNoRequest(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        try:
            return super().act(requests, seed)
        except ModelError:
            raise ModelError("too long") from None


class AssertsTheLength(Healthy):
    def act(self, requests: Sequence[Request], seed: int | None) -> Actions:
        try:
            return super().act(requests, seed)
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
    "a_later_turn_is_sampled_as_if_all_was_read_anew": [
        (ReadsTheLastObservation, "in turn 2 of a conversation log-probs differ"),
        (TurnsOfAnother, "in turn 2 of a conversation log-probs differ"),
        (PositionsStartAnew, "in turn 2 of a conversation log-probs differ"),
        (ForgetsTheWeights, r"after forget\(\), log-probs differ"),
    ],
    "it_acts_by_the_values_of_a_head_where_it_says_that_it_can": [
        (BehaviourIgnored, "those of the greatest values are"),
        (ValuesOfOneChoiceMore, "those of the greatest values are"),
        (EpsilonIgnored, "with epsilon 0.6 and three choices the best was taken 1.00"),
        (CertainOfWhatItExplores, "are off by .* in probability"),
        (ExploresWithoutASeed, "without a seed epsilon is 0"),
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
