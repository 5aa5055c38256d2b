"""Environments that fail: told of, counted, and never the end of a run that has others."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rllava_core.errors import RewardError, TrainingError
from rllava_core.mdp.environment import Failure, Start
from rllava_core.mdp.messages import Action, Observation, Transition
from rllava_core.training import build

Run = Callable[..., dict[str, Any]]
Logged = Callable[[], list[dict[str, Any]]]


class Unreliable:
    """A pool of which some members of a step's episodes fail, by their number: before the reset, or in the first turn.

    A step has 16 episodes, an evaluation 6, and one is begun before the run.
    """

    def __init__(self, pool: Any, reset: Mapping[int, str], step: Mapping[int, str], size: int = 16) -> None:
        self.pool = pool
        self.failures = {"reset": reset, "step": step}
        self.size = size
        self.closed = 0

    def reset(self, starts: Sequence[Start]) -> list[Observation | Failure]:
        self.active = len(starts) == self.size
        return [self.found("reset", number) or seen for number, seen in enumerate(self.pool.reset(starts))]

    def step(self, actions: Mapping[int, Action]) -> dict[int, Transition | Failure]:
        return {number: self.found("step", number) or seen for number, seen in self.pool.step(actions).items()}

    def found(self, when: str, number: int) -> Failure | None:
        what = self.failures[when].get(number) if self.active else None
        return None if what is None else Failure(what)

    def close(self) -> None:
        self.closed += 1
        self.pool.close()


@pytest.fixture
def unreliable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Unreliable]]:
    """`unreliable(reset={3: "died"}, step={})`: the pools of runs to come; returns those that were made."""

    def prepare(reset: Mapping[int, str], step: Mapping[int, str], size: int = 16) -> list[Unreliable]:
        original = build.environment_pool
        made: list[Unreliable] = []

        def make(resolved: Any) -> Unreliable:
            made.append(Unreliable(original(resolved), reset, step, size))
            return made[-1]

        monkeypatch.setattr(build, "environment_pool", make)
        return made

    return prepare


def test_environments_that_fail_are_told_of_once_a_kind_and_counted(
    run_toy: Run, logged: Logged, tmp_path: Path, watcher: Any, unreliable: Any
) -> None:
    unreliable({3: "died", 4: "died"}, {9: "did not answer for 60 s"})

    summary = run_toy("training.steps=3")

    assert summary["status"] == "completed"
    assert summary["environment_failures"] == {"died": 6, "did not answer for 60 s": 3}
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8")) == summary
    assert len(watcher.warnings) == 2
    for warning, what in zip(watcher.warnings, ("died", "did not answer for 60 s"), strict=True):
        expected = rf"step 1: colours:\d+: the environment {what}; its episode ends here and the run goes on"
        assert re.fullmatch(expected, warning)
    lines = logged()
    assert [line["rollout/environment_failures"] for line in lines[1:]] == [3, 3, 3]
    assert "rollout/environment_failures" not in lines[0]


def test_a_run_without_failures_does_not_speak_of_them(run_toy: Run, logged: Logged) -> None:
    assert "environment_failures" not in run_toy("training.steps=1")
    assert logged()[1]["rollout/environment_failures"] == 0


def test_failures_are_counted_over_a_resume(run_toy: Run, watcher: Any, unreliable: Any) -> None:
    unreliable({3: "died"}, {})
    watcher.stepped = lambda step, metrics: signal.raise_signal(signal.SIGINT) if step == 2 else None
    assert run_toy("training.steps=4")["environment_failures"] == {"died": 2}

    watcher.stepped = lambda step, metrics: None
    assert run_toy("training.steps=4", resume=True)["environment_failures"] == {"died": 4}
    assert len([warning for warning in watcher.warnings if "died" in warning]) == 1


def test_endless_kinds_of_failures_do_not_flood_the_screen(run_toy: Run, watcher: Any, unreliable: Any) -> None:
    steps = 0

    class Numbered(dict[int, str]):
        def get(self, number: int, default: Any = None) -> Any:
            nonlocal steps
            steps += 1
            return f"raised {steps}" if number < 15 else None

    unreliable({}, Numbered())
    summary = run_toy("training.steps=2")

    assert len(watcher.warnings) == len(summary["environment_failures"]) == 20


def test_a_failure_in_an_evaluation_is_told_of_too(run_toy: Run, watcher: Any, unreliable: Any) -> None:
    unreliable({2: "died"}, {}, size=6)
    summary = run_toy("training.steps=1")

    assert [evaluation.episodes for evaluation in watcher.evaluations.values()] == [5, 5]
    assert summary["environment_failures"] == {"died": 2}
    assert len(watcher.warnings) == 1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (16, r"^step 1: the environments of all episodes failed before their first turn was done; no checkpoint"),
        (6, r"^evaluation at step 0: the environments of all held-out episodes failed before"),
        (1, r"^colours:0: the environment died$"),
    ],
)
def test_a_run_whose_environments_all_fail_ends(run_toy: Run, unreliable: Any, size: int, message: str) -> None:
    unreliable({}, dict.fromkeys(range(16), "died"), size) if size > 1 else unreliable({0: "died"}, {}, size)
    with pytest.raises(TrainingError, match=message):
        run_toy()


def test_environments_are_closed_however_a_run_ends(run_toy: Run, unreliable: Any, tmp_path: Path) -> None:
    made = unreliable({}, {})
    run_toy("training.steps=1")
    assert [pool.closed for pool in made] == [1]

    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RewardError):
        run_toy("task.rewards=[{name: broken, call: 2}]")
    assert [pool.closed for pool in made] == [1, 1]
