"""Episodes: environments, the policy and token ids between them.

Environment.reset ─▶ Observation ─▶ ModelAdapter.render ─▶ RolloutEngine.generate ─▶ Action ─▶ Environment.step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from rllava_core.engines.protocol import RolloutEngine
from rllava_core.errors import DataError, RllavaError, TrainingError, describe
from rllava_core.mdp.environment import Environment
from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action, ImagePart, Observation, Transition
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Trajectory
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.media import MediaStore
from rllava_core.policy.sampling import Request

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """Where a group begins: an example, or a seed alone."""

    example: Example | None
    seed: int

    @property
    def name(self) -> str:
        return self.example.name if self.example is not None else f"episode with seed {self.seed}"


class Episodes:
    """Plays groups of episodes with the policy, or writes them down from the examples' own answers."""

    def __init__(
        self,
        adapter: ModelAdapter,
        media: MediaStore,
        sampler: RolloutEngine,
        environment: Callable[[], Environment],
        max_new_tokens: int,
    ) -> None:
        self._adapter = adapter
        self._media = media
        self._sampler = sampler
        self._environment = environment
        self._max_new_tokens = max_new_tokens
        self._pool: list[Environment] = []
        self._encoded: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}

    def play(self, starts: Sequence[Start], group_size: int, seed: int | None) -> list[Trajectory]:
        """`group_size` episodes from each start, group by group. Greedy if `seed` is None."""
        environments = self._environments(len(starts) * group_size)
        observations = [
            _reset(environments[number], start)
            for number, start in enumerate(start for start in starts for _ in range(group_size))
        ]
        # The members of a group see the same, so one prompt serves them all.
        first = [observations[number * group_size] for number in range(len(starts))]
        prompts = [self._prompt(observation, start.name) for observation, start in zip(first, starts, strict=True)]
        actions = self._sampler.generate(
            [
                self._request(prompt, observation, group_size, start.name)
                for prompt, observation, start in zip(prompts, first, starts, strict=True)
            ],
            seed,
        )
        return [
            self._finish(environments[group * group_size + member], start, group, prompts[group], action)
            for group, (start, members) in enumerate(zip(starts, actions, strict=True))
            for member, action in enumerate(members)
        ]

    def demonstrate(self, starts: Sequence[Start]) -> list[Trajectory]:
        """One episode a start in which the policy gives the example's answer, with log-probs of zero."""
        trajectories = []
        for group, (environment, start) in enumerate(zip(self._environments(len(starts)), starts, strict=True)):
            observation = _reset(environment, start)
            action = self._answer(start, observation)
            trajectories.append(self._finish(environment, start, group, self._prompt(observation, start.name), action))
        return trajectories

    def _environments(self, count: int) -> list[Environment]:
        while len(self._pool) < count:
            self._pool.append(self._environment())
        return self._pool[:count]

    def _prompt(self, observation: Observation, name: str) -> ContextSegment:
        images = observation.images
        try:
            tokens = self._adapter.render(observation.messages, self._media.features(images))
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        lines = [
            f"{message.role}: "
            + "".join("[image]" if isinstance(part, ImagePart) else part.text for part in message.parts)
            for message in observation.messages
        ]
        return ContextSegment(tokens, images, "\n".join(lines))

    def _request(self, prompt: ContextSegment, observation: Observation, count: int, name: str) -> Request:
        choices = observation.choices
        return Request(
            context=(prompt,),
            count=count,
            max_tokens=self._max_new_tokens,
            name=name,
            choices=None if choices is None else self._choices(choices),
            choice_texts=choices or (),
        )

    def _choices(self, choices: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each choice.

        If one begins with another ("1" and "10"), the shorter would always be the likelier, so then each ends with
        the end-of-turn token, and the scores are of whole answers.
        """
        if choices not in self._encoded:
            encoded = [self._adapter.encode(choice) for choice in choices]
            nested = any(
                first != second and longer[: len(shorter)] == shorter
                for first, shorter in enumerate(encoded)
                for second, longer in enumerate(encoded)
            )
            ending = (self._adapter.end_of_turn[0],) if nested else ()
            self._encoded[choices] = tuple(tokens + ending for tokens in encoded)
        return self._encoded[choices]

    def _answer(self, start: Start, observation: Observation) -> ActionSegment:
        answer = start.example.answer if start.example is not None else None
        if answer is None:
            raise DataError(f"{start.name}: has no answer to learn from")
        if observation.choices is None:
            tokens = (*self._adapter.encode(answer), self._adapter.end_of_turn[0])
            return ActionSegment(tokens, np.zeros(len(tokens), np.float32), answer)
        if answer not in observation.choices:
            raise DataError(f"{start.name}: answer {answer!r} is none of the choices {', '.join(observation.choices)}")
        choices, index = self._choices(observation.choices), observation.choices.index(answer)
        return ActionSegment(choices[index], np.zeros(1, np.float32), answer, choice=index, choices=choices)

    def _finish(
        self, environment: Environment, start: Start, group: int, prompt: ContextSegment, action: ActionSegment
    ) -> Trajectory:
        if not np.isfinite(action.logprobs).all():
            raise TrainingError(f"{start.name}: the policy's log-probs are not finite, so its weights are damaged")
        with _playing(start):
            action_taken = Action(action.text, action.choice, action.ended)
            transition = _expect(Transition, environment.step(action_taken), "step")
        if not transition.done:
            raise TrainingError(f"{start.name}: the environment goes on after one turn; episodes have one turn so far")
        return Trajectory(
            example=start.example,
            seed=start.seed,
            group=group,
            segments=(prompt, action),
            rewards=(transition.reward,),
            terminated=transition.terminated,
            truncated=transition.truncated,
            info=transition.info,
        )


def _reset(environment: Environment, start: Start) -> Observation:
    with _playing(start):
        return _expect(Observation, environment.reset(seed=start.seed, example=start.example), "reset")


def _expect(expected: type[T], returned: T, method: str) -> T:
    """What a plugin's environment returned, if it is what the contract says."""
    if not isinstance(returned, expected):
        raise TrainingError(
            f"the environment's {method}() returned a {type(returned).__name__}; expected a {expected.__name__}"
        )
    return returned


@contextmanager
def _playing(start: Start) -> Iterator[None]:
    """What an environment's code raises becomes an error that names the episode."""
    try:
        yield
    except TrainingError as error:
        raise TrainingError(f"{start.name}: {error}") from error
    except RllavaError:
        raise
    except (Exception, SystemExit) as error:
        raise TrainingError(f"{start.name}: the environment {describe(error)}") from error
