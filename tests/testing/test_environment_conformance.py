"""Every check of an environment has a mutant that it catches, and healthy environments pass all of them."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, ImagePart, Message, Observation, TextPart, Transition
from rllava_core.testing import samples
from rllava_core.testing.conformance import Conformance, ConformanceError, Outcome, checks_of, run
from rllava_core.testing.environments import EnvironmentConformance, check_environment


class Healthy:
    """Three grey pictures, one after another: is it dark or bright? Takes any text."""

    choices: tuple[str, ...] | None = None
    turns = 3

    def reset(self, *, seed: int, example: Example | None) -> Any:
        self.generator = np.random.default_rng(seed)
        self.turn = 0
        return self.show()

    def show(self) -> Any:
        self.bright = self.draw()
        image = Image.from_array(np.full((8, 8), 200 if self.bright else 50, np.uint8))
        return Observation((Message.user(image, f"Picture {self.turn}: dark or bright?"),), self.choices)

    def draw(self) -> bool:
        return bool(self.generator.integers(2))

    def step(self, action: Action) -> Any:
        self.turn += 1
        right = action.text == ("bright" if self.bright else "dark")
        over = self.turn == self.turns
        info = {"turn": self.turn, "success": right} if over else {}
        return Transition(float(right), None if over else self.show(), terminated=over, info=info)


class HealthyChoices(Healthy):
    choices = ("dark", "bright")


class EndsAtOnce(Healthy):
    turns = 1


class CannotStep(Healthy):
    step = None  # type: ignore[assignment]


class ReturnsAPair(Healthy):
    def reset(self, *, seed: int, example: Example | None) -> Any:
        return super().reset(seed=seed, example=example), {}


class ShowsAnArray(Healthy):
    def show(self) -> Any:
        part = ImagePart(np.zeros((8, 8, 3), np.uint8))  # type: ignore[arg-type]
        return replace(super().show(), messages=(Message("user", (part,)),))


class ShowsFloats(Healthy):
    def show(self) -> Any:
        image = Image(np.zeros((8, 8, 3)))  # type: ignore[arg-type]
        return replace(super().show(), messages=(Message.user(image),))


class SpeaksAsAHuman(Healthy):
    def show(self) -> Any:
        return replace(super().show(), messages=(Message("human", (TextPart("Dark?"),)),))  # type: ignore[arg-type]


class SaysNothing(Healthy):
    def show(self) -> Any:
        return replace(super().show(), messages=(Message.user(" \n"),))


class FallsSilentLater(Healthy):
    def show(self) -> Any:
        seen = super().show()
        return replace(seen, messages=()) if self.turn else seen


class RepliesWithText(Healthy):
    def show(self) -> Any:
        return "Dark?" if self.turn else super().show()


class DrawsOnOneCanvas(Healthy):
    def __init__(self) -> None:
        self.canvas = np.zeros((8, 8, 3), np.uint8)

    def show(self) -> Any:
        super().show()
        self.canvas[:] = 200 if self.bright else 50
        self.canvas[0] = self.turn
        return Observation((Message.user(Image(self.canvas)),))


class TakesSmallSeeds(Healthy):
    def reset(self, *, seed: int, example: Example | None) -> Any:
        np.random.RandomState(seed)
        return super().reset(seed=seed, example=example)


class IgnoresTheSeed(Healthy):
    def reset(self, *, seed: int, example: Example | None) -> Any:
        first = super().reset(seed=seed, example=example)
        return replace(first, messages=(*first.messages, Message.user(str(random.random()))))


class CountsObjects(Healthy):
    objects = 0

    def __init__(self) -> None:
        CountsObjects.objects += 1
        self.title = f"Game {self.objects}"

    def show(self) -> Any:
        seen = super().show()
        return replace(seen, messages=(Message.user(self.title), *seen.messages))


class PaysByChance(Healthy):
    def step(self, action: Action) -> Any:
        return replace(super().step(action), reward=float(np.random.default_rng().random()))


class SeedsEverybody(Healthy):
    def reset(self, *, seed: int, example: Example | None) -> Any:
        random.seed(seed)
        return super().reset(seed=seed, example=example)

    def show(self) -> Any:
        seen = super().show()
        return replace(seen, messages=(*seen.messages, Message.user(f"{random.random()}")))


class KeepsTheSumOfEpisodes(Healthy):
    total = 0

    def step(self, action: Action) -> Any:
        transition = super().step(action)
        self.total += transition.done
        return replace(transition, reward=transition.reward + self.total)


class GoesOnWhereItWas(Healthy):
    over = True

    def reset(self, *, seed: int, example: Example | None) -> Any:
        if self.over:
            super().reset(seed=seed, example=example)
        self.over = False
        self.generator = np.random.default_rng(seed)
        return self.show()

    def step(self, action: Action) -> Any:
        transition = super().step(action)
        self.over = transition.done
        return transition


class SharesItsGenerator(Healthy):
    generators: ClassVar[list[np.random.Generator]] = []

    def reset(self, *, seed: int, example: Example | None) -> Any:
        self.generators[:] = [np.random.default_rng(seed)]
        return super().reset(seed=seed, example=example)

    def draw(self) -> bool:
        return bool(self.generators[0].random() < 0.5)


class MarksTheExample(Healthy):
    def reset(self, *, seed: int, example: Example | None) -> Any:
        assert example is not None
        example.fields["seed"] = seed  # type: ignore[index]
        return super().reset(seed=seed, example=example)


class PaysNothingAtAll(Healthy):
    def step(self, action: Action) -> Any:
        transition = super().step(action)
        return replace(transition, reward=transition.reward or None)


class DividesByZero(Healthy):
    def step(self, action: Action) -> Any:
        return replace(super().step(action), reward=float("nan"))


class AnswersInNumpy(Healthy):
    def step(self, action: Action) -> Any:
        transition = super().step(action)
        return replace(transition, terminated=np.bool_(transition.terminated))


class ParsedByARegularExpression(Healthy):
    def step(self, action: Action) -> Any:
        return replace(super().step(action), parsed=re.search("dark|bright", action.text))


class CutsWithoutAView(Healthy):
    """Gives up after two pictures, and shows nothing of the third."""

    def step(self, action: Action) -> Any:
        transition = super().step(action)
        return replace(transition, observation=None, truncated=True) if self.turn == 2 else transition


class ParsesByChance(Healthy):
    def step(self, action: Action) -> Any:
        return replace(super().step(action), parsed=random.random() < 0.5)


class ShowsNothingMore(Healthy):
    def step(self, action: Action) -> Any:
        return replace(super().step(action), observation=None)


class NumbersItsInfo(Healthy):
    def step(self, action: Action) -> Any:
        return replace(super().step(action), info={0: "turn"})


class SucceedsInWords(Healthy):
    def step(self, action: Action) -> Any:
        return replace(super().step(action), info={"success": "no"})


class RepeatsAChoice(Healthy):
    choices = ("dark", "bright", "dark")


class LeavesOneChoice(HealthyChoices):
    def show(self) -> Any:
        seen = super().show()
        return replace(seen, choices=("dark",)) if self.turn else seen


class ForgetsTheChoices(HealthyChoices):
    def show(self) -> Any:
        seen = super().show()
        return replace(seen, choices=None) if self.turn else seen


class KnowsOneChoice(HealthyChoices):
    def step(self, action: Action) -> Any:
        {"dark": 0}[action.text]
        return super().step(action)


class ReadsANumber(Healthy):
    def step(self, action: Action) -> Any:
        int(action.text)
        return super().step(action)


class GivesUpInSight(Healthy):
    """Truncated after two pictures, with the third before the eyes."""

    def step(self, action: Action) -> Any:
        return replace(super().step(action), truncated=self.turn == 2)


class ShowsTheEnd(Healthy):
    """Also shows what came of the last action."""

    def step(self, action: Action) -> Any:
        transition = super().step(action)
        return replace(transition, observation=transition.observation or self.show(), parsed=bool(action.text))


class AsksUntilItUnderstands(Healthy):
    def step(self, action: Action) -> Any:
        if action.text not in ("dark", "bright"):
            return Transition(0.0, Observation((Message.user("Dark or bright?"),)), terminated=False)
        return super().step(action)


MUTANTS: dict[str, list[tuple[Any, str]]] = {
    "it_can_be_constructed": [(CannotStep, "has no method 'step'")],
    "the_first_observation_can_be_shown_to_a_model": [
        (ReturnsAPair, "reset gave (Observation("),
        (ShowsAnArray, "expected an rllava_core.mdp.images.Image"),
        (ShowsFloats, "has pixels of float64 (8, 8, 3); expected uint8"),
        (SpeaksAsAHuman, "the role 'human'; expected one of system, user, assistant, tool"),
        (SaysNothing, "neither a picture nor a text"),
    ],
    "later_observations_can_be_shown_to_a_model": [
        (FallsSilentLater, "the observation of action 1 has messages=(); expected a tuple of at least one Message"),
        (RepliesWithText, "action 1 gave 'Dark?'; expected an Observation"),
    ],
    "pictures_stay_as_they_were_shown": [(DrawsOnOneCanvas, "copy what is drawn on")],
    "any_seed_is_accepted": [(TakesSmallSeeds, "Seed must be between 0 and 2**32 - 1")],
    "the_same_seed_and_example_give_the_same_observation": [(IgnoresTheSeed, "differ at the reset in messages")],
    "a_new_object_gives_the_same_observation": [(CountsObjects, "both objects were reset")],
    "the_same_seed_and_actions_give_the_same_episode": [
        (PaysByChance, "differ after action 1 in reward"),
        (ParsesByChance, "in parsed"),
    ],
    "the_global_random_state_has_no_say": [(SeedsEverybody, "differ after action 1 in messages")],
    "a_reset_after_an_episode_begins_afresh": [(KeepsTheSumOfEpisodes, "an episode had been played before")],
    "a_reset_in_the_middle_of_an_episode_begins_afresh": [(GoesOnWhereItWas, "was left in the middle")],
    "two_environments_do_not_disturb_each_other": [(SharesItsGenerator, "was played in turns with it")],
    "the_example_stays_as_it_was": [(MarksTheExample, "changed the example sample:0")],
    "rewards_are_finite_numbers": [
        (PaysNothingAtAll, "the reward None"),
        (DividesByZero, "the reward nan"),
    ],
    "terminated_truncated_and_parsed_are_true_or_false": [
        (AnswersInNumpy, "a numpy.bool, after action 1; expected True or False"),
        (ParsedByARegularExpression, "gave parsed=None, a NoneType, after action"),
    ],
    "an_observation_follows_unless_the_episode_is_terminated": [
        (ShowsNothingMore, "no observation came after action 1, with terminated=False"),
        (CutsWithoutAView, "no observation came after action 2, with terminated=False and truncated=True"),
    ],
    "info_is_a_mapping_from_names": [(NumbersItsInfo, "info={0: 'turn'}")],
    "success_is_true_or_false": [(SucceedsInWords, "info['success']='no', a str")],
    "choices_are_two_or_more_different_texts": [
        (RepeatsAChoice, "the choices are ('dark', 'bright', 'dark')"),
        (LeavesOneChoice, "the choices are ('dark',)"),
    ],
    "choices_are_shown_where_they_are_promised": [(ForgetsTheChoices, "although the task has choices")],
    "every_choice_is_accepted": [(KnowsOneChoice, "KeyError: 'bright', for Action(text='bright', choice=1")],
    "any_text_is_accepted": [(ReadsANumber, "ValueError: invalid literal for int()")],
    "every_episode_ends": [(AsksUntilItUnderstands, "an episode of mixed actions is not over after 200 actions")],
}

SIBLINGS: list[tuple[Any, dict[str, Any]]] = [
    (Healthy, {}),
    (Healthy, {"examples": lambda self: samples.examples()}),
    (HealthyChoices, {"task": {"choices": ["dark", "bright"]}}),
    (EndsAtOnce, {}),
    (GivesUpInSight, {}),
    (ShowsTheEnd, {}),
]


def outcomes(create: Any, **attributes: Any) -> dict[str, Outcome]:
    suite = type("Suite", (EnvironmentConformance,), {"create": lambda self: create(), **attributes})()
    return {outcome.check: outcome for outcome in run(suite)}


def test_every_check_has_a_mutant() -> None:
    own = set(checks_of(EnvironmentConformance)) - set(checks_of(Conformance))

    # The one of another process needs an installed environment: its mutant is in test_environment_processes.py.
    assert {f"test_{check}" for check in [*MUTANTS, "a_new_process_plays_the_same_episodes"]} == own


@pytest.mark.parametrize(
    ("check", "mutant", "message"),
    [(check, *pair) for check, pairs in MUTANTS.items() for pair in pairs],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mutant_is_caught_by_its_check(check: str, mutant: Any, message: str) -> None:
    attributes: dict[str, Any] = {"task": {"choices": ["dark", "bright"]}} if mutant.choices else {}
    if mutant is MarksTheExample:
        attributes["examples"] = lambda self: samples.examples()

    outcome = outcomes(mutant, **attributes)[check]

    assert outcome.status == "failed"
    assert message in outcome.message


@pytest.mark.parametrize(("environment", "attributes"), SIBLINGS)
def test_a_healthy_environment_fails_no_check(environment: Any, attributes: dict[str, Any]) -> None:
    found = outcomes(environment, **attributes).values()

    assert not {outcome.check: outcome.message for outcome in found if outcome.status == "failed"}


def test_every_check_applies_to_one_of_the_healthy_environments() -> None:
    passed = {
        check
        for environment, attributes in SIBLINGS
        for check, outcome in outcomes(environment, **attributes).items()
        if outcome.status == "passed"
    }

    assert passed == set(MUTANTS)


class GivesUpLate(Healthy):
    turns = 250


def test_an_author_may_allow_longer_episodes() -> None:
    assert outcomes(GivesUpLate, seeds=(0,))["every_episode_ends"].status == "failed"
    assert outcomes(GivesUpLate, seeds=(0,), max_turns=250)["every_episode_ends"].status == "passed"


def test_an_author_says_which_actions_lead_on() -> None:
    seen = []

    class Listens(Healthy):
        def step(self, action: Action) -> Any:
            seen.append(action.text)
            return super().step(action)

    outcomes(Listens, actions=lambda self, observation: [Action("look left")])

    assert "look left" in seen
    assert "look at the picture" not in seen


def test_check_environment_needs_no_plugin() -> None:
    check_environment(Healthy)
    check_environment(Healthy, samples.examples())


def test_check_environment_lists_everything_that_is_wrong() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_environment(NumbersItsInfo)
    assert str(caught.value).startswith("info is a mapping from names: gave info={0: 'turn'} after action 1")

    with pytest.raises(ConformanceError) as caught:
        check_environment(ReturnsAPair)
    assert len(str(caught.value).splitlines()) > 5
