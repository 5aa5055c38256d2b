"""Names of actions, a subset of them, and what free text means."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import pytest
from gymnasium import spaces

from rllava_core.errors import ConfigError
from rllava_core.mdp.messages import Action
from rllava_gymnasium.environment import Gymnasium

Make = Callable[..., Gymnasium]
Dial = Callable[..., str]


def taken(environment: Gymnasium) -> list[int]:
    """The numbers that reached the innermost environment."""
    inner: Any = environment._environment.unwrapped
    return list(inner.taken)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("left", 0),
        ("pick up", 2),
        ("LEFT", 0),
        (" \n left\t", 0),
        ("Left.", 0),
        ("left . ", 0),
        ("left..", None),
        (".left", None),
        ("left right", None),
        ("left, right", None),
        ("go left", None),
        ("pick  up", None),
        ("pickup", None),
        ("lef", None),
        ("0", None),
        ("", None),
        (".", None),
        ('"left"', None),
        ("左", None),
    ],
)
def test_what_a_text_means(text: str, number: int | None, make: Make, dial: Dial) -> None:
    environment = make(dial(), action_format="text", actions=["left", "right", "pick up"])
    assert environment.reset(seed=0, example=None).choices is None

    transition = environment.step(Action(text))

    assert taken(environment) == ([] if number is None else [number])
    assert transition.parsed == (number is not None)
    assert transition.reward == (-0.1 if number is None else 0.5)


def test_an_unparsable_text_costs_the_penalty_and_changes_nothing(make: Make, dial: Dial) -> None:
    environment = make(dial(info={"success": False}), action_format="text", unparsable_penalty=-0.25)
    environment.reset(seed=0, example=None)
    before = environment.step(Action("1"))

    transition = environment.step(Action("I would rather not"))

    assert (transition.reward, transition.parsed, transition.done) == (-0.25, False, False)
    assert transition.observation == before.observation
    assert transition.info == {"success": False}  # as it was said last
    assert taken(environment) == [1]


def test_what_was_said_of_success_does_not_outlive_the_episode(make: Make, dial: Dial) -> None:
    environment = make(dial(info={"success": True}), action_format="text")
    environment.reset(seed=0, example=None)
    environment.step(Action("1"))
    environment.reset(seed=0, example=None)
    assert environment.step(Action("?")).info == {}


@pytest.mark.parametrize(("registered", "turn_limit"), [(3, None), (None, 3), (9, 3)])
def test_unparsable_texts_count_as_turns(
    registered: int | None, turn_limit: int | None, make: Make, dial: Dial
) -> None:
    environment = make(dial(limit=registered), action_format="text", turn_limit=turn_limit)
    environment.reset(seed=0, example=None)

    transitions = [environment.step(Action(text)) for text in ("?", "0", "?")]

    assert [transition.truncated for transition in transitions] == [False, False, True]
    assert transitions[-1].observation is not None
    environment.reset(seed=0, example=None)
    assert not environment.step(Action("?")).truncated


def test_a_mapping_offers_some_of_the_actions(make: Make, dial: Dial) -> None:
    environment = make(dial(), actions={"jump": 2, "wait": 0})
    assert environment.reset(seed=0, example=None).choices == ("jump", "wait")

    environment.step(Action("jump", choice=0))
    environment.step(Action("wait", choice=1))

    assert taken(environment) == [2, 0]


def test_an_action_that_is_not_offered_cannot_be_written_either(make: Make) -> None:
    environment = make("MiniGrid-Empty-5x5-v0", actions={"left": 0, "forward": 2}, action_format="text")
    environment.reset(seed=0, example=None)
    assert environment.step(Action("forward")).parsed
    assert not environment.step(Action("toggle")).parsed


def test_numbers_may_begin_anywhere(make: Make, dial: Dial) -> None:
    environment = make(dial(action_space=spaces.Discrete(3, start=-1)), actions=["back", "stay", "on"])
    environment.reset(seed=0, example=None)
    for choice in range(3):
        environment.step(Action("", choice=choice))
    assert taken(environment) == [-1, 0, 1]


class Three(IntEnum):
    stop = 2
    go = 0
    turn = 1


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (Three, ("go", "turn", "stop")),
        (IntEnum("Two", {"a": 0, "b": 1}), ("0", "1", "2")),
        (IntEnum("Off", {"a": 1, "b": 2, "c": 3}), ("0", "1", "2")),
        (["a", "b", "c"], ("0", "1", "2")),
    ],
    ids=["fits", "too few", "other numbers", "no enum"],
)
def test_names_of_its_own_are_used_where_they_fit(own: Any, expected: Any, make: Make, dial: Dial) -> None:
    environment = make(dial(actions=own))
    assert environment.reset(seed=0, example=None).choices == expected


@pytest.mark.parametrize(
    ("space", "named"),
    [
        (spaces.Box(-1, 1, (2,)), r"Box\(-1.0, 1.0, \(2,\), float32\) \(continuous\)"),
        (spaces.MultiDiscrete([2, 3]), r"MultiDiscrete\(\[2 3\]\)"),
        (spaces.MultiBinary(4), r"MultiBinary\(4\)"),
        (spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2))), r"Tuple\(Discrete\(2\), Discrete\(2\)\)"),
    ],
    ids=lambda item: type(item).__name__,
)
def test_other_action_spaces_are_refused_by_name(space: Any, named: str, make: Make, dial: Dial) -> None:
    with pytest.raises(ConfigError, match=rf"task\.environment\.id: the action space .*{named}; supported is Discrete"):
        make(dial(action_space=space))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (["a", "b"], r"task\.environment\.actions: 2 names, but .* has 3 actions, 0 to 2"),
        ({"a": 0, "b": 3}, r"task\.environment\.actions\.b: .* has no action 3; its actions are 0 to 2"),
    ],
)
def test_names_that_do_not_fit_are_refused(actions: Any, message: str, make: Make, dial: Dial) -> None:
    with pytest.raises(ConfigError, match=message):
        make(dial(), actions=actions)


def test_a_single_action_is_nothing_to_choose_from(make: Make, dial: Dial) -> None:
    with pytest.raises(ConfigError, match="has a single action"):
        make(dial(action_space=spaces.Discrete(1)))
