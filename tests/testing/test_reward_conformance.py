"""Every check of a reward has a mutant that it catches, and healthy rewards pass all of them."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from rllava_core.errors import RewardError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.testing import samples
from rllava_core.testing.conformance import Conformance, ConformanceError, Outcome, checks_of, run
from rllava_core.testing.rewards import RewardConformance, check_reward


class Healthy:
    """1 for the example's answer."""

    def __call__(self, trajectories: Sequence[Trajectory]) -> Any:
        return [self.judge(trajectory) for trajectory in trajectories]

    def judge(self, trajectory: Trajectory) -> Any:
        return float(trajectory.answer == self.expected(trajectory))

    def expected(self, trajectory: Trajectory) -> str:
        if trajectory.example is None or trajectory.example.answer is None:
            raise RewardError(f"{trajectory.name} has no answer to compare with")
        return trajectory.example.answer


class ComparesTheBatch(Healthy):
    """How much better an answer is than the mean of its batch, as a NumPy array."""

    def __call__(self, trajectories: Sequence[Trajectory]) -> Any:
        values = np.array(super().__call__(trajectories), np.float32)
        return values - values.mean() if len(values) else values


class SaysTrueOrFalse(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return bool(super().judge(trajectory))


class HasNoCall:
    pass


class NeedsAnArgument(Healthy):
    def __init__(self, path: str) -> None:
        pass


class ForgetsTheFirst(Healthy):
    def __call__(self, trajectories: Sequence[Trajectory]) -> Any:
        return super().__call__(trajectories)[1:]


class GivesOneNumberForAll(Healthy):
    def __call__(self, trajectories: Sequence[Trajectory]) -> Any:
        return sum(super().__call__(trajectories))


class GivesNothingForAWrongAnswer(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return super().judge(trajectory) or None


class DividesByTheLength(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return super().judge(trajectory) / len(trajectory.answer) if trajectory.answer else float("nan")


class PunishesBeyondFloat32(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return super().judge(trajectory) or -1e300


class DividesByTheDeviation(Healthy):
    def __call__(self, trajectories: Sequence[Trajectory]) -> Any:
        values = super().__call__(trajectories)
        return [value / (statistics.stdev(values) + 1) for value in values]


class SubtractsTheMean(Healthy):
    def __call__(self, trajectories: Sequence[Trajectory]) -> Any:
        values = super().__call__(trajectories)
        mean = sum(values) / len(values)
        return [value - mean for value in values]


class AddsNoise(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return super().judge(trajectory) + 0.1 * random.random()


class LosesInterest(Healthy):
    calls = 0

    def __call__(self, trajectories: Sequence[Trajectory]) -> Any:
        self.calls += 1
        return [value / self.calls for value in super().__call__(trajectories)]


class Sorts(Healthy):
    def __call__(self, trajectories: Sequence[Trajectory]) -> Any:
        return sorted(super().__call__(trajectories))


class PaysTheFirst(Healthy):
    def __call__(self, trajectories: Sequence[Trajectory]) -> Any:
        return [value + (place == 0) for place, value in enumerate(super().__call__(trajectories))]


class WritesIntoInfo(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        trajectory.info["right"] = super().judge(trajectory)  # type: ignore[index]
        return trajectory.info["right"]


class WritesIntoTheExample(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        if trajectory.example is not None:
            trajectory.example.fields.setdefault("seen", []).append(trajectory.answer)  # type: ignore[attr-defined]
        return super().judge(trajectory)


class EmptiesTheBatch(Healthy):
    def __call__(self, trajectories: Any) -> Any:
        values: list[float] = []
        while trajectories:
            values.insert(0, self.judge(trajectories.pop()))
        return values


class TakesTheLastWord(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return float(trajectory.answer.split()[-1] == self.expected(trajectory))


class SpeaksEnglishOnly(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return float(trajectory.answer.encode("ascii") == self.expected(trajectory).encode())


class ReadsLetterByLetter(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return super().judge(trajectory) - 1e-6 * self.length(trajectory.answer)

    def length(self, text: str) -> int:
        return 1 + self.length(text[1:]) if text else 0


class ExpectsJson(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return float("{" in trajectory.answer and json.loads(trajectory.answer) == {}) or super().judge(trajectory)


class MeasuresTheDistance(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        try:
            return -abs(float(trajectory.answer) - float(self.expected(trajectory)))
        except ValueError:
            return -1000.0


class LooksForTheEnd(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        action = trajectory.actions[-1]
        length = action.tokens.index(samples.END_OF_TURN) if action.choice is None else 1
        return super().judge(trajectory) - 1e-6 * length


class ExpectsALogProbForEachToken(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        action = trajectory.actions[-1]
        doubt = sum(float(logprob) for _, logprob in zip(action.tokens, action.logprobs, strict=True))
        return super().judge(trajectory) + 1e-6 * doubt


class ExpectsOneTurn(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        [_turn] = trajectory.turns
        return super().judge(trajectory)


class TakesAnAnswerForGranted(Healthy):
    def expected(self, trajectory: Trajectory) -> str:
        return trajectory.example.answer.strip()  # type: ignore[union-attr]


class ComparesWithTheWrongThing(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return float(self.expected(trajectory) == (trajectory.answer,))


class CountsObjects(Healthy):
    objects = 0

    def __init__(self) -> None:
        CountsObjects.objects += 1
        self.scale = CountsObjects.objects

    def judge(self, trajectory: Trajectory) -> Any:
        return super().judge(trajectory) * self.scale


class RemembersInTheClass(Healthy):
    best: ClassVar[dict[str, float]] = {}

    def __init__(self) -> None:
        self.best.clear()

    def __call__(self, trajectories: Sequence[Trajectory]) -> Any:
        values = super().__call__(trajectories)
        self.best.setdefault("first", max(values, default=0.0) + len(values))
        return [value / self.best["first"] for value in values]


class ReportsWords(Healthy):
    def report(self) -> Any:
        return {"cost": "nothing"}


class ReportsInfinity(Healthy):
    def report(self) -> Any:
        return {"cost": float("inf")}


class ReportsAList(Healthy):
    def report(self) -> Any:
        return [1.0, 2.0]


MUTANTS: dict[str, list[tuple[Any, str]]] = {
    "it_can_be_constructed_and_called": [(HasNoCall, "cannot be called"), (NeedsAnArgument, "'path'")],
    "every_trajectory_gets_one_finite_number": [
        (ForgetsTheFirst, "returned 11 values for 12 trajectories"),
        (GivesOneNumberForAll, "must return a list of one number for each"),
        (GivesNothingForAWrongAnswer, "it must return a number"),
        (DividesByTheLength, "it must be finite"),
        (PunishesBeyondFloat32, "infinite in float32"),
    ],
    "a_batch_of_one_gets_one_number": [(DividesByTheDeviation, "raised StatisticsError")],
    "an_empty_batch_gets_no_number": [(SubtractsTheMean, "raised ZeroDivisionError")],
    "the_same_batch_gets_the_same_numbers_again": [
        (AddsNoise, "deterministic = False"),
        (LosesInterest, "gave 1 to answer '7' of sample:0 first and 0.5 when called again"),
    ],
    "the_numbers_follow_the_trajectories_when_the_batch_is_reordered": [
        (Sorts, "in the order of the trajectories"),
        (PaysTheFirst, "let no number depend on a place"),
    ],
    "the_trajectories_stay_as_they_were": [
        (WritesIntoInfo, "changed turns of the trajectory of sample:0"),
        (WritesIntoTheExample, "changed example of the trajectory of sample:0"),
    ],
    "the_batch_stays_as_it_was": [(EmptiesTheBatch, "changed the list of trajectories")],
    "an_empty_answer_gets_a_number": [(TakesTheLastWord, "IndexError")],
    "an_answer_of_any_script_gets_a_number": [(SpeaksEnglishOnly, "UnicodeEncodeError")],
    "a_very_long_answer_gets_a_number": [(ReadsLetterByLetter, "RecursionError")],
    "an_answer_of_nonsense_gets_a_number": [(ExpectsJson, "JSONDecodeError")],
    "answers_of_odd_numbers_get_finite_numbers": [(MeasuresTheDistance, "answer 'nan'; it must be finite")],
    "a_cut_answer_gets_a_number": [(LooksForTheEnd, "ValueError")],
    "a_chosen_answer_gets_a_number": [(ExpectsALogProbForEachToken, "ValueError")],
    "an_episode_of_several_turns_gets_a_number": [(ExpectsOneTurn, "too many values to unpack")],
    "a_missing_right_answer_gets_a_number_or_an_error_that_explains_it": [
        (TakesAnAnswerForGranted, "AttributeError: 'NoneType' object has no attribute 'answer', for a trajectory"),
    ],
    "some_answers_get_another_number_than_others": [(ComparesWithTheWrongThing, "teaches nothing")],
    "two_objects_share_no_state": [
        (CountsObjects, "by a second one; keep state in the object"),
        (RemembersInTheClass, "after another object was used"),
    ],
    "what_it_reports_are_numbers_by_name": [
        (ReportsWords, r"report() raised ValueError"),
        (ReportsInfinity, "report() says that cost is inf; it must be finite"),
        (ReportsAList, "it must return numbers by name"),
    ],
}


def outcomes(create: Any, **attributes: Any) -> dict[str, Outcome]:
    suite = type("Suite", (RewardConformance,), {"create": lambda self: create(), **attributes})()
    return {outcome.check: outcome for outcome in run(suite)}


def failures(create: Any, **attributes: Any) -> dict[str, str]:
    found = outcomes(create, **attributes).values()
    return {outcome.check: outcome.message for outcome in found if outcome.status == "failed"}


def test_every_check_has_a_mutant() -> None:
    own = set(checks_of(RewardConformance)) - set(checks_of(Conformance))

    assert {f"test_{check}" for check in MUTANTS} == own


@pytest.mark.parametrize(
    ("check", "mutant", "message"),
    [(check, *pair) for check, pairs in MUTANTS.items() for pair in pairs],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mutant_is_caught_by_its_check(check: str, mutant: Any, message: str) -> None:
    outcome = outcomes(mutant)[check]

    assert outcome.status == "failed"
    assert message in outcome.message


@pytest.mark.parametrize("reward", [Healthy, ComparesTheBatch, SaysTrueOrFalse])
def test_a_healthy_reward_passes_every_check(reward: Any) -> None:
    found = outcomes(reward)

    assert {found[check].status for check in MUTANTS} == {"passed"}


@pytest.mark.parametrize("mutant", [AddsNoise, LosesInterest])
def test_a_reward_may_be_declared_random(mutant: Any) -> None:
    assert not failures(mutant, deterministic=False)


def test_a_reward_may_be_declared_blind_to_the_samples() -> None:
    assert not failures(ComparesWithTheWrongThing, discriminates=False)


class LikesTags(Healthy):
    def judge(self, trajectory: Trajectory) -> Any:
        return float(trajectory.answer == f"<answer>{self.expected(trajectory)}</answer>")


def test_an_author_says_what_a_right_answer_looks_like() -> None:
    def right_answer(self: Any, example: Example) -> str:
        return f"<answer>{example.answer}</answer>"

    assert list(failures(LikesTags)) == ["some_answers_get_another_number_than_others"]
    assert not failures(LikesTags, right_answer=right_answer)


def test_check_reward_needs_no_plugin() -> None:
    check_reward(Healthy)


def test_check_reward_lists_everything_that_is_wrong() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_reward(TakesTheLastWord)

    lines = str(caught.value).splitlines()
    assert len(lines) > 1
    assert any(line.startswith("an empty answer gets a number: ") for line in lines)
