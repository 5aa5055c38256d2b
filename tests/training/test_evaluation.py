"""Evaluation: greedy episodes on what was held out, the same ones every time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from rllava_core.errors import ConfigError, DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_core.mdp.pool import LocalEnvironments
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.training.build import Parts, Task
from rllava_core.training.episodes import Episodes
from rllava_core.training.evaluation import Evaluation, evaluate, held_out

Build = Callable[..., Parts]


def run(parts: Parts, *, limit: int | None = None, seed: int = 0, chunk: int = 32, **options: Any) -> Evaluation:
    return evaluate(parts.task, parts.episodes, options.pop("behaviour", Behaviour()), limit, seed, chunk, **options)


def names(evaluation: Evaluation) -> list[str]:
    return [trajectory.name for trajectory in evaluation.trajectories]


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_every_held_out_example_is_asked_once_in_order(build_toy: Build, chunk: int) -> None:
    result = run(build_toy(), chunk=chunk)

    assert names(result) == [f"colours:{number}" for number in range(0, 24, 4)]
    assert result.episodes == 6
    assert [trajectory.group for trajectory in result.trajectories] == list(range(6))


@pytest.mark.parametrize("overrides", [(), ("task.choices=", "task.max_new_tokens=4")])
def test_the_answers_do_not_depend_on_the_chunks_or_the_time(build_toy: Build, overrides: tuple[str, ...]) -> None:
    parts = build_toy(*overrides)

    answers = [[item.answer for item in run(parts, chunk=chunk).trajectories] for chunk in (1, 4, 32, 1)]

    assert answers[0] == answers[1] == answers[2] == answers[3]


def test_answers_are_the_most_likely_ones(build_toy: Build) -> None:
    parts = build_toy()
    result = run(parts)

    for trajectory in result.trajectories:
        [action] = trajectory.actions
        # Of three choices the most probable one has at least a third.
        assert action.logprobs[0] >= np.log(1 / 3) - 1e-6


def test_the_limit_takes_the_first(build_toy: Build) -> None:
    assert names(run(build_toy(), limit=2)) == ["colours:0", "colours:4"]
    assert run(build_toy(), limit=99).episodes == 6


def test_numbers_are_means_over_episodes(build_toy: Build) -> None:
    parts = build_toy("task.rewards=[{name: match, weight: 0.5}, {name: broken, call: 99, label: half}]")
    result = run(parts)
    right = [trajectory.answer == trajectory.example.answer for trajectory in result.trajectories if trajectory.example]

    assert result.successes == tuple(right)
    assert 0 < sum(right) < 6
    assert result.success_rate == sum(right) / 6
    assert result.scores == {"match": sum(right) / 6, "half": 0.5}
    assert result.return_mean == pytest.approx(0.5 * sum(right) / 6 + 0.5)
    assert result.summary() == {
        "success_rate": result.success_rate,
        "return_mean": result.return_mean,
        "turns_mean": 1.0,
        "episodes": 6,
    }


ENVIRONMENT = ("task.dataset=", "task.environment=brightness", "task.choices=", "task.rewards=[]")


class Asking:
    """Asks for the brightness of a picture until it has been told twice, or four times from odd seeds."""

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        self.turns = 4 if seed % 2 else 2
        return self.show()

    def show(self) -> Observation:
        return Observation((Message.user(Image.from_array(np.full((8, 8), 9, np.uint8)), "?"),), ("dark", "bright"))

    def step(self, action: Action) -> Transition:
        time.sleep(0.01)
        self.turns -= 1
        over = self.turns == 0
        return Transition(0.5, None if over else self.show(), terminated=over)


def test_episodes_of_several_turns_are_counted_and_timed(build_toy: Build) -> None:
    """Seconds are those of one turn of one episode."""
    parts = build_toy(*ENVIRONMENT)
    pool = LocalEnvironments(Asking)
    player = Episodes(parts.adapter, parts.media, parts.sampler, pool, parts.task.limits)

    result = evaluate(parts.task, player, Behaviour(), 8, 0, chunk=3)

    turns = [4 if item.seed % 2 else 2 for item in result.trajectories]
    assert [len(item.turns) for item in result.trajectories] == turns
    assert [item.group for item in result.trajectories] == list(range(8))
    assert result.turns_mean == sum(turns) / 8
    assert result.return_mean == pytest.approx(sum(turns) / 16)
    assert 0.01 <= result.environment_seconds < 0.05
    assert result.policy_seconds > 0


def test_an_environment_is_held_out_by_seeds_that_training_never_sees(build_toy: Build) -> None:
    parts = build_toy(*ENVIRONMENT)

    starts = held_out(parts.task, 4, seed=0)
    assert [start.seed for start in starts] == [start.seed for start in held_out(parts.task, 4, seed=0)]
    assert [start.seed for start in held_out(parts.task, 9, seed=0)][:4] == [start.seed for start in starts]
    assert len({start.seed for start in starts} | {start.seed for start in held_out(parts.task, 4, seed=1)}) == 8

    result = run(parts, limit=8)
    assert result.success_rate == sum(result.successes) / 8
    assert result.return_mean == pytest.approx(2 * result.success_rate - 1)


def test_an_environment_needs_a_number_of_episodes(build_toy: Build) -> None:
    with pytest.raises(ConfigError, match=r"^training\.eval_episodes: set how many"):
        run(build_toy(*ENVIRONMENT))


def test_swapping_gives_every_question_the_images_of_another(build_toy: Build) -> None:
    parts = build_toy()
    own = [item.prompt.images for item in run(parts).trajectories]

    swapped = run(parts, swap_images=True)
    images = [item.prompt.images for item in swapped.trajectories]

    assert names(swapped) == names(run(parts))
    assert all(mine != other for mine, other in zip(own, images, strict=True))
    assert {image.digest for (image,) in images} == {image.digest for (image,) in own}
    assert images == [item.prompt.images for item in run(parts, swap_images=True).trajectories]
    assert images != [item.prompt.images for item in run(parts, seed=1, swap_images=True).trajectories]
    # The answer that counts stays that of the question.
    for before, after in zip(run(parts).trajectories, swapped.trajectories, strict=True):
        assert before.example is not None
        assert after.example is not None
        assert (before.example.answer, before.seed) == (after.example.answer, after.seed)


def pictured(*counts: int) -> list[Example]:
    picture = Image.from_array(np.zeros((8, 8), np.uint8))
    return [Example(f"e{index}", {"question": "?"}, (picture,) * count, "x") for index, count in enumerate(counts)]


@pytest.mark.parametrize("counts", [(1,), (1, 2), (0, 0, 0)])
def test_what_cannot_be_swapped_is_refused(build_toy: Build, counts: tuple[int, ...]) -> None:
    parts = build_toy()
    task: Task = replace(parts.task, examples=lambda split: pictured(*counts))

    with pytest.raises(DataError, match="needs two or more held-out examples with equally many"):
        run(replace(parts, task=task), swap_images=True)


def test_examples_swap_with_those_that_have_as_many_images(build_toy: Build) -> None:
    parts = build_toy()
    shades = iter(range(0, 255, 5))
    examples = [
        Example(
            f"e{index}",
            {"question": "?"},
            tuple(Image.from_array(np.full((8, 8), next(shades), np.uint8)) for _ in range(count)),
            "x",
        )
        for index, count in enumerate((1, 2, 0, 2, 1, 2))
    ]
    task: Task = replace(parts.task, examples=lambda split: examples)

    swapped = [item.prompt.images for item in run(replace(parts, task=task), swap_images=True).trajectories]

    assert [len(images) for images in swapped] == [1, 2, 0, 2, 1, 2]
    assert all(images != example.images for images, example in zip(swapped, examples, strict=True) if images)
    assert sorted(image.digest for images in swapped for image in images) == sorted(
        image.load().digest for example in examples for image in example.images
    )


def test_an_environment_without_examples_cannot_be_swapped(build_toy: Build) -> None:
    with pytest.raises(DataError, match="two or more held-out examples"):
        run(build_toy(*ENVIRONMENT), limit=3, swap_images=True)


def last_choice(heads: Mapping[str, Tensor]) -> Tensor:
    """Values of three choices, the last of which is the best."""
    return heads["value"].new_tensor([0.0, 0.0, 1.0]).expand(len(heads["value"]), 3)


def test_what_was_trained_acts_as_its_algorithm_says_without_exploring(build_toy: Build) -> None:
    result = run(build_toy("algorithm=toy_critic"), behaviour=Behaviour(last_choice, epsilon=1.0))

    assert [action.choice for item in result.trajectories for action in item.actions] == [2] * 6


def test_the_level_of_chance_is_drawn_whatever_was_trained(build_toy: Build) -> None:
    """By hand: of 3 choices each has log-prob -log 3; 60 draws miss one of them with probability 8e-11."""
    parts = build_toy("algorithm=toy_critic")
    results = [run(parts, behaviour=Behaviour(last_choice), seed=seed, at_random=True) for seed in (*range(10), 0)]

    actions = [[action for item in result.trajectories for action in item.actions] for result in results]
    assert {action.choice for drawn in actions for action in drawn} == {0, 1, 2}
    np.testing.assert_allclose([action.logprobs[0] for action in actions[0]], -np.log(3), rtol=1e-6)
    assert [action.choice for action in actions[0]] == [action.choice for action in actions[10]]


def test_free_text_is_not_drawn_at_random(build_toy: Build) -> None:
    with pytest.raises(ConfigError, match=r"free text, and there is no acting at random"):
        run(build_toy("task.choices="), at_random=True)


def test_what_rewards_and_the_engine_say_of_themselves_is_reported(build_toy: Build) -> None:
    parts = build_toy()
    parts.task.rewards[0].function.report = lambda: {"calls": 6, "cost": 0.5}  # type: ignore[attr-defined]
    parts.sampler.report = lambda: {"calls": 1}  # type: ignore[attr-defined]

    assert run(parts).reports == {"reward/match/calls": 6.0, "reward/match/cost": 0.5, "engine/calls": 1.0}
    assert run(build_toy()).reports == {}


class Mumbling:
    """An engine that answers every second request with what is none of the choices."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.forget = engine.forget

    def generate(self, requests: Any, seed: int | None, behaviour: Any = None) -> Any:
        answers = self._engine.generate(requests, seed, behaviour)
        said = ActionSegment((), np.zeros(0, np.float32), "hm", ended=False)
        return [[said] if number % 2 else answer for number, answer in enumerate(answers)]


def test_an_answer_that_is_none_of_the_choices_is_not_carried_out_and_is_counted(build_toy: Build) -> None:
    parts = build_toy()
    stepped: list[Any] = []
    environments = parts.task.environments
    step = environments.step
    environments.step = lambda actions: stepped.append(actions) or step(actions)  # type: ignore[method-assign]
    episodes = Episodes(parts.adapter, parts.media, Mumbling(parts.sampler), environments, parts.task.limits)
    result = run(replace(parts, episodes=episodes))

    ends = [(item.answer, item.truncation, item.terminated) for item in result.trajectories]
    assert ends[1::2] == [("hm", "unparsable", False)] * 3
    assert all(truncation is None and terminated for _, truncation, terminated in ends[::2])
    assert [[turn.parsed for turn in item.turns] for item in result.trajectories] == [[True], [False]] * 3
    assert result.unparsable_share == 0.5
    assert [sorted(actions) for actions in stepped] == [[0, 2, 4]]
    left = result.trajectories[1]
    assert left.final == left.turns[0].context
