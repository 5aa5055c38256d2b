"""Episodes: what the policy is shown, what it may answer, and what happens when an environment misbehaves."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rllava_core.errors import DataError, ModelError, TrainingError
from rllava_core.mdp.environment import Failure, Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_core.mdp.pool import EnvironmentPool, LocalEnvironments
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.sampling import Request
from rllava_core.testing.tiny import END, START
from rllava_core.training.build import Parts
from rllava_core.training.episodes import Episodes, Limits

Build = Callable[..., Parts]

PICTURE, OTHER, LAST = (Image.from_array(np.full((8, 8), grey, np.uint8), f"picture {grey}") for grey in (90, 30, 200))


def shown(*parts: str | Image, choices: tuple[str, ...] | None = None, **changes: Any) -> Transition:
    """The episode goes on with this."""
    values: dict[str, Any] = {"reward": 0.0, "terminated": False, **changes}
    return Transition(observation=Observation((Message.user(*parts),), choices), **values)


def over(reward: float = 1.5, **changes: Any) -> Transition:
    """The episode is terminated."""
    return Transition(**{"reward": reward, "observation": None, "terminated": True, **changes})


class Scripted:
    """Says what it is told, turn by turn, and remembers what it is asked."""

    def __init__(
        self, *transitions: Transition, choices: tuple[str, ...] | None = None, opening: Sequence[Message] | None = None
    ) -> None:
        self.transitions = transitions or (over(info={"success": True}),)
        self.choices = choices
        self.opening = opening
        self.seeds: list[int] = []
        self.actions: list[Action] = []

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        self.seeds.append(seed)
        self.turn = 0
        opening = (Message.user(PICTURE, f"seed {seed}"),) if self.opening is None else tuple(self.opening)
        return Observation(opening, self.choices)

    def step(self, action: Action) -> Transition:
        self.actions.append(action)
        self.turn += 1
        return self.transitions[self.turn - 1]


class Saying:
    """A rollout engine that gives the answers it is told, one a turn, and remembers what it is asked."""

    def __init__(self, parts: Parts, *answers: str, ended: bool = True) -> None:
        self.adapter = parts.adapter
        self.answers = answers or ("a",)
        self.ended = ended
        self.calls: list[tuple[list[Request], int | None, Behaviour | None]] = []
        self.forgot = 0

    def generate(
        self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None
    ) -> list[list[ActionSegment]]:
        answer = self.answers[min(len(self.calls), len(self.answers) - 1)]
        self.calls.append((list(requests), seed, behaviour))
        return [[self.say(answer, request) for _ in range(request.count)] for request in requests]

    def say(self, answer: str, request: Request) -> ActionSegment:
        if request.choices is not None:
            index = request.choice_texts.index(answer)
            logprobs = np.full(1, -1, np.float32)
            return ActionSegment(request.choices[index], logprobs, answer, choice=index, choices=request.choices)
        tokens = (*self.adapter.encode(answer), *((END,) if self.ended else ()))
        return ActionSegment(tokens, np.full(len(tokens), -1, np.float32), answer, self.ended)

    def forget(self) -> None:
        self.forgot += 1

    def sync(self, policy: Any) -> None:
        raise AssertionError("no weights change in the middle of episodes")


class Flaky:
    """Environments of which some fail: member and turn, 0 for the reset."""

    def __init__(self, make: Callable[[], Any], failures: Mapping[tuple[int, int], str]) -> None:
        self.local = LocalEnvironments(make)
        self.failures = failures
        self.turn = 0
        self.stepped: list[list[int]] = []

    def reset(self, starts: Sequence[Start]) -> list[Observation | Failure]:
        seen = self.local.reset(starts)
        return [self.failure(number) or seen[number] for number in range(len(starts))]

    def step(self, actions: Mapping[int, Action]) -> dict[int, Transition | Failure]:
        self.turn += 1
        self.stepped.append(list(actions))
        return {number: self.failure(number) or found for number, found in self.local.step(actions).items()}

    def failure(self, number: int) -> Failure | None:
        what = self.failures.get((number, self.turn))
        return None if what is None else Failure(what)

    def close(self) -> None:
        self.local.close()


def episodes(
    parts: Parts,
    environments: Callable[[], Any] | EnvironmentPool | None = None,
    sampler: Any = None,
    report: Callable[[str, Failure], None] | None = None,
    **limits: Any,
) -> Episodes:
    pool: Any = parts.task.environments if environments is None else environments
    if callable(pool):
        pool = LocalEnvironments(pool)
    given = replace(Limits(max_new_tokens=4, max_turns=200, max_episode_tokens=None, history="all"), **limits)
    return Episodes(parts.adapter, parts.media, sampler or parts.sampler, pool, given, report)


def starts(count: int, first: int = 10) -> list[Start]:
    return [Start(None, first + number) for number in range(count)]


def tokens_of(context: Sequence[Segment]) -> tuple[int, ...]:
    return tuple(token for segment in context for token in segment.tokens)


def same(one: Sequence[Segment] | None, other: Sequence[Segment]) -> bool:
    """The very same objects."""
    return one is not None and list(map(id, one)) == list(map(id, other))


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


# What is seen.

SYSTEM = Message("system", Message.user("Be brief.").parts)


def seen_in(item: Trajectory, final: bool = False) -> list[list[str]]:
    """The texts of the context of each turn, and of the state that the episode was left in."""
    contexts = [turn.context for turn in item.turns] + ([item.final or ()] if final else [])
    return [[segment.text for segment in context] for context in contexts]


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


# Limits.


def endless(text: str = "on") -> Callable[[], Scripted]:
    return lambda: Scripted(*[shown(text, OTHER, reward=0.5)] * 300)


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


# Environments that misbehave.


def failing(where: str, error: Exception) -> Callable[[], Scripted]:
    class Failing(Scripted):
        def reset(self, *, seed: int, example: Example | None) -> Observation:
            if where == "reset":
                raise error
            return super().reset(seed=seed, example=example)

        def step(self, action: Action) -> Transition:
            raise error

    return lambda: Failing(choices=("a", "b"))


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


# Demonstrations.


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


def test_an_environment_that_goes_on_after_a_demonstration_is_refused_by_name(build_toy: Build) -> None:
    with pytest.raises(TrainingError, match=r"^train\.jsonl:7: the environment goes on after the example's answer; "):
        episodes(build_toy(), lambda: Scripted(shown("more"))).demonstrate([example("a")])


@pytest.mark.parametrize("turn", [0, 1])
def test_an_environment_that_fails_in_a_demonstration_is_named(build_toy: Build, turn: int) -> None:
    pool = Flaky(Scripted, {(0, turn): "was killed by signal 9"})

    with pytest.raises(TrainingError, match=r"^train\.jsonl:7: the environment was killed by signal 9$"):
        episodes(build_toy(), pool).demonstrate([example("a")])
