"""Environments in this process: what is checked of their answers, and how errors name the episode."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rllava_core.errors import DataError, TrainingError
from rllava_core.mdp.environment import Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, ImagePart, Message, Observation, TextPart, Transition
from rllava_core.mdp.pool import LocalEnvironments

SHOWN = Observation((Message.user("Which way?"),), ("left", "right"))
LEFT = Action("left", 0)


class Scripted:
    """Answers what it is told to; an exception is raised."""

    def __init__(self, first: Any = SHOWN, then: Any = None) -> None:
        self.first = first
        self.then = then or Transition(1.0, SHOWN, terminated=False)
        self.resets: list[tuple[int, Example | None]] = []
        self.actions: list[Action] = []

    def reset(self, *, seed: int, example: Example | None) -> Any:
        self.resets.append((seed, example))
        return self._say(self.first)

    def step(self, action: Action) -> Any:
        self.actions.append(action)
        return self._say(self.then)

    def _say(self, answer: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer


def seeds(*numbers: int) -> list[Start]:
    return [Start(None, number) for number in numbers]


def pool(**script: Any) -> LocalEnvironments:
    return LocalEnvironments(lambda: Scripted(**script))


def message_of(action: Callable[[], object], kind: type[Exception] = TrainingError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def test_every_episode_has_an_environment_to_itself_and_keeps_it() -> None:
    made: list[Scripted] = []

    def make() -> Scripted:
        made.append(Scripted())
        return made[-1]

    environments = LocalEnvironments(make)
    assert environments.reset(seeds(1, 2)) == [SHOWN, SHOWN]
    environments.step({1: LEFT})
    environments.reset(seeds(3, 4, 5))
    answers = environments.step({2: LEFT, 0: Action("right", 1)})

    assert [[seed for seed, _ in environment.resets] for environment in made] == [[1, 3], [2, 4], [5]]
    assert [len(environment.actions) for environment in made] == [1, 1, 1]
    assert made[0].actions == [Action("right", 1)]
    assert list(answers) == [2, 0]


@pytest.mark.parametrize(
    "last", [Transition(0.0, None, terminated=True), Transition(0.0, SHOWN, terminated=False, truncated=True)]
)
def test_an_episode_that_has_ended_cannot_be_acted_in(last: Transition) -> None:
    environments = pool(then=last)
    environments.reset(seeds(1, 2))
    assert environments.step({1: LEFT}) == {1: last}

    expected = "step() was called for episode 1, which is not running: it has not begun, has ended or has failed"
    assert message_of(lambda: environments.step({0: LEFT, 1: LEFT}), ValueError) == expected
    environments.step({0: LEFT})  # the refused call did nothing
    environments.reset(seeds(1))
    assert "episode 1," in message_of(lambda: environments.step({1: LEFT}), ValueError)


@pytest.mark.parametrize(
    ("error", "said"), [(KeyError("x"), r"raised KeyError: 'x' "), (SystemExit(4), r"called sys\.exit\(4\) ")]
)
def test_what_an_environment_raises_names_the_episode(error: BaseException, said: str) -> None:
    message = rf"train\.jsonl:7: the environment {said}\(test_pool\.py:\d+\)"
    start = Start(Example("train.jsonl:7"), 0)

    assert re.fullmatch(message, message_of(lambda: pool(first=error).reset([start])))
    environments = pool(then=error)
    environments.reset([start])
    assert re.fullmatch(message, message_of(lambda: environments.step({0: LEFT})))


def test_errors_for_the_user_pass() -> None:
    assert message_of(lambda: pool(first=DataError("mine")).reset(seeds(3)), DataError) == "mine"
    assert message_of(lambda: pool(first=TrainingError("mine")).reset(seeds(3))) == "episode with seed 3: mine"


@pytest.mark.parametrize(("error", "kind"), [(KeyError("x"), TrainingError), (DataError("mine"), DataError)])
def test_an_environment_that_cannot_be_made(error: Exception, kind: type[Exception]) -> None:
    def make() -> Any:
        raise error

    message = message_of(lambda: LocalEnvironments(make).reset(seeds(1)), kind)
    assert re.fullmatch(r"making an environment raised KeyError: 'x' \(test_pool\.py:\d+\)|mine", message)


def observation(**changes: Any) -> Observation:
    return Observation(**{"messages": SHOWN.messages, "choices": None, **changes})


def transition(**changes: Any) -> Transition:
    return Transition(**{"reward": 1.0, "observation": SHOWN, "terminated": False, **changes})


BAD_OBSERVATIONS = [
    (None, "None; expected an Observation"),
    ({"text": "a"}, "{'text': 'a'} (dict); expected an Observation"),
    ((SHOWN, {"k": "x" * 80}), "a tuple; expected an Observation"),
    (observation(messages=()), "an Observation with messages=() (tuple); expected a tuple of at least one Message"),
    (observation(messages=[]), "an Observation with messages=[] (list); expected a tuple of at least one Message"),
    (observation(messages=[*SHOWN.messages]), "an Observation with messages=[Message("),
    (
        observation(messages=(Message("robot", SHOWN.messages[0].parts),)),  # type: ignore[arg-type]
        "an Observation with a message of the role 'robot' (str); expected one of system, user, assistant, tool",
    ),
    (
        observation(messages=(Message("user", ("hello",)),)),  # type: ignore[arg-type]
        "an Observation with a message of parts=('hello',) (tuple); expected a tuple of at least one TextPart or Image",
    ),
    (
        observation(messages=(Message("user", (TextPart(3),)),)),  # type: ignore[arg-type]
        "an Observation with a TextPart of 3 (int); expected a str",
    ),
    (
        observation(messages=(Message("user", (ImagePart(np.zeros((90, 90, 3))),)),)),  # type: ignore[arg-type]
        "an Observation with an ImagePart of a ndarray; expected an Image",
    ),
    (observation(choices=()), "an Observation with choices=() (tuple); expected None or a tuple of texts"),
    (observation(choices=["a", "b"]), "an Observation with choices=['a', 'b'] (list); expected None or a tuple"),
    (observation(choices=("a", 2)), "an Observation with choices=('a', 2) (tuple); expected None or a tuple"),
    (observation(choices=("a", "")), "an Observation with choices=('a', '') (tuple); expected None or a tuple"),
]

BAD_TRANSITIONS = [
    ((1.0, SHOWN), "a tuple; expected a Transition"),
    (transition(reward=float("nan")), "a Transition with reward=nan (float); expected a finite number"),
    (transition(reward=float("-inf")), "a Transition with reward=-inf (float); expected a finite number"),
    (transition(reward=10**400), "a Transition with reward=a int; expected a finite number"),
    (transition(reward=None), "a Transition with reward=None; expected a finite number"),
    (transition(reward="1"), "a Transition with reward='1' (str); expected a finite number"),
    (transition(reward=1j), "a Transition with reward=1j (complex); expected a finite number"),
    (transition(terminated=1), "a Transition with terminated=1 (int); expected True or False"),
    (transition(truncated=None), "a Transition with truncated=None; expected True or False"),
    (transition(parsed="no"), "a Transition with parsed='no' (str); expected True or False"),
    (transition(info=None), "a Transition with info=None; expected a mapping from str, {} for nothing"),
    (transition(info={1: 2}), "a Transition with info={1: 2} (dict); expected a mapping from str"),
    (transition(observation=None), "a Transition with observation=None; expected an Observation"),
    (transition(observation=None, truncated=True), "a Transition with observation=None; expected an Observation"),
    (transition(observation="x", terminated=True), "a Transition with observation='x' (str); expected an Observation"),
    (
        transition(observation=observation(choices=())),
        "a Transition with observation=an Observation with choices=() (tuple); expected None or",
    ),
]


@pytest.mark.parametrize(("answer", "problem"), BAD_OBSERVATIONS)
def test_a_wrong_observation_is_refused(answer: Any, problem: str) -> None:
    message = message_of(lambda: pool(first=answer).reset(seeds(3)))

    assert message.startswith(f"episode with seed 3: the environment's reset() returned {problem}")


@pytest.mark.parametrize(("answer", "problem"), BAD_TRANSITIONS)
def test_a_wrong_transition_is_refused(answer: Any, problem: str) -> None:
    environments = pool(then=answer)
    environments.reset(seeds(3))

    message = message_of(lambda: environments.step({0: LEFT}))
    assert message.startswith(f"episode with seed 3: the environment's step() returned {problem}")


@pytest.mark.parametrize("reward", [2, True, np.float32(0.5), np.int64(3), -1.5])
def test_any_finite_number_is_a_reward(reward: Any) -> None:
    environments = pool(then=transition(reward=reward, observation=None, terminated=True))
    environments.reset(seeds(3))

    answer = environments.step({0: LEFT})[0]
    assert isinstance(answer, Transition)
    assert type(answer.reward) is float
    assert answer.reward == reward


def test_a_copy_of_an_image_is_read_only_too() -> None:
    image = Image.from_array(np.zeros((4, 4), np.uint8))

    copied = copy.deepcopy(image)
    assert copied == image
    assert copied.pixels is not image.pixels
    assert not copied.pixels.flags.writeable
