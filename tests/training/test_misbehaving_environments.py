"""Environments and examples that episodes cannot go on with: they are named."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from rllava_core.errors import DataError, ModelError, TrainingError
from rllava_core.mdp.environment import Failure, Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message

from .playing import (
    OTHER,
    Build,
    Flaky,
    Saying,
    Scripted,
    episodes,
    failing,
    over,
    same,
    seen_in,
    shown,
    starts,
)


@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_environment_that_raises_is_named_with_its_episode(build_toy: Build, where: str) -> None:
    player = episodes(build_toy(), failing(where, ZeroDivisionError("oh")))

    with pytest.raises(TrainingError) as caught:
        player.play(starts(2), 2, seed=0)

    message = r"episode with seed 10: the environment raised ZeroDivisionError: oh \(playing\.py:\d+\)"
    assert re.fullmatch(message, str(caught.value))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_error_for_the_user_passes_through(build_toy: Build, where: str) -> None:
    with pytest.raises(DataError, match=r"^mine$"):
        episodes(build_toy(), failing(where, DataError("mine"))).play(starts(1), 1, seed=0)


@pytest.mark.parametrize(("method", "expected"), [("reset", "an Observation"), ("step", "a Transition")])
def test_an_environment_that_returns_something_else_is_told_what_is_expected(
    build_toy: Build, method: str, expected: str
) -> None:
    environment: Any = Scripted(over(0.0), choices=("a", "b"))
    setattr(environment, method, lambda *_, **__: Message.user("hello"))

    with pytest.raises(TrainingError) as caught:
        episodes(build_toy(), lambda: environment).play(starts(1), 1, seed=0)

    assert str(caught.value) == (
        f"episode with seed 10: the environment's {method}() returned Message(role='user', "
        f"parts=(TextPart(text='hello'),)) (Message); expected {expected}"
    )


def test_an_environment_that_fails_in_the_middle_ends_its_own_episode_before_the_failed_action(
    build_toy: Build,
) -> None:
    parts = build_toy()
    told: list[tuple[str, Failure]] = []
    pool = Flaky(lambda: Scripted(shown("1", OTHER), shown("2"), over()), {(1, 2): "did not answer for 30 s"})

    played = episodes(parts, pool, Saying(parts, "a", "b", "c"), lambda *what: told.append(what)).play(
        starts(3), 1, seed=0
    )

    assert [len(item.turns) for item in played] == [3, 1, 3]
    assert [item.truncation for item in played] == [None, "failure", None]
    broken = played[1]
    assert (broken.seed, broken.group, broken.terminated, broken.outcome) == (11, 1, False, (OTHER,))
    # The state in which the action was decided that never took place.
    assert broken.final is not None
    assert same(broken.final[:2], (*broken.turns[0].context, broken.turns[0].action))
    assert seen_in(broken, final=True)[-1][-1] == "user: 1[image]"
    assert told == [("episode with seed 11", Failure("did not answer for 30 s"))]
    assert pool.stepped == [[0, 1, 2], [0, 1, 2], [0, 2]]


@pytest.mark.parametrize("turn", [0, 1])
def test_an_episode_that_fails_before_its_first_turn_is_done_is_left_out(build_toy: Build, turn: int) -> None:
    parts = build_toy()
    told: list[str] = []
    pool = Flaky(lambda: Scripted(shown("1"), over()), {(0, turn): "died", (3, turn): "died"})

    played = episodes(parts, pool, report=lambda name, failure: told.append(name)).play(starts(2), 2, seed=0)

    assert [(item.group, item.seed) for item in played] == [(0, 10), (1, 11)]
    assert [len(item.turns) for item in played] == [2, 2]
    assert told == ["episode with seed 10", "episode with seed 11"]
    assert pool.stepped[-1] == [1, 2]


def test_nothing_is_left_where_all_fail(build_toy: Build) -> None:
    parts = build_toy()
    pool = Flaky(Scripted, {(0, 0): "died", (1, 1): "died"})

    assert episodes(parts, pool).play(starts(2), 1, seed=0) == []


def test_an_image_that_the_model_cannot_take_is_named_with_its_example(build_toy: Build) -> None:
    small = Example("train.jsonl:7", {"question": "?"}, (Image.from_array(np.zeros((2, 9), np.uint8), "tiny.png"),))

    with pytest.raises(DataError, match=r"^train\.jsonl:7: tiny\.png: smaller than 4 pixels"):
        episodes(build_toy()).play([Start(small, 0)], 1, seed=0)


def test_an_image_of_a_later_turn_that_the_model_cannot_take_is_named(build_toy: Build) -> None:
    parts = build_toy()
    small = Image.from_array(np.zeros((2, 9), np.uint8), "tiny.png")

    with pytest.raises(DataError, match=r"^episode with seed 10: tiny\.png: smaller than 4 pixels"):
        episodes(parts, lambda: Scripted(shown(small), over()), Saying(parts)).play(starts(1), 1, seed=0)


@pytest.mark.parametrize("overrides", [(), ("task.choices=",)])
def test_a_prompt_longer_than_the_context_is_named(build_toy: Build, overrides: tuple[str, ...]) -> None:
    long = Example("train.jsonl:7", {"question": "x" * 300})

    with pytest.raises(ModelError, match=r"^train\.jsonl:7: 30\d tokens, the model's context is 256; use"):
        episodes(build_toy(*overrides)).play([Start(long, 0)], 1, seed=0)
