"""Where episodes are cut: turns, tokens, and what the model can read."""

from __future__ import annotations

from typing import Any

import pytest

from rllava_core.errors import ModelError
from rllava_core.mdp.messages import Message, Transition
from rllava_core.mdp.trajectory import ContextSegment

from .playing import (
    LAST,
    OTHER,
    Build,
    Saying,
    Scripted,
    endless,
    episodes,
    over,
    same,
    shown,
    starts,
    tokens_of,
)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_an_episode_is_cut_at_the_greatest_number_of_turns(build_toy: Build, limit: int) -> None:
    """In the state that the environment had come to, whose value is not nothing."""
    parts = build_toy()

    played = episodes(parts, endless(), Saying(parts), max_turns=limit).play(starts(2), 2, seed=0)

    for item in played:
        assert (len(item.turns), item.terminated, item.truncation) == (limit, False, "turns")
        assert item.final is not None
        assert same(item.final[:-1], (*item.turns[-1].context, item.turns[-1].action))
        assert isinstance(item.final[-1], ContextSegment)
        assert item.final[-1].text == "user: on[image]"
        assert item.outcome == (OTHER,)
        assert item.rewards == (0.5,) * limit


@pytest.mark.parametrize(
    ("last", "reason"), [(over(), None), (shown("on", truncated=True), "environment"), (shown("on"), "turns")]
)
def test_an_episode_that_ends_in_its_last_turn_is_not_cut_by_the_limit(
    build_toy: Build, last: Transition, reason: str | None
) -> None:
    parts = build_toy()

    [played] = episodes(parts, lambda: Scripted(shown("on"), last), max_turns=2).play(starts(1), 1, seed=0)

    assert (len(played.turns), played.terminated, played.truncation) == (2, reason is None, reason)
    assert (played.final is None) == played.terminated


def test_an_episode_that_says_both_is_terminated(build_toy: Build) -> None:
    parts = build_toy()
    [played] = episodes(parts, lambda: Scripted(over(truncated=True))).play(starts(1), 1, seed=0)

    assert (played.terminated, played.truncation, played.final) == (True, None, None)


# Each observation has 6 tokens, each answer 2, and an answer may have 4: before turn n, 8·(n − 1) + 6 tokens are there.
@pytest.mark.parametrize("history", ["all", 1, 3])
@pytest.mark.parametrize(("limit", "turns"), [(1, 1), (17, 1), (18, 2), (25, 2), (26, 3), (34, 4), (41, 4), (42, 5)])
def test_an_episode_is_cut_before_it_could_have_more_tokens_than_allowed(
    build_toy: Build, limit: int, turns: int, history: Any
) -> None:
    """All that were shown and sampled count, whether or not they are still seen."""
    parts = build_toy()
    environment = Scripted(*[shown("abc")] * 300, opening=(Message.user("abc"),))

    player = episodes(parts, lambda: environment, Saying(parts), max_episode_tokens=limit, history=history)
    [played] = player.play(starts(1), 1, seed=0)

    assert (len(played.turns), played.truncation) == (turns, "tokens")
    assert len(environment.actions) == turns
    assert played.final is not None


def test_choices_need_less_room_than_a_text(build_toy: Build) -> None:
    parts = build_toy()

    def turns(choices: tuple[str, ...] | None) -> int:
        environment = Scripted(*[shown("abc", choices=choices)] * 300, choices=choices)
        player = episodes(parts, lambda: environment, Saying(parts), max_episode_tokens=60, max_new_tokens=30)
        return len(player.play(starts(1), 1, seed=0)[0].turns)

    assert turns(None) < turns(("a", "b"))


# The model reads 256 tokens; an opening of "seed 10" with a picture has 14, an answer 2.
@pytest.mark.parametrize(("size", "turns", "reason"), [(233, 2, None), (234, 1, "context"), (237, 1, "context")])
def test_an_episode_is_cut_where_the_model_could_not_answer_any_more(
    build_toy: Build, size: int, turns: int, reason: str | None
) -> None:
    """As long as it can read the state that the episode is left in."""
    parts = build_toy()

    def make() -> Scripted:
        return Scripted(shown("x" * size), over())

    [played] = episodes(parts, make, Saying(parts)).play(starts(1), 1, seed=0)

    assert (len(played.turns), played.truncation) == (turns, reason)
    if reason is not None:
        assert played.final is not None
        assert len(tokens_of(played.final)) == 14 + 2 + size + 3 <= parts.adapter.context_length
        assert parts.trainer.evaluate([played]).logprobs.shape == (2,)


@pytest.mark.parametrize("truncated", [False, True])
def test_a_state_that_the_model_cannot_read_leaves_the_episode_one_turn_earlier(
    build_toy: Build, truncated: bool
) -> None:
    parts = build_toy()

    def make() -> Scripted:
        return Scripted(shown("on", OTHER), shown(LAST, "x" * 300, truncated=truncated), over())

    [played] = episodes(parts, make, Saying(parts, "a", "b")).play(starts(1), 1, seed=0)

    assert ([turn.action.text for turn in played.turns], played.truncation) == (["a"], "context")
    assert played.final is not None
    assert same(played.final[:2], (*played.turns[0].context, played.turns[0].action))
    assert played.outcome == (OTHER,)


def test_a_second_turn_that_can_never_be_read_is_a_mistake_of_the_user(build_toy: Build) -> None:
    """No episode would be left to learn from."""
    parts = build_toy()

    with pytest.raises(ModelError, match=r"^episode with seed 10, turn 2: 319 tokens, the model's context is 256; use"):
        episodes(parts, lambda: Scripted(shown("x" * 300), over()), Saying(parts)).play(starts(1), 1, seed=0)


def test_a_window_needs_no_more_room_the_longer_the_episode_is(build_toy: Build) -> None:
    parts = build_toy()

    def turns(history: Any) -> tuple[int, str | None]:
        [played] = episodes(parts, endless("x" * 40), Saying(parts), history=history, max_turns=20).play(
            starts(1), 1, seed=0
        )
        return len(played.turns), played.truncation

    assert turns(1) == turns(2) == (20, "turns")
    assert turns("all") == (4, "context")
