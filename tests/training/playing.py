"""What episodes are played with in tests: environments and engines that say what they are told, and some that fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rllava_core.mdp.environment import Failure, Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_core.mdp.pool import EnvironmentPool, LocalEnvironments
from rllava_core.mdp.trajectory import ActionSegment, Segment, Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.sampling import Request
from rllava_core.testing.tiny import END
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


def failing(where: str, error: Exception) -> Callable[[], Scripted]:
    class Failing(Scripted):
        def reset(self, *, seed: int, example: Example | None) -> Observation:
            if where == "reset":
                raise error
            return super().reset(seed=seed, example=example)

        def step(self, action: Action) -> Transition:
            raise error

    return lambda: Failing(choices=("a", "b"))


def seen_in(item: Trajectory, final: bool = False) -> list[list[str]]:
    """The texts of the context of each turn, and of the state that the episode was left in."""
    contexts = [turn.context for turn in item.turns] + ([item.final or ()] if final else [])
    return [[segment.text for segment in context] for context in contexts]


def endless(text: str = "on") -> Callable[[], Scripted]:
    return lambda: Scripted(*[shown(text, OTHER, reward=0.5)] * 300)
