"""What every reward function must keep to: one finite number a trajectory, whatever the policy answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar
from unittest import SkipTest

import numpy as np

from rllava_core.errors import RllavaError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.rewards import Reward, WeightedReward, reported, score
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.specs import Kind
from rllava_core.testing import samples
from rllava_core.testing.conformance import (
    Conformance,
    ConformanceError,
    UnsuitedError,
    opinionated,
    raise_failures,
    require,
    run,
)
from rllava_core.testing.values import content, shortened


class RewardConformance(Conformance):
    """The checks of a reward function.

    deterministic: the same trajectories get the same numbers at every call. Off for a reward that samples, or that
        learns from what it has seen.
    discriminates: some of the sample answers get another number than others. Off for a reward whose difference shows
        only in what the samples lack.

    Override `examples` for a reward that judges only some questions or answers, `right_answer` for one that expects a
    form (`<answer>42</answer>`), and `trajectories` for one that reads turns or `info`.
    """

    kind: ClassVar[Kind] = "reward"
    deterministic: bool = True
    discriminates: bool = True

    def examples(self) -> Sequence[Example]:
        """Examples that the reward can judge; each becomes a group."""
        return samples.examples()

    def right_answer(self, example: Example) -> str:
        """An answer that this reward should like."""
        return example.answer if example.answer is not None else "yes"

    def trajectories(self) -> Sequence[Trajectory]:
        """The batch that most checks give the reward; the first one's last answer is replaced by odd ones."""
        examples = self.examples()
        batch = []
        for group, example in enumerate(examples):
            right, wrong = (self.right_answer(examples[(group + shift) % len(examples)]) for shift in (0, 1))
            batch += [
                samples.episode(example, answer, group=group)
                for answer in (right, wrong, f"I think that it is {right}", "")
            ]
        return batch

    def test_it_can_be_constructed_and_called(self) -> None:
        reward = self.create()
        require(callable(reward), f"{shortened(reward)} cannot be called; a reward has __call__(trajectories)")

    def test_every_trajectory_gets_one_finite_number(self) -> None:
        self._values(self.create(), self.trajectories())

    def test_a_batch_of_one_gets_one_number(self) -> None:
        reward = self.create()
        for trajectory in self.trajectories():
            self._values(reward, [trajectory])

    def test_an_empty_batch_gets_no_number(self) -> None:
        answer = list(self.create()([]))
        require(not answer, f"returned {shortened(answer)} for no trajectories; expected []")

    def test_the_same_batch_gets_the_same_numbers_again(self) -> None:
        self._needs_determinism()
        reward, batch = self.create(), self.trajectories()
        first, second = self._values(reward, batch), self._values(reward, batch)
        _require_equal(batch, first, second, "first", "when called again", "set deterministic = False if it must vary")

    def test_the_numbers_follow_the_trajectories_when_the_batch_is_reordered(self) -> None:
        self._needs_determinism()
        batch = list(self.trajectories())
        expected = self._values(self.create(), batch)
        reward = self.create()
        for order in (range(len(batch))[::-1], [(number + 1) % len(batch) for number in range(len(batch))]):
            values = dict(zip(order, self._values(reward, [batch[number] for number in order]), strict=True))
            found = [values[number] for number in range(len(batch))]
            hint = "return the numbers in the order of the trajectories, and let no number depend on a place"
            _require_equal(batch, expected, found, "in one order of the batch", "in another", hint)

    def test_the_trajectories_stay_as_they_were(self) -> None:
        batch = list(self.trajectories())
        before = [_parts(trajectory) for trajectory in batch]
        self.create()(list(batch))
        for trajectory, parts in zip(batch, before, strict=True):
            after = _parts(trajectory)
            changed = [name for name in parts if parts[name] != after[name]]
            require(
                not changed,
                f"changed {', '.join(changed)} of the trajectory of {trajectory.name}; training reads it afterwards, "
                "so work on a copy",
            )

    def test_the_batch_stays_as_it_was(self) -> None:
        batch = list(self.trajectories())
        given = list(batch)
        self.create()(given)
        require(
            len(given) == len(batch) and all(one is other for one, other in zip(given, batch, strict=True)),
            "changed the list of trajectories that it was given (sorted it, or took some out); work on a copy",
        )

    def test_an_empty_answer_gets_a_number(self) -> None:
        self._score_answer("")

    def test_an_answer_of_any_script_gets_a_number(self) -> None:
        self._score_answer(samples.UNICODE)

    def test_a_very_long_answer_gets_a_number(self) -> None:
        self._score_answer(samples.LONG)

    def test_an_answer_of_nonsense_gets_a_number(self) -> None:
        self._score_answer(samples.NONSENSE)

    def test_answers_of_odd_numbers_get_finite_numbers(self) -> None:
        for answer in samples.ODD_NUMBERS:
            self._score_answer(answer)

    def test_a_cut_answer_gets_a_number(self) -> None:
        first = self.trajectories()[0]
        for answer in (first.answer, first.answer[:1]):
            self._values(self.create(), [samples.answering(first, answer, ended=False)])

    def test_a_chosen_answer_gets_a_number(self) -> None:
        first = self.trajectories()[0]
        for answer in (first.answer, "something else"):
            choices = (first.answer, "something else")
            self._values(self.create(), [samples.answering(first, answer, choices=choices)])

    def test_an_episode_of_several_turns_gets_a_number(self) -> None:
        first = self.trajectories()[0]
        turns = replace(first, turns=first.turns * 3)
        self._values(self.create(), [turns, first, samples.answering(turns, "")])

    def test_a_missing_right_answer_gets_a_number_or_an_error_that_explains_it(self) -> None:
        first = self.trajectories()[0]
        without = [replace(first, example=None)]
        if first.example is not None:
            without.append(replace(first, example=replace(first.example, answer=None)))
        reward = self.create()
        for trajectory in without:
            try:
                reward([trajectory])
            except RllavaError:
                continue
            except Exception as error:
                raise ConformanceError(
                    f"raised {type(error).__name__}: {error}, for a trajectory whose example "
                    f"{'is None' if trajectory.example is None else 'has the answer None'}; raise a RewardError that "
                    "says what is needed, or return a number"
                ) from error
            self._values(reward, [trajectory])

    @opinionated
    def test_some_answers_get_another_number_than_others(self) -> None:
        if not self.discriminates:
            raise SkipTest("discriminates is off")
        batch = list(self.trajectories())
        batch += [samples.answering(batch[0], samples.LONG), samples.answering(batch[0], batch[0].answer, ended=False)]
        values = self._values(self.create(), batch)
        require(
            len(set(values)) > 1,
            f"gave {values[0]:g} to all {len(batch)} samples, right, wrong, empty, long and cut answers alike; such a "
            "reward teaches nothing. If it likes answers of another form or reads something else, override "
            "right_answer, examples or trajectories; otherwise set discriminates = False",
        )

    def test_two_objects_share_no_state(self) -> None:
        self._needs_determinism()
        batch = list(self.trajectories())
        one = self.create()
        before = self._values(one, batch)
        hint = "keep state in the object, not in its class or module"
        _require_equal(batch, before, self._values(self.create(), batch), "by one object", "by a second one", hint)
        self._values(self.create(), batch[:1])
        _require_equal(batch, before, self._values(one, batch), "first", "after another object was used", hint)

    def test_what_it_reports_are_numbers_by_name(self) -> None:
        """The optional `report()`."""
        reward = self.create()
        self._values(reward, self.trajectories())
        reported(reward, type(reward).__name__, ConformanceError)

    def _score_answer(self, answer: str) -> None:
        batch = self.trajectories()
        # Alone and among others: a reward that compares answers takes another path.
        odd = samples.answering(batch[0], answer)
        reward = self.create()
        self._values(reward, [odd])
        self._values(reward, [*batch, odd])

    def _values(self, reward: Reward, trajectories: Sequence[Trajectory]) -> list[float]:
        """The numbers, by the same rules as in a run."""
        name = type(reward).__name__
        try:
            scored = score(list(trajectories), [WeightedReward(name, 1.0, reward)])
        except RllavaError as error:
            # Samples that it cannot judge at all say nothing; if it refuses only some, a run will meet such too.
            unsuited = _refuses(self.create(), self.trajectories())
            raise (UnsuitedError if unsuited else ConformanceError)(str(error)) from error
        values = [trajectory.scores[name] for trajectory in scored]
        for trajectory, value in zip(trajectories, values, strict=True):
            require(
                abs(value) <= float(np.finfo(np.float32).max),
                f"gave {value:g} to answer {shortened(trajectory.answer)}, which is infinite in float32, in which "
                "training computes; keep rewards near 1",
            )
        return values

    def _needs_determinism(self) -> None:
        if not self.deterministic:
            raise SkipTest("deterministic is off")


def check_reward(create: Callable[[], Reward], examples: Sequence[Example] | None = None) -> None:
    """Check the rewards that `create()` makes, installed or not. Raises ConformanceError that lists what is wrong.

    examples: which the reward can judge, where the kit's own do not suit it.
    """
    given = examples

    class Unregistered(RewardConformance):
        def create(self) -> Reward:
            return create()

        def examples(self) -> Sequence[Example]:
            return super().examples() if given is None else given

    raise_failures(run(Unregistered()))


def _refuses(reward: Reward, trajectories: Sequence[Trajectory]) -> bool:
    """Whether the reward says, with an error of its own, that it cannot judge them."""
    try:
        reward(trajectories)
    except RllavaError:
        return True
    except Exception:  # noqa: BLE001 - the checks report what it is
        return False
    return False


def _parts(trajectory: Trajectory) -> dict[str, object]:
    return {name: content(value) for name, value in vars(trajectory).items()}


def _require_equal(
    batch: Sequence[Trajectory], first: Sequence[float], second: Sequence[float], when: str, then: str, hint: str
) -> None:
    for trajectory, one, other in zip(batch, first, second, strict=True):
        # Sums over a batch may differ in their last digits.
        require(
            math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-8),
            f"gave {one:g} to answer {shortened(trajectory.answer)} of {trajectory.name} {when} and {other:g} {then}; "
            f"{hint}",
        )
