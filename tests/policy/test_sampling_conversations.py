"""Conversations that go on: what was read is kept, and what is sampled is as if it was read anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rllava_core.mdp.trajectory import ActionSegment, Segment
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Sampler
from rllava_core.testing.tiny import END

from .asking import ROUNDING, ask, ask_choices


class Conversations:
    """Several under way, which are asked again and again by one sampler."""

    def __init__(self, toy: Any, policy: Policy, count: int = 3) -> None:
        self.toy = toy
        self.policy = policy
        self.sampler = Sampler(policy, MediaStore(policy.adapter))
        self.contexts: list[tuple[Segment, ...]] = [
            (toy.context("Go"[: 1 + number % 2], toy.picture(8, 4 + 4 * number, number)),) for number in range(count)
        ]

    def ask(
        self, choices: tuple[str, ...] | None = None, seed: int | None = 0, limit: int = 512, numbers: Any = None
    ) -> list[ActionSegment]:
        """An answer of each, which it goes on with."""
        numbers = range(len(self.contexts)) if numbers is None else numbers
        requests = [
            ask(*self.contexts[number], max_tokens=3)
            if choices is None
            else ask_choices(*self.contexts[number], choices=choices)
            for number in numbers
        ]
        actions = [action for [action] in self.sampler.sample(requests, seed, max_sequences=limit)]
        for number, action in zip(numbers, actions, strict=True):
            self.contexts[number] = (*self.contexts[number], action)
        return actions

    def show(self, text: str = "on", picture: bool = True) -> None:
        """Show something new in every one that waits for it."""
        for number, context in enumerate(self.contexts):
            if isinstance(context[-1], ActionSegment):
                image = [self.toy.picture(8, 8, 10 * len(context) + number)] if picture else []
                self.contexts[number] = (*context, self.toy.context(text, *image))

    def assert_exact(self, actions: list[ActionSegment], numbers: Any = None) -> None:
        """The log-probs are those of whole conversations, read anew."""
        plain = self.toy.Plain(self.policy.model)
        numbers = range(len(self.contexts)) if numbers is None else numbers
        for number, action in zip(numbers, actions, strict=True):
            alone = self.toy.windows((*self.contexts[number][:-1], action))
            expected = plain.decisions(alone).logprobs.detach().numpy()
            np.testing.assert_allclose(action.logprobs, expected, rtol=ROUNDING)


@pytest.mark.parametrize("limit", [1, 2, 512])
def test_a_conversation_that_goes_on_is_sampled_as_if_it_was_read_anew(toy: Any, limit: int) -> None:
    """Texts that are cut and that end, choices, pictures and none, over five turns."""
    bench = Conversations(toy, toy.policy(bias={END: 3.0}))
    for turn, choices in enumerate([None, ("yes", "no", "n"), None, None, ("1", "2")]):
        bench.assert_exact(bench.ask(choices, seed=turn, limit=limit))
        bench.show("?" * (turn + 1), picture=turn % 2 == 0)


def test_of_a_conversation_that_goes_on_only_what_is_new_is_read(toy: Any) -> None:
    policy = toy.policy(bias={END: -100.0})
    bench = Conversations(toy, policy, count=1)
    bench.ask(("a", "b"))
    bench.show("on")
    policy.adapter.runs.clear()

    bench.ask(("a", "b"))

    assert policy.adapter.runs == [((1, 1 + len(bench.contexts[0][2].tokens)), 4)]


def test_two_that_continue_one_conversation_share_what_was_read(toy: Any) -> None:
    """As the members of a group do after their first turn."""
    policy = toy.policy()
    sampler = Sampler(policy, MediaStore(policy.adapter))
    prompt, shown = toy.context("Go", toy.picture(8, 8)), toy.context("on")
    [actions] = sampler.sample([ask_choices(prompt, choices=("a", "b"), count=4)], 0)
    policy.adapter.runs.clear()

    requests = [ask_choices(prompt, action, shown, choices=("a", "b")) for action in actions]
    answers = sampler.sample(requests, 1)

    # Actions that are equal are one prefix.
    distinct = len({action.tokens for action in actions})
    assert policy.adapter.runs == [((distinct, 1 + len(shown.tokens)), 0)]
    plain = toy.Plain(policy.model)
    for action, [answer] in zip(actions, answers, strict=True):
        expected = plain.decisions(toy.windows((prompt, action, shown, answer))).logprobs.detach().numpy()
        np.testing.assert_allclose(answer.logprobs, expected, rtol=ROUNDING)


def test_conversations_that_end_and_begin_are_told_apart(toy: Any) -> None:
    policy = toy.policy(bias={END: 2.0})
    bench = Conversations(toy, policy, count=4)
    bench.assert_exact(bench.ask())
    bench.show()
    bench.contexts[1] = (toy.context("A new one", toy.picture(12, 4, 99)),)
    bench.assert_exact(bench.ask(seed=1))
    bench.show()
    # One is not asked in this turn, so it is read anew in the next.
    bench.assert_exact(bench.ask(seed=2, numbers=[0, 2, 3]), [0, 2, 3])
    bench.show()
    bench.assert_exact(bench.ask(("l", "r"), seed=3))


def test_equal_segments_that_are_not_the_same_are_read_anew(toy: Any) -> None:
    """A window may look like a conversation that was read with other turns before it: its positions are its own."""
    policy = toy.policy()
    sampler = Sampler(policy, MediaStore(policy.adapter))
    [[action]] = sampler.sample([ask_choices(toy.context("Go"), choices=("a", "b"))], None)
    policy.adapter.runs.clear()

    sampler.sample([ask_choices(toy.context("Go"), action, toy.context("on"), choices=("a", "b"))], None)

    assert policy.adapter.runs == [((1, len(toy.context("Go").tokens) + 1 + len(toy.context("on").tokens)), 0)]


def test_nothing_is_kept_after_forget(toy: Any) -> None:
    policy = toy.policy()
    bench = Conversations(toy, policy, count=2)
    bench.ask(("a", "b"))
    bench.show()
    bench.sampler.forget()
    policy.adapter.runs.clear()
    whole = max(sum(len(segment.tokens) for segment in context) for context in bench.contexts)

    bench.assert_exact(bench.ask(("a", "b")))

    assert [shape for shape, _ in policy.adapter.runs[:1]] == [(2, whole)]


def test_what_was_kept_does_not_hold_what_the_policy_writes(toy: Any) -> None:
    """An answer of some tokens is added to a copy: others continue the same context."""
    policy = toy.policy(bias={END: 1.0})
    sampler = Sampler(policy, MediaStore(policy.adapter))
    prompt, shown = toy.context("Go", toy.picture(8, 8)), toy.context("on")
    [actions] = sampler.sample([ask(prompt, count=3, max_tokens=5)], 0)
    requests = [ask(prompt, action, shown, count=3, max_tokens=6) for action in actions]

    plain = toy.Plain(policy.model)
    for request, answers in zip(requests, sampler.sample(requests, 1), strict=True):
        for answer in answers:
            expected = plain.decisions(toy.windows((*request.context, answer))).logprobs.detach().numpy()
            np.testing.assert_allclose(answer.logprobs, expected, rtol=ROUNDING)
