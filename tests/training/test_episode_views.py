"""What the policy is shown in a turn of an episode, and which requests that makes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rllava_core.errors import TrainingError
from rllava_core.mdp.messages import Message, Observation, Transition
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment
from rllava_core.policy.sampling import Request
from rllava_core.testing.tiny import END, START

from .playing import (
    Build,
    Saying,
    Scripted,
    episodes,
    failing,
    over,
    seen_in,
    shown,
    starts,
    tokens_of,
)

SYSTEM = Message("system", Message.user("Be brief.").parts)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        (
            "all",
            [
                ["system: Be brief.\nuser: 0"],
                ["system: Be brief.\nuser: 0", "a", "user: 1"],
                ["system: Be brief.\nuser: 0", "a", "user: 1", "b", "user: 2"],
                ["system: Be brief.\nuser: 0", "a", "user: 1", "b", "user: 2", "c", "user: 3"],
            ],
        ),
        (
            2,
            [
                ["system: Be brief.\nuser: 0"],
                ["system: Be brief.\nuser: 0", "a", "user: 1"],
                ["system: Be brief.\nuser: 1", "b", "user: 2"],
                ["system: Be brief.\nuser: 2", "c", "user: 3"],
            ],
        ),
        (
            1,
            [
                ["system: Be brief.\nuser: 0"],
                ["system: Be brief.\nuser: 1"],
                ["system: Be brief.\nuser: 2"],
                ["system: Be brief.\nuser: 3"],
            ],
        ),
        (
            9,
            [
                ["system: Be brief.\nuser: 0"],
                ["system: Be brief.\nuser: 0", "a", "user: 1"],
                ["system: Be brief.\nuser: 0", "a", "user: 1", "b", "user: 2"],
                ["system: Be brief.\nuser: 0", "a", "user: 1", "b", "user: 2", "c", "user: 3"],
            ],
        ),
    ],
)
def test_the_history_is_a_window_of_turns_with_the_system_messages_in_view(
    build_toy: Build, history: Any, expected: list[list[str]]
) -> None:
    parts = build_toy()

    def make() -> Scripted:
        opening = (SYSTEM, Message.user("0"))
        return Scripted(shown("1"), shown("2"), shown("3", truncated=True), opening=opening)

    player = episodes(parts, make, Saying(parts, "a", "b", "c"), history=history)
    [played] = player.play(starts(1), 1, seed=0)

    assert seen_in(played, final=True) == expected
    assert played.truncation == "environment"
    # A window looks like a conversation that begins there.
    opening = played.final[0] if played.final else None
    assert isinstance(opening, ContextSegment)
    assert opening.tokens[: len("Be brief.") + 2] == (START, *b"Be brief.", END)
    assert tokens_of(played.final or ())[-4:] == (START, ord("3"), END, START)


def test_a_system_message_of_a_later_observation_leaves_with_it(build_toy: Build) -> None:
    parts = build_toy()
    later = Observation((Message("system", Message.user("Hurry.").parts), Message.user("1")))

    def make() -> Scripted:
        return Scripted(
            Transition(0.0, later, terminated=False), shown("2"), over(), opening=(SYSTEM, Message.user("0"))
        )

    [played] = episodes(parts, make, Saying(parts), history=1).play(starts(1), 1, seed=0)

    assert seen_in(played)[1:] == [["system: Be brief.\nsystem: Hurry.\nuser: 1"], ["system: Be brief.\nuser: 2"]]


# Requests.


def test_members_that_see_the_same_make_one_request(build_toy: Build) -> None:
    """Until their actions tell them apart."""
    parts = build_toy()
    sampler = Saying(parts)

    def make() -> Scripted:
        return Scripted(shown("on"), over())

    played = episodes(parts, make, sampler).play(starts(2), 3, seed=0)

    assert [[request.count for request in requests] for requests, _, _ in sampler.calls] == [[3, 3], [1] * 6]
    assert len({id(action) for item in played for action in item.actions}) == 12


def test_equal_observations_of_different_episodes_make_one_request(build_toy: Build) -> None:
    """Also later ones, where nothing of what was different is seen any more."""
    parts = build_toy()
    sampler = Saying(parts)

    def make() -> Scripted:
        return Scripted(shown("on"), over(), opening=(Message.user("Go."),))

    episodes(parts, make, sampler, history=1).play(starts(2), 2, seed=0)

    assert [[request.count for request in requests] for requests, _, _ in sampler.calls] == [[4], [4]]


def test_equal_observations_with_other_choices_are_other_requests(build_toy: Build) -> None:
    parts = build_toy()
    sampler = Saying(parts, "a")
    offered = iter([("a", "b"), ("a", "c"), ("a", "b")])

    played = episodes(parts, lambda: Scripted(choices=next(offered), opening=(Message.user("Go."),)), sampler).play(
        starts(3), 1, seed=0
    )

    [(requests, _, _)] = sampler.calls
    assert [(request.count, request.choice_texts) for request in requests] == [(2, ("a", "b")), (1, ("a", "c"))]
    assert [item.actions[0].choices for item in played] == [
        tuple(tuple(choice.encode()) for choice in choices) for choices in (("a", "b"), ("a", "c"), ("a", "b"))
    ]


def test_what_is_kept_is_dropped_when_the_episodes_are_over(build_toy: Build) -> None:
    parts = build_toy()
    sampler = Saying(parts)
    player = episodes(parts, lambda: Scripted(shown("on"), over()), sampler)

    player.play(starts(1), 1, seed=0)
    assert sampler.forgot == 1
    with pytest.raises(TrainingError):
        episodes(parts, failing("step", ValueError("oh")), sampler).play(starts(1), 1, seed=0)
    assert sampler.forgot == 2


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_log_probs_that_are_not_numbers_are_named_with_their_episode(build_toy: Build, broken: float) -> None:
    parts = build_toy()

    class Damaged(Saying):
        def say(self, answer: str, request: Request) -> ActionSegment:
            said = super().say(answer, request)
            return replace(said, logprobs=np.full_like(said.logprobs, broken))

    with pytest.raises(TrainingError, match=r"^episode with seed 10: the policy's log-probs are not finite"):
        episodes(parts, Scripted, Damaged(parts)).play(starts(1), 1, seed=0)
