"""Episodes: what the policy is shown, what it may answer, and what happens when an environment misbehaves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rllava_core.errors import DataError, ModelError, TrainingError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_core.testing.tiny import END
from rllava_core.training.build import Parts
from rllava_core.training.episodes import Episodes, Start

Build = Callable[..., Parts]

PICTURE = Image.from_array(np.full((8, 8), 90, np.uint8), "a picture")


class Scripted:
    """Says what it is told and remembers what it is asked."""

    def __init__(self, choices: tuple[str, ...] | None = None, transition: Transition | None = None) -> None:
        self.choices = choices
        self.transition = transition or Transition(1.5, None, terminated=True, info={"success": True})
        self.seeds: list[int] = []
        self.actions: list[Action] = []

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        self.seeds.append(seed)
        return Observation((Message.user(PICTURE, f"seed {seed}"),), self.choices)

    def step(self, action: Action) -> Transition:
        self.actions.append(action)
        return self.transition


def episodes(parts: Parts, make: Callable[[], Any] | None = None, tokens: int = 4) -> Episodes:
    return Episodes(parts.adapter, parts.media, parts.sampler, make or parts.task.environment, tokens)


def starts(count: int, first: int = 10) -> list[Start]:
    return [Start(None, first + number) for number in range(count)]


def test_the_members_of_a_group_share_start_and_prompt(build_toy: Build) -> None:
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted(("a", "b")))
        return made[-1]

    played = episodes(build_toy(), make).play(starts(3), 4, seed=0)

    assert [item.group for item in played] == [0] * 4 + [1] * 4 + [2] * 4
    assert [item.seed for item in played] == [10] * 4 + [11] * 4 + [12] * 4
    for group in range(3):
        members = played[4 * group : 4 * group + 4]
        assert all(member.prompt is members[0].prompt for member in members)
    assert played[0].prompt.text == "user: [image]seed 10"
    # Each episode has an environment to itself.
    assert [environment.seeds for environment in made] == [[10]] * 4 + [[11]] * 4 + [[12]] * 4
    assert all(len(environment.actions) == 1 for environment in made)


def test_a_trajectory_holds_what_the_environment_answered(build_toy: Build) -> None:
    environment = Scripted(("a", "b"), Transition(2.5, None, terminated=False, truncated=True, info={"k": 1}))

    [played] = episodes(build_toy(), lambda: environment).play(starts(1), 1, seed=0)

    assert (played.rewards, played.terminated, played.truncated, played.info) == ((2.5,), False, True, {"k": 1})
    [action] = environment.actions
    assert action == Action(played.answer, played.actions[0].choice, ended=True)
    assert played.answer in ("a", "b")


def test_the_same_seed_gives_the_same_episodes(build_toy: Build) -> None:
    parts = build_toy("task.choices=")

    def answers(seed: int | None) -> list[tuple[int, ...]]:
        return [item.actions[0].tokens for item in episodes(parts, Scripted).play(starts(2), 4, seed=seed)]

    assert answers(3) == answers(3)
    assert answers(3) != answers(4)
    greedy = answers(None)
    assert greedy == answers(None)
    assert greedy[:4] == [greedy[0]] * 4


def test_an_answer_cut_at_the_limit_is_told_to_the_environment(build_toy: Build) -> None:
    environment = Scripted()
    played = episodes(build_toy("task.choices="), lambda: environment, tokens=1).play(starts(1), 8, seed=0)

    cut = [END not in item.actions[0].tokens for item in played]
    assert any(cut)
    assert [not action.ended for action in environment.actions] == cut


@pytest.mark.parametrize(
    ("choices", "ending"),
    [(("1", "2", "3"), ()), (("1", "10", "2"), (END,)), (("a", "b", "ab"), (END,)), (("ab", "ba"), ())],
)
def test_choices_that_begin_with_each_other_end_with_the_end_of_turn(
    build_toy: Build, choices: tuple[str, ...], ending: tuple[int, ...]
) -> None:
    parts = build_toy()

    [played] = episodes(parts, lambda: Scripted(choices)).play(starts(1), 1, seed=0)

    encoded = played.actions[0].choices
    assert encoded == tuple(parts.adapter.encode(choice) + ending for choice in choices)


def failing(where: str, error: Exception) -> Callable[[], Scripted]:
    class Failing(Scripted):
        def reset(self, *, seed: int, example: Example | None) -> Observation:
            if where == "reset":
                raise error
            return super().reset(seed=seed, example=example)

        def step(self, action: Action) -> Transition:
            raise error

    return lambda: Failing(("a", "b"))


@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_environment_that_raises_is_named_with_its_episode(build_toy: Build, where: str) -> None:
    player = episodes(build_toy(), failing(where, ZeroDivisionError("oh")))

    with pytest.raises(TrainingError) as caught:
        player.play(starts(2), 2, seed=0)

    message = r"episode with seed 10: the environment raised ZeroDivisionError: oh \(test_episodes\.py:\d+\)"
    assert re.fullmatch(message, str(caught.value))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_error_for_the_user_passes_through(build_toy: Build, where: str) -> None:
    with pytest.raises(DataError, match=r"^mine$"):
        episodes(build_toy(), failing(where, DataError("mine"))).play(starts(1), 1, seed=0)


def test_an_environment_that_goes_on_is_refused_by_name(build_toy: Build) -> None:
    going_on = Transition(0.0, Observation((Message.user("more"),)), terminated=False)

    with pytest.raises(TrainingError, match=r"^episode with seed 10: the environment goes on after one turn"):
        episodes(build_toy(), lambda: Scripted(("a", "b"), going_on)).play(starts(1), 1, seed=0)


def test_an_image_that_the_model_cannot_take_is_named_with_its_example(build_toy: Build) -> None:
    small = Example("train.jsonl:7", {"question": "?"}, (Image.from_array(np.zeros((2, 9), np.uint8), "tiny.png"),))

    with pytest.raises(DataError, match=r"^train\.jsonl:7: tiny\.png: smaller than 4 pixels"):
        episodes(build_toy()).play([Start(small, 0)], 1, seed=0)


@pytest.mark.parametrize("overrides", [(), ("task.choices=",)])
def test_a_prompt_longer_than_the_context_is_named(build_toy: Build, overrides: tuple[str, ...]) -> None:
    long = Example("train.jsonl:7", {"question": "x" * 300})

    with pytest.raises(ModelError, match=r"^train\.jsonl:7: 30\d tokens, the model's context is 256; use"):
        episodes(build_toy(*overrides)).play([Start(long, 0)], 1, seed=0)


def example(answer: str | None, choices: tuple[str, ...] | None = None) -> Start:
    return Start(Example("train.jsonl:7", {"question": "?"}, (PICTURE,), answer, choices), 5)


def test_a_demonstration_is_the_examples_answer(build_toy: Build) -> None:
    parts = build_toy("task.choices=")

    free, chosen = episodes(parts).demonstrate([example("ab"), example("2", ("1", "2"))])

    assert free.actions[0].tokens == (*parts.adapter.encode("ab"), END)
    assert (free.answer, free.decisions, free.group) == ("ab", 3, 0)
    assert (chosen.actions[0].choice, chosen.answer, chosen.decisions, chosen.group) == (1, "2", 1, 1)
    assert not np.concatenate([free.behaviour_logprobs, chosen.behaviour_logprobs]).any()


def test_a_demonstration_needs_an_answer_among_the_choices(build_toy: Build) -> None:
    player = episodes(build_toy())

    with pytest.raises(DataError, match=r"^train\.jsonl:7: has no answer to learn from"):
        player.demonstrate([example(None)])
    with pytest.raises(DataError, match=r"^train\.jsonl:7: answer 'pink' is none of the choices red, green, blue"):
        player.demonstrate([example("pink")])
    with pytest.raises(DataError, match=r"^episode with seed 3: has no answer"):
        episodes(build_toy(), Scripted).demonstrate([Start(None, 3)])


@pytest.mark.parametrize(("method", "expected"), [("reset", "Observation"), ("step", "Transition")])
def test_an_environment_that_returns_something_else_is_told_what_is_expected(
    build_toy: Build, method: str, expected: str
) -> None:
    environment: Any = Scripted(("a", "b"), Transition(0.0, None, terminated=True))
    setattr(environment, method, lambda *_, **__: Message.user("hello"))

    with pytest.raises(TrainingError) as caught:
        episodes(build_toy(), lambda: environment).play(starts(1), 1, seed=0)

    assert str(caught.value) == (
        f"episode with seed 10: the environment's {method}() returned a Message; expected a {expected}"
    )
