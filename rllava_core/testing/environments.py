"""What every environment must keep to: episodes that repeat and end, whatever the policy does."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any, ClassVar, get_args
from unittest import SkipTest

import numpy as np

from rllava_core.config.sections import TaskSection
from rllava_core.mdp.environment import Environment
from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action, ImagePart, Message, Observation, Role, TextPart, Transition
from rllava_core.specs import Kind
from rllava_core.testing import samples
from rllava_core.testing.conformance import Conformance, ConformanceError, raise_failures, require, run
from rllava_core.testing.playing import Player, Start, difference, disturbed, episode, told
from rllava_core.testing.processes import in_another_process
from rllava_core.testing.values import choices_problem, content, digest, image_problem, shortened, text_problem


class EnvironmentConformance(Conformance):
    """The checks of an environment.

    task: what a config would write under `task` (`prompt`, `choices`, …).
    max_turns: every episode must be over after this many actions, whatever they are.
    seeds: where episodes begin; more of them look at more of the environment.

    Override `examples` for an environment that needs a certain kind, and `actions` to add those that lead on: calls of
    tools, moves in a notation of its own.
    """

    kind: ClassVar[Kind] = "environment"
    task: Mapping[str, Any] = {}
    max_turns: int = 200
    seeds: Sequence[int] = (0, 1, 2)

    def create(self) -> Any:
        """A new environment, with its config and the task section."""
        return self.target()(self.config(), self._task())

    def examples(self) -> Sequence[Example | None]:
        """What episodes are about: samples for a component that needs `dataset`, None for any other."""
        needs = self.find().spec.needs if self.component else frozenset()
        return samples.examples() if "dataset" in needs else [None]

    def actions(self, observation: Observation) -> Sequence[Action]:
        """What a policy may do here: every choice, or a few texts."""
        if observation.choices is None:
            return [Action(text) for text in ("yes", "1", "look at the picture", samples.NONSENSE, "")]
        return [Action(choice, choice=index) for index, choice in enumerate(observation.choices)]

    def test_it_can_be_constructed(self) -> None:
        environment = self.create()
        for method in ("reset", "step"):
            require(callable(getattr(environment, method, None)), f"{shortened(environment)} has no method {method!r}")

    def test_the_first_observation_can_be_shown_to_a_model(self) -> None:
        for start in self._starts():
            _check_observation(self._reset(start), "reset")

    def test_later_observations_can_be_shown_to_a_model(self) -> None:
        for turn, transition in self._transitions():
            if transition.observation is not None:
                _check_observation(transition.observation, f"action {turn}")

    def test_pictures_stay_as_they_were_shown(self) -> None:
        for start in self._starts():
            environment = self.create()
            shown = []
            for event in self._episode(environment, start):
                observation = event.observation if isinstance(event, Transition) else event
                shown += [(image, content(image)) for image in (observation.images if observation else ())]
            self._reset(start, environment)
            require(
                all(content(image) == before for image, before in shown),
                "a picture changed after it had been shown; training reads it at the end of the step, so copy what is "
                "drawn on: Image.from_array does",
            )

    def test_any_seed_is_accepted(self) -> None:
        _, example = self._starts()[0]
        # Seeds of a run are of 63 bits; NumPy's old generators take 32.
        for seed in (0, 2**32, 2**63 - 1):
            self._reset((seed, example))

    def test_the_same_seed_and_example_give_the_same_observation(self) -> None:
        environment = self.create()
        for start in self._starts():
            first, second = (told(self._reset(start, environment)) for _ in range(2))
            _require_same([first], [second], "it was reset twice with one seed and example")

    def test_a_new_object_gives_the_same_observation(self) -> None:
        for start in self._starts():
            first, second = (told(self._reset(start)) for _ in range(2))
            _require_same([first], [second], "both objects were reset with one seed and example")

    def test_the_same_seed_and_actions_give_the_same_episode(self) -> None:
        for start in self._starts():
            for player in self._players(start):
                _require_same(
                    self._course(self.create(), start, player),
                    self._course(self.create(), start, player),
                    "both objects got one seed, example and row of actions",
                )

    def test_the_global_random_state_has_no_say(self) -> None:
        for start in self._starts():
            with disturbed(1):
                first = self._course(self.create(), start, disturb=1)
            with disturbed(2):
                second = self._course(self.create(), start, disturb=2)
            _require_same(first, second, "only the states of `random` and `numpy.random` were others")

    def test_a_new_process_plays_the_same_episodes(self) -> None:
        component = self.find().qualified_name
        mine, base = type(self), EnvironmentConformance
        own = [name for name in ("create", "examples", "actions") if getattr(mine, name) is not getattr(base, name)]
        if own:
            raise SkipTest(f"{', '.join(own)} is overridden, which another process does not know")
        played = self.courses()  # before, for samples may not suit the environment
        given = (component, self.config().model_dump(mode="json"), dict(self.task), list(self.seeds), self.max_turns)
        require(
            in_another_process(__name__, "courses_of", *given) == played,
            "another process plays other episodes from the same seeds: draw from np.random.default_rng(seed), and let "
            "nothing depend on hash() of a text or on the order of a set; a resumed run would be another one",
        )

    def test_a_reset_after_an_episode_begins_afresh(self) -> None:
        starts = self._starts()
        environment = self.create()
        for earlier, start in zip(starts, [*starts[1:], starts[0]], strict=True):
            alone = self._course(self.create(), start)
            self._course(environment, earlier)
            _require_same(alone, self._course(environment, start), "an episode had been played before")

    def test_a_reset_in_the_middle_of_an_episode_begins_afresh(self) -> None:
        starts = self._starts()
        environment = self.create()
        for number, start in enumerate(starts):
            alone = self._course(self.create(), start)
            for events in (1, 2):  # left before and after the first action
                for _ in islice(self._episode(environment, starts[number - 1]), events):
                    pass
                _require_same(alone, self._course(environment, start), "the episode before was left in the middle")

    def test_two_environments_do_not_disturb_each_other(self) -> None:
        starts = self._starts()
        for one, other in zip(starts, [*starts[1:], starts[0]], strict=True):
            alone = [self._course(self.create(), start) for start in (one, other)]
            plays = [self._episode(self.create(), start) for start in (one, other)]
            together: tuple[list[Any], list[Any]] = ([], [])
            for pair in zip_longest(*plays):
                for course, event in zip(together, pair, strict=True):
                    course += [] if event is None else [told(event)]
            for expected, found in zip(alone, together, strict=True):
                _require_same(expected, found, "another object was played in turns with it")

    def test_the_example_stays_as_it_was(self) -> None:
        for seed, example in self._starts():
            before = content(example)
            self._course(self.create(), (seed, example))
            require(
                content(example) == before,
                f"changed the example {example.name if example else ''}; others of its group and later epochs get the "
                "same object, so work on a copy",
            )

    def test_rewards_are_finite_numbers(self) -> None:
        for turn, transition in self._transitions():
            reward = transition.reward
            number = isinstance(reward, int | float | np.integer | np.floating)
            require(
                number and math.isfinite(reward),
                f"gave the reward {shortened(reward)} for action {turn}; expected a finite number",
            )

    def test_terminated_truncated_and_parsed_are_true_or_false(self) -> None:
        for turn, transition in self._transitions():
            for name in ("terminated", "truncated", "parsed"):
                value = getattr(transition, name)
                require(
                    isinstance(value, bool),
                    f"gave {name}={shortened(value)}, a {_kind(value)}, after action {turn}; expected True or False",
                )

    def test_an_observation_follows_unless_the_episode_is_terminated(self) -> None:
        """A truncated episode would have gone on, and what it was left in has a value."""
        for turn, transition in self._transitions():
            require(
                transition.observation is not None or transition.terminated,
                f"no observation came after action {turn}, with terminated={transition.terminated} and "
                f"truncated={transition.truncated}; expected one unless the episode is terminated, for the policy to "
                "go on from, or to value",
            )

    def test_info_is_a_mapping_from_names(self) -> None:
        for turn, transition in self._transitions():
            info = transition.info
            require(
                isinstance(info, Mapping) and all(isinstance(key, str) for key in info),
                f"gave info={shortened(info)} after action {turn}; expected a mapping from str, {{}} for nothing",
            )

    def test_success_is_true_or_false(self) -> None:
        for turn, transition in self._transitions():
            success = transition.info.get("success", False)
            require(
                isinstance(success, bool),
                f"gave info['success']={shortened(success)}, a {_kind(success)}, after action {turn}; expected True "
                "or False, for evaluation counts every true value as a success",
            )

    def test_choices_are_two_or_more_different_texts(self) -> None:
        for observation in self._observations():
            problem = None if observation.choices is None else choices_problem(observation.choices)
            require(problem is None, f"the choices {problem}")

    def test_choices_are_shown_where_they_are_promised(self) -> None:
        promises = bool(self.component) and "choices" in self.find().spec.provides
        if not promises and self._task().choices is None:
            raise SkipTest("neither the component nor the task says that there are choices")
        for observation in self._observations():
            require(
                observation.choices is not None,
                "an observation has choices=None, although "
                + ("the ComponentSpec provides 'choices'" if promises else "the task has choices")
                + "; an algorithm that needs them would stop in the middle of a run",
            )

    def test_every_choice_is_accepted(self) -> None:
        starts = [start for start in self._starts() if self._reset(start).choices is not None]
        if not starts:
            raise SkipTest("the first observation has no choices")
        for start in starts:
            for index, choice in enumerate(self._reset(start).choices or ()):
                self._try(start, Action(choice, choice=index))

    def test_any_text_is_accepted(self) -> None:
        starts = [start for start in self._starts() if self._reset(start).choices is None]
        if not starts:
            raise SkipTest("the first observation has choices")
        texts = ("", " ", "yes", "0", samples.NONSENSE, samples.UNICODE, samples.LONG, "[]", "null", '{"action": 1}')
        for text in (*texts, *samples.ODD_NUMBERS):
            for ended in (True, False):
                self._try(starts[0], Action(text, ended=ended))

    def test_every_episode_ends(self) -> None:
        for start in self._starts():
            for player in self._players(start, constant=12):
                length = sum(1 for _ in self._episode(self.create(), start, player, self.max_turns + 1)) - 1
                require(
                    length <= self.max_turns,
                    f"an episode of {player.name} is not over after {self.max_turns} actions; end it as truncated, or "
                    "raise max_turns",
                )

    def _task(self) -> TaskSection:
        return TaskSection.model_validate(dict(self.task))

    def courses(self) -> str:
        """A hash of what the episodes show."""
        played = [(start, player) for start in self._starts() for player in self._players(start, constant=8)]
        return digest([self._course(self.create(), start, player) for start, player in played])

    def _starts(self) -> list[Start]:
        examples = list(self.examples())
        count = max(len(examples), len(self.seeds))
        return [(self.seeds[n % len(self.seeds)], examples[n % len(examples)]) for n in range(count)]

    def _reset(self, start: Start, environment: Environment | None = None) -> Observation:
        first = next(self._episode(self.create() if environment is None else environment, start))
        assert isinstance(first, Observation)
        return first

    def _players(self, start: Start, constant: int = 3) -> list[Player]:
        """One that mixes the actions, and some that repeat one of them."""
        count = min(constant, len(self.actions(self._reset(start))))
        return [Player(self.actions, number) for number in (None, *range(count))]

    def _episode(
        self, environment: Environment, start: Start, player: Player | None = None, turns: int | None = None
    ) -> Iterator[Observation | Transition]:
        """The observation of the reset, then the transitions."""
        return episode(environment, start, player or Player(self.actions), turns or self.max_turns)

    def _course(
        self, environment: Environment, start: Start, player: Player | None = None, disturb: int | None = None
    ) -> list[dict[str, object]]:
        """What an episode showed, as far as it must repeat."""
        course = []
        for event in self._episode(environment, start, player):
            course.append(told(event))
            if disturb is not None:
                random.seed(disturb)
                np.random.seed(disturb)
        return course

    def _transitions(self) -> Iterator[tuple[int, Transition]]:
        """Every transition of a few episodes, with the number of the action that led to it."""
        for start in self._starts():
            for player in self._players(start):
                for turn, event in enumerate(self._episode(self.create(), start, player)):
                    if isinstance(event, Transition):
                        yield turn, event

    def _observations(self) -> Iterator[Observation]:
        for start in self._starts():
            yield self._reset(start)
        for _, transition in self._transitions():
            if transition.observation is not None:
                yield transition.observation

    def _try(self, start: Start, action: Action) -> None:
        environment = self.create()
        self._reset(start, environment)
        try:
            environment.step(action)
        except Exception as error:
            raise ConformanceError(
                f"raised {type(error).__name__}: {error}, for {shortened(action)}; a policy may do that, so give "
                "a Transition, if need be with a penalty"
            ) from error


def courses_of(component: str, options: Any, task: Any, seeds: Any, max_turns: int) -> str:
    """What an installed environment shows in this process, for comparison with another."""
    suite = EnvironmentConformance()
    suite.component, suite.options, suite.task, suite.seeds, suite.max_turns = (
        component,
        options,
        task,
        seeds,
        max_turns,
    )
    return suite.courses()


def check_environment(
    create: Callable[[], Environment], examples: Sequence[Example | None] = (None,), max_turns: int = 200
) -> None:
    """Check the environments that `create()` makes, installed or not. Raises ConformanceError that lists what is wrong.

    examples: what episodes are about; leave it out for an environment that makes its own tasks from the seed.
    max_turns: every episode must be over after this many actions.
    """
    given, limit = examples, max_turns

    class Unregistered(EnvironmentConformance):
        max_turns = limit

        def create(self) -> Environment:
            return create()

        def examples(self) -> Sequence[Example | None]:
            return given

    raise_failures(run(Unregistered()))


def _check_observation(observation: Observation, when: str) -> None:
    for message in _entries(observation.messages, Message, f"the observation of {when} has messages"):
        require(
            message.role in get_args(Role),
            f"a message of {when} has the role {message.role!r}; expected one of {', '.join(get_args(Role))}",
        )
        for part in _entries(message.parts, TextPart | ImagePart, f"a message of {when} has parts"):
            text = isinstance(part, TextPart)
            problem = text_problem(part.text) if text else image_problem(part.image)
            require(problem is None, f"a {'text' if text else 'picture'} of {when} {problem}")
    texts = [part.text for message in observation.messages for part in message.parts if isinstance(part, TextPart)]
    require(
        observation.images or "".join(texts).strip(),
        f"the observation of {when} has neither a picture nor a text that is not blank",
    )


def _entries(entries: Any, kind: Any, what: str) -> Any:
    if not isinstance(entries, tuple) or not entries or not all(isinstance(entry, kind) for entry in entries):
        expected = " or ".join(item.__name__ for item in get_args(kind) or [kind])
        raise ConformanceError(f"{what}={shortened(entries)}; expected a tuple of at least one {expected}")
    return entries


def _require_same(first: list[dict[str, object]], second: list[dict[str, object]], circumstances: str) -> None:
    problem = difference(first, second)
    require(problem is None, f"{problem}, where {circumstances}; seed, example and actions alone decide an episode")


def _kind(value: object) -> str:
    """`str`, `numpy.bool`: a type's name with its package, since NumPy's look like Python's."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
