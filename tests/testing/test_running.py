"""Running a suite without pytest: what becomes of each check, and which are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar
from unittest import SkipTest

import pytest

from rllava_core.errors import DataError, RewardError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.specs import Kind
from rllava_core.testing import RewardConformance
from rllava_core.testing.conformance import (
    Conformance,
    ConformanceError,
    Outcome,
    checks_of,
    opinionated,
    raise_failures,
    require,
    run,
    slow,
)


class Everything(Conformance):
    kind: ClassVar[Kind] = "reward"

    def test_that_passes(self) -> None:
        require(True, "never said")

    def test_that_fails(self) -> None:
        require(False, "it is so")

    def test_that_does_not_apply(self) -> None:
        raise SkipTest("not here")

    def test_that_crashes(self) -> None:
        raise KeyError("oops")

    def test_that_exits(self) -> None:
        raise SystemExit(3)

    def test_without_data(self) -> None:
        raise DataError("no such file")

    @slow
    def test_that_takes_long(self) -> None:
        pass

    @opinionated
    def test_that_needs_its_author(self) -> None:
        require(False, "who knows")


LINE_OF_THE_CRASH = Everything.test_that_crashes.__code__.co_firstlineno + 1


def own(outcomes: list[Outcome]) -> list[Outcome]:
    common = {name.removeprefix("test_") for name in checks_of(Conformance)}
    return [outcome for outcome in outcomes if outcome.check not in common]


def test_every_outcome_is_reported_and_none_is_raised() -> None:
    assert own(run(Everything())) == [
        Outcome("that_passes", "passed"),
        Outcome("that_fails", "failed", "it is so"),
        Outcome("that_does_not_apply", "skipped", "not here"),
        Outcome("that_crashes", "failed", f"raised KeyError: 'oops' (test_running.py:{LINE_OF_THE_CRASH})"),
        Outcome("that_exits", "failed", f"called sys.exit(3) (test_running.py:{LINE_OF_THE_CRASH + 3})"),
        Outcome("without_data", "failed", "the samples do not suit it: no such file"),
        Outcome("that_takes_long", "passed"),
        Outcome("that_needs_its_author", "failed", "who knows"),
    ]


def test_a_quick_run_leaves_out_what_is_slow_or_needs_the_author_and_forgives_missing_data() -> None:
    outcomes = {outcome.check: outcome.status for outcome in own(run(Everything(), quick=True))}

    assert outcomes["that_takes_long"] == outcomes["that_needs_its_author"] == outcomes["without_data"] == "skipped"
    assert outcomes["that_fails"] == outcomes["that_crashes"] == "failed"


def test_the_checks_of_spec_and_config_are_skipped_where_no_component_is_named() -> None:
    common = set(checks_of(Conformance))
    outcomes = [outcome for outcome in run(Everything()) if f"test_{outcome.check}" in common]

    assert {outcome.status for outcome in outcomes} == {"skipped"}


def test_failures_are_raised_together() -> None:
    with pytest.raises(ConformanceError) as caught:
        raise_failures(run(Everything()))

    assert str(caught.value).splitlines()[0] == "that fails: it is so"
    assert str(caught.value).splitlines()[1].startswith("that crashes: raised KeyError: 'oops'")
    raise_failures([Outcome("fine", "passed"), Outcome("absent", "skipped", "no")])


class Chooser:
    """Judges only what it knows."""

    def __call__(self, trajectories: Sequence[Trajectory], /) -> list[float]:
        raise RewardError("needs examples with a field 'boxes'")


class Crasher:
    def __call__(self, trajectories: Sequence[Trajectory], /) -> list[float]:
        raise KeyError("boxes")


class Comparer:
    """Judges groups of two or more: in an evaluation there are none."""

    def __call__(self, trajectories: Sequence[Trajectory], /) -> list[float]:
        if len(trajectories) < 2:
            raise RewardError("needs groups of two")
        return [float(len(trajectory.answer)) for trajectory in trajectories]


def test_a_reward_that_refuses_only_some_samples_is_found_wrong_by_the_quick_checks_too() -> None:
    class Suite(RewardConformance):
        def create(self) -> object:
            return Comparer()

    outcomes = {outcome.check: outcome for outcome in run(Suite(), quick=True)}

    assert outcomes["a_batch_of_one_gets_one_number"].status == "failed"
    assert "needs groups of two" in outcomes["a_batch_of_one_gets_one_number"].message


@pytest.mark.parametrize(
    ("reward", "quick", "status"),
    [
        (Chooser, True, "skipped"),
        (Chooser, False, "failed"),
        (Crasher, True, "failed"),
    ],
)
def test_a_reward_that_says_what_it_needs_is_not_found_wrong_by_the_quick_checks(
    reward: type, quick: bool, status: str
) -> None:
    class Suite(RewardConformance):
        def create(self) -> object:
            return reward()

    outcomes = {outcome.check: outcome for outcome in run(Suite(), quick=quick)}

    found = outcomes["every_trajectory_gets_one_finite_number"]
    assert found.status == status
    assert "boxes" in found.message
