"""Episodes: who is asked what and when, and what a trajectory holds of it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from rllava_core.mdp.environment import Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.testing.tiny import END

from .playing import (
    LAST,
    OTHER,
    PICTURE,
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


def test_the_members_of_a_group_share_start_and_prompt(build_toy: Build) -> None:
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted(choices=("a", "b")))
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


def test_a_group_shares_its_example(build_toy: Build) -> None:
    questions = [Start(Example(f"e{number}", {"question": f"{number}?"}), number) for number in range(2)]

    played = episodes(build_toy()).play(questions, 2, seed=0)

    assert [item.example for item in played] == [questions[number].example for number in (0, 0, 1, 1)]
    assert [item.name for item in played] == ["e0", "e0", "e1", "e1"]


def test_a_trajectory_holds_what_the_environment_answered(build_toy: Build) -> None:
    environment = Scripted(over(2.5, info={"k": 1}), choices=("a", "b"))

    [played] = episodes(build_toy(), lambda: environment).play(starts(1), 1, seed=0)

    assert (played.rewards, played.terminated, played.truncation, played.info) == ((2.5,), True, None, {"k": 1})
    assert played.final is None
    [action] = environment.actions
    assert action == Action(played.answer, played.actions[0].choice, ended=True)
    assert played.answer in ("a", "b")


def test_every_turn_holds_what_it_saw_and_what_it_brought(build_toy: Build) -> None:
    parts = build_toy()
    environment = Scripted(
        shown("Wrong.", OTHER, reward=-0.5, parsed=False, info={"why": "?"}), shown("Warm.", reward=0.25), over(1.0)
    )

    [played] = episodes(parts, lambda: environment, Saying(parts, "a", "b", "c")).play(starts(1), 1, seed=0)

    first, second, third = played.turns
    assert [turn.action.text for turn in played.turns] == ["a", "b", "c"] == [item.text for item in environment.actions]
    assert [turn.observation.text for turn in played.turns] == [
        "user: [image]seed 10",
        "user: Wrong.[image]",
        "user: Warm.",
    ]
    assert [turn.observation.images for turn in played.turns] == [(PICTURE,), (OTHER,), ()]
    assert played.rewards == (-0.5, 0.25, 1.0)
    assert [turn.parsed for turn in played.turns] == [False, True, True]
    assert [turn.info for turn in played.turns] == [{"why": "?"}, {}, {}]
    # The very same objects, which is how an engine knows what it has read.
    assert same(second.context[:2], (*first.context, first.action))
    assert same(third.context[:4], (*second.context, second.action))
    assert (played.terminated, played.truncation, played.final) == (True, None, None)


def test_episodes_of_different_lengths_are_played_together(build_toy: Build) -> None:
    parts = build_toy()
    lengths = iter((1, 3, 2))
    sampler = Saying(parts)

    def make() -> Scripted:
        return Scripted(*[shown("on")] * (next(lengths) - 1), over())

    played = episodes(parts, make, sampler).play(starts(3), 1, seed=0)

    assert [len(item.turns) for item in played] == [1, 3, 2]
    assert [[request.name[-2:] for request in requests] for requests, _, _ in sampler.calls] == [
        ["10", "11", "12"],
        ["11", "12"],
        ["11"],
    ]


def test_the_same_seed_gives_the_same_episodes(build_toy: Build) -> None:
    parts = build_toy("task.choices=")

    def answers(seed: int | None) -> list[list[tuple[int, ...]]]:
        played = episodes(parts, lambda: Scripted(shown("on"), over())).play(starts(2), 4, seed=seed)
        return [[action.tokens for action in item.actions] for item in played]

    assert answers(3) == answers(3)
    assert answers(3) != answers(4)
    greedy = answers(None)
    assert greedy == answers(None)
    assert greedy[:4] == [greedy[0]] * 4


def test_no_two_turns_are_drawn_with_one_seed_and_the_behaviour_is_passed_on(build_toy: Build) -> None:
    parts = build_toy()
    behaviour = Behaviour(epsilon=0.25)
    drawn, greedy = Saying(parts), Saying(parts)

    def make() -> Scripted:
        return Scripted(shown("on"), shown("on"), over())

    episodes(parts, make, drawn).play(starts(2), 2, 7, behaviour)
    episodes(parts, make, greedy).play(starts(2), 2, None)

    seeds = [seed for _, seed, _ in drawn.calls]
    assert None not in seeds
    assert len(set(seeds)) == 3
    assert [asked for _, _, asked in drawn.calls] == [behaviour] * 3
    assert [(seed, asked) for _, seed, asked in greedy.calls] == [(None, None)] * 3


def test_an_answer_cut_at_the_limit_is_told_to_the_environment(build_toy: Build) -> None:
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted())
        return made[-1]

    played = episodes(build_toy("task.choices="), make, max_new_tokens=1).play(starts(1), 8, seed=0)

    cut = [END not in item.actions[0].tokens for item in played]
    assert any(cut)
    assert [not action.ended for environment in made for action in environment.actions] == cut


@pytest.mark.parametrize(
    ("choices", "ending"),
    [(("1", "2", "3"), ()), (("1", "10", "2"), (END,)), (("a", "b", "ab"), (END,)), (("ab", "ba"), ())],
)
def test_choices_that_begin_with_each_other_end_with_the_end_of_turn(
    build_toy: Build, choices: tuple[str, ...], ending: tuple[int, ...]
) -> None:
    parts = build_toy()

    [played] = episodes(parts, lambda: Scripted(choices=choices)).play(starts(1), 1, seed=0)

    encoded = played.actions[0].choices
    assert encoded == tuple(parts.adapter.encode(choice) + ending for choice in choices)


# Token in, token out.


@pytest.mark.parametrize(
    ("choices", "ended", "inserted"),
    [
        (None, True, ()),
        (None, False, (END,)),  # cut at the token limit
        (("left", "up"), True, (END,)),  # a choice is scored without an end
        (("left", "le"), True, ()),  # but with one where another choice begins with it
    ],
)
def test_a_later_turn_goes_on_from_the_very_tokens_that_were_sampled(
    build_toy: Build, choices: tuple[str, ...] | None, ended: bool, inserted: tuple[int, ...]
) -> None:
    """Where the policy did not end its turn, the core does, so that the conversation has the form it was taught in."""
    parts = build_toy()

    def make() -> Scripted:
        return Scripted(shown("Now?", OTHER), over(), choices=choices)

    [played] = episodes(parts, make, Saying(parts, "left", "x", ended=ended)).play(starts(1), 1, seed=0)

    first, second = played.turns
    before = tokens_of(first.context) + first.action.tokens
    assert tokens_of(second.context)[: len(before)] == before
    assert second.observation.tokens[: len(inserted)] == inserted
    turns = [Message.user(PICTURE, "seed 10"), Message("assistant", Message.user("left").parts)]
    later = Message.user("Now?", OTHER)
    assert tokens_of(second.context) == parts.adapter.render([*turns, later], parts.media.features((PICTURE, OTHER)))


@pytest.mark.parametrize("history", ["all", 1, 2])
def test_what_was_sampled_over_several_turns_is_what_is_trained(build_toy: Build, history: Any) -> None:
    """With the real policy, whose answers are now cut, now ended, and which keeps what it has read."""
    parts = build_toy("task.choices=")

    def make() -> Scripted:
        script = [shown("a?", OTHER), shown(PICTURE, choices=("up", "down")), shown("b?"), shown(LAST)]
        return Scripted(*script, over())

    played = episodes(parts, make, history=history, max_new_tokens=3).play(starts(3), 3, seed=0)

    assert {len(item.turns) for item in played} == {5}
    assert {action.ended for item in played for action in item.actions} == {True, False}
    recorded = np.concatenate([item.behaviour_logprobs for item in played])
    recomputed = parts.trainer.evaluate(played).logprobs.numpy()
    np.testing.assert_allclose(recomputed, recorded, rtol=0, atol=1e-4)


def test_the_last_observation_of_a_terminated_episode_is_for_people_alone(build_toy: Build) -> None:
    """However long it is, for the model does not read it."""
    parts = build_toy()
    last = Observation((Message.user(LAST, "x" * 300),))
    sampler = Saying(parts)

    def make() -> Scripted:
        return Scripted(shown("on", OTHER), over(observation=last))

    [played] = episodes(parts, make, sampler).play(starts(1), 1, seed=0)

    assert (len(played.turns), played.terminated, played.final, played.outcome) == (2, True, None, (LAST,))
    images = [
        segment.images for turn in played.turns for segment in turn.context if isinstance(segment, ContextSegment)
    ]
    assert (LAST,) not in images


def test_without_a_last_observation_the_outcome_is_what_was_shown_before(build_toy: Build) -> None:
    parts = build_toy()
    [played] = episodes(parts, lambda: Scripted(shown("on", OTHER), over()), Saying(parts)).play(starts(1), 1, seed=0)

    assert played.outcome == (OTHER,)


def test_the_environments_of_one_call_serve_the_next(build_toy: Build) -> None:
    """After an episode that was cut in the middle, too."""
    parts = build_toy()
    player = episodes(parts, endless(), Saying(parts), max_turns=2)

    first, second = player.play(starts(2), 2, seed=0), player.play(starts(2, first=20), 2, seed=0)

    assert [item.seed for item in second] == [20, 20, 21, 21]
    assert [len(item.turns) for item in [*first, *second]] == [2] * 8
    assert second[0].prompt.text == "user: [image]seed 20"


def test_the_time_of_policy_and_environments_is_measured_turn_by_turn(build_toy: Build) -> None:
    parts = build_toy()

    class Slow(Scripted):
        def step(self, action: Action) -> Transition:
            time.sleep(0.02)
            return super().step(action)

    class Thinking(Saying):
        def generate(self, *asked: Any) -> list[list[ActionSegment]]:
            time.sleep(0.05)
            return super().generate(*asked)

    player = episodes(parts, lambda: Slow(shown("1"), shown("2"), over()), Thinking(parts))
    player.play(starts(2), 1, seed=0)

    timing = player.timing
    assert len(timing.policy) == len(timing.environment) == 3
    assert min(timing.policy) >= 0.05
    assert min(timing.environment) >= 0.04
    player.play(starts(1), 1, seed=0)
    assert player.timing is not timing
    assert len(player.timing.policy) == 3
