"""Environments in worker processes: the same episodes as in this one, and what misbehaves ends its own episode."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rllava_core.errors import ConfigError, DataError, TrainingError
from rllava_core.mdp import workers
from rllava_core.mdp.environment import Failure, Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Observation, Transition
from rllava_core.mdp.pool import EnvironmentPool, LocalEnvironments
from rllava_core.mdp.workers import WorkerEnvironments
from rllava_toy.misbehaving import MakeMisbehaving

Course = list[Observation | Transition | Failure]

TIMEOUT = 1.0
WELL = "well"


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerEnvironments]:
    """Two workers that all tests share, as far as they leave them alive."""
    pool = WorkerEnvironments(MakeMisbehaving(), 2, TIMEOUT)
    yield pool
    pool.close()


@pytest.fixture
def local() -> LocalEnvironments:
    return LocalEnvironments(MakeMisbehaving())


def starts(*hows: str, at: int = 3) -> list[Start]:
    """One episode for each way to misbehave, with seeds from 0; `hangs 2` does so in step 2, `hangs` in step `at`."""
    begin = []
    for number, how in enumerate(hows):
        word, _, turn = how.partition(" ")
        begin.append(Start(Example(f"maps:{number}", {"how": word, "at": int(turn or at)}), number))
    return begin


def action(number: int, turn: int) -> Action:
    choice = (number + turn) % 2
    return Action(("left", "right")[choice], choice)


def play(environments: EnvironmentPool, begin: list[Start]) -> list[Course]:
    """What each episode shows until it ends."""
    courses: list[Course] = [[observation] for observation in environments.reset(begin)]
    turn = 0
    while running := [number for number, course in enumerate(courses) if not over(course)]:
        turn += 1
        # The order of the actions changes from turn to turn.
        asked = {number: action(number, turn) for number in running[:: 1 if turn % 2 else -1]}
        answers = environments.step(asked)
        assert list(answers) == list(asked)
        for number, answer in answers.items():
            courses[number].append(answer)
    return courses


def over(course: Course) -> bool:
    return isinstance(course[-1], Failure) or (isinstance(course[-1], Transition) and course[-1].done)


def told(course: Course) -> list[Any]:
    """Without what says which process and which object it was."""
    return [
        (one.reward, one.observation, one.terminated, one.truncated, one.parsed, {**one.info, "pid": 0, "resets": 0})
        if isinstance(one, Transition)
        else one
        for one in course
    ]


def pids(courses: list[Course]) -> list[set[int]]:
    """The processes in which each episode was played."""
    return [{one.info["pid"] for one in course if isinstance(one, Transition)} for course in courses]


def alive(pid: int) -> bool:
    """Whether the process is there, or one that it has started and left behind."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = stat.read_text().partition(" ")[0], stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, _, group = rest[:3]
        if str(pid) in (number, group) and state != "Z":
            return True
    return False


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def children() -> set[int]:
    return {process.pid or 0 for process in multiprocessing.active_children()}


def test_episodes_are_the_same_as_in_this_process(pool: WorkerEnvironments, local: LocalEnvironments) -> None:
    begin = starts(*[WELL] * 5)
    expected = play(local, begin)

    played = play(pool, begin)

    assert [told(course) for course in played] == [told(course) for course in expected]
    # Spread over the workers, and none of them this process.
    first, second = (pids(played)[number] for number in (0, 1))
    assert pids(played) == [first, second, first, second, first]
    assert len({os.getpid()} | first | second) == 3
    assert all(os.getpgid(pid) == pid for pid in first | second)  # what they start ends with them
    assert [course[-1].truncated for course in played if isinstance(course[-1], Transition)] == [True, False] * 2 + [
        True
    ]
    # Another number of episodes, with environments that have been used.
    assert [told(course) for course in play(pool, begin[:3])] == [told(course) for course in expected[:3]]


def test_images_come_through_read_only_and_with_their_digest(pool: WorkerEnvironments) -> None:
    [seen] = pool.reset(starts(WELL))

    assert isinstance(seen, Observation)
    [image] = seen.images
    assert not image.pixels.flags.writeable
    assert "digest" in vars(image)  # computed there
    assert image.digest == Image.from_array(np.array(image.pixels)).digest


def test_a_part_of_the_running_episodes_may_act(pool: WorkerEnvironments) -> None:
    pool.reset(starts(*[WELL] * 3))

    assert list(pool.step({2: action(2, 1)})) == [2]
    assert list(pool.step({1: action(1, 1), 0: action(0, 1)})) == [1, 0]
    with pytest.raises(ValueError, match="episode 3, which is not running"):
        pool.step({3: action(3, 1)})


MISTAKES = {
    "raises": r"raised KeyError: 'no such move' \(misbehaving\.py:\d+\)",
    "data_error": r"raised DataError: maps\.jsonl:3: no such map \(misbehaving\.py:\d+\)",
    "exits": r"called sys\.exit\(7\) \(misbehaving\.py:\d+\)",
    "wrong_type": r"its step\(\) returned \{'reward': 1\.0\} \(dict\); expected a Transition",
    "nan": r"its step\(\) returned a Transition with reward=nan \(float\); expected a finite number",
    "no_observation": r"its step\(\) returned a Transition with observation=None; expected an Observation",
    "unsendable": r"its step\(\) returned info\['lock'\], which cannot be sent to another process: .*thread\.lock.*",
    "unreadable": r"returned what cannot be read in this process: it raised ValueError: .*",
}


def test_a_mistake_ends_its_own_episode(pool: WorkerEnvironments, local: LocalEnvironments) -> None:
    names = [*MISTAKES, WELL, WELL]
    before = play(pool, starts(WELL, WELL))

    played = play(pool, starts(*names))

    for course, pattern in zip(played, MISTAKES.values(), strict=False):
        assert len(course) == 4
        assert isinstance(course[-1], Failure)
        assert re.fullmatch(pattern, course[-1].what), course[-1].what
    assert [told(course) for course in played[-2:]] == [
        told(course) for course in play(local, starts(*[WELL] * len(names)))[-2:]
    ]
    assert set.union(*pids(played)) == set.union(*pids(before))  # no process was lost
    # The next episodes of the same numbers are well, in new environments.
    last = [course[-1] for course in play(pool, starts(*[WELL] * len(names)))]
    new = [one.info["resets"] == 1 for one in last if isinstance(one, Transition)]
    assert new == [name != "unreadable" for name in names[:-2]] + [False, False]  # of that one only the answer was bad


def test_a_failed_episode_cannot_be_acted_in(pool: WorkerEnvironments) -> None:
    pool.reset(starts("raises", WELL, at=1))
    pool.step({0: action(0, 1)})

    with pytest.raises(ValueError, match="episode 0, which is not running"):
        pool.step({0: action(0, 2), 1: action(1, 1)})


def test_other_episodes_of_a_lost_worker_go_on(pool: WorkerEnvironments, local: LocalEnvironments) -> None:
    hows = [WELL, WELL, "killed 2", "hangs 3", "dies 4", WELL, WELL]
    expected = play(local, starts(*[WELL] * len(hows)))

    played = play(pool, starts(*hows))

    assert [len(course) for course in played] == [6, 6, 3, 4, 5, 6, 6]
    assert played[2][-1] == Failure("its process was killed by signal 9")
    assert played[3][-1] == Failure("did not answer for 1 s")
    assert played[4][-1] == Failure("its process ended with exit code 3")
    for number in (0, 1, 5, 6):
        assert told(played[number]) == told(expected[number])
    assert [len(found) for found in pids(played)] == [3, 2, 1, 1, 2, 2, 3]
    left = pids(play(pool, starts(WELL, WELL)))
    assert not any(alive(pid) for pid in set.union(*pids(played)) - set.union(*left))


def test_failures_in_a_reset_leave_the_others(pool: WorkerEnvironments, local: LocalEnvironments) -> None:
    expected = play(local, starts(*[WELL] * 7))

    played = play(pool, starts(WELL, "hangs", "raises", WELL, "killed", WELL, WELL, at=0))

    assert [len(course) for course in played] == [6, 1, 1, 6, 1, 6, 6]
    assert all(isinstance(played[number][0], Failure) for number in (1, 2, 4))
    for number in (0, 3, 5, 6):
        assert told(played[number]) == told(expected[number])


def test_a_worker_that_is_killed_between_two_turns_is_replaced(
    pool: WorkerEnvironments, local: LocalEnvironments
) -> None:
    expected = play(local, starts(*[WELL] * 4))
    courses: list[Course] = [[observation] for observation in pool.reset(starts(*[WELL] * 4))]
    for number, answer in pool.step({number: action(number, 1) for number in range(4)}).items():
        courses[number].append(answer)
    [victim] = pids(courses)[1]

    os.kill(victim, signal.SIGKILL)
    answers = pool.step({number: action(number, 2) for number in (3, 2, 1, 0)})

    # The episode that was to be the first is the one that counts as lost.
    assert answers[3] == Failure("its process was killed by signal 9")
    for number in (0, 1, 2):
        assert told([*courses[number], answers[number]]) == told(expected[number][:3])


def test_an_episode_that_cannot_be_played_again_fails_too(pool: WorkerEnvironments, local: LocalEnvironments) -> None:
    expected = play(local, starts(*[WELL] * 5))

    played = play(pool, starts("killed", WELL, "differs", WELL, WELL))

    what = "could not be played again in a new process after maps:0 (its process was killed by signal 9): "
    assert played[0][-1] == Failure("its process was killed by signal 9")
    assert played[2][-1] == Failure(what + "it shows something else")
    assert len(played[2]) == 4
    for number in (1, 3, 4):
        assert told(played[number]) == told(expected[number])


def test_what_is_lost_while_nobody_asks_is_told_when_somebody_does(pool: WorkerEnvironments) -> None:
    pool.reset(starts("dies", WELL, "differs", at=1))

    assert pool.step({0: action(0, 1)}) == {0: Failure("its process ended with exit code 3")}
    answers = pool.step({1: action(1, 1), 2: action(2, 1)})

    lost = answers[2]
    assert isinstance(lost, Failure)
    assert lost.what.startswith("could not be played again")
    assert isinstance(answers[1], Transition)
    with pytest.raises(ValueError, match="episode 2, which is not running"):
        pool.step({2: action(2, 2)})


def test_wrong_data_stop_the_run_at_the_reset(pool: WorkerEnvironments) -> None:
    with pytest.raises(DataError, match=r"^maps\.jsonl:3: no such map$"):
        pool.reset(starts(WELL, WELL, "data_error", at=0))
    with pytest.raises(ValueError, match="episode 0, which is not running"):
        pool.step({0: action(0, 1)})

    odd = Start(Example("maps:1", {"lock": threading.Lock()}), 0)
    with pytest.raises(DataError, match=r"^maps:1: cannot be sent to a worker process: it raised TypeError: cannot"):
        pool.reset([odd])

    assert isinstance(pool.reset(starts(WELL))[0], Observation)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("raises", TrainingError, r"making an environment raised KeyError: 'no such move' \(misbehaving\.py:\d+\)"),
        ("data_error", DataError, r"maps\.jsonl:3: no such map"),
        (
            "dies",
            TrainingError,
            r"no environment could be made in a worker process \(its process ended with exit code 3\)",
        ),
        ("hangs", TrainingError, r"no environment could be made in a worker process \(did not answer for 1\.5 s\)"),
    ],
)
def test_an_environment_that_cannot_be_made_stops_the_run(
    how: Any, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MAKING_SECONDS", 1.0 if how == "hangs" else 20.0)
    before = children()
    pool = WorkerEnvironments(MakeMisbehaving(how, at=-1), 1, 0.5)

    with pytest.raises(kind, match=f"^{message}"):
        pool.reset(starts(WELL, WELL))
    assert children() == before


def test_a_factory_that_cannot_be_sent_is_refused() -> None:
    before = children()

    with pytest.raises(
        ConfigError, match=r"^task\.workers: the environment cannot be made in another process: its fac"
    ):
        WorkerEnvironments(lambda: MakeMisbehaving()(), 2, TIMEOUT)
    assert children() == before


@pytest.mark.parametrize("end", ["close", "garbage"])
def test_no_process_is_left_when_a_pool_is_done(end: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = children()
    pool = WorkerEnvironments(MakeMisbehaving(), 1, TIMEOUT)
    pool.reset(starts(WELL))
    [mine] = children() - before

    if end == "close":
        pool.close()
        pool.close()
        with pytest.raises(ValueError, match="after close"):
            pool.reset(starts(WELL))
    del pool
    gc.collect()

    assert not Path(f"/proc/{mine}").exists()  # nor a zombie
    assert capfd.readouterr() == ("", "made\n")  # what it printed has not gone to stdout


SCRIPT = """
import signal
import sys
from rllava_toy.misbehaving import MakeMisbehaving
from rllava_core.mdp.environment import Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action
from rllava_core.mdp.workers import WorkerEnvironments

def play(pool, *hows):
    pool.reset([Start(Example("a", {"how": how, "at": 2}), 0) for how in hows])
    actions = {number: Action("left", 0) for number in range(len(hows))}
    print(*(answer.info["pid"] for answer in pool.step(actions).values()), flush=True)
    pool.step(actions)

if __name__ == "__main__":
    # Where tests run in the background of a shell, it is ignored from the start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pool = WorkerEnvironments(MakeMisbehaving(), 2, 1000.0)
    try:
        play(pool, "spins", "well")
    except KeyboardInterrupt:
        play(pool, "hangs", "spins")
"""


def test_workers_leave_ctrl_c_to_their_parent_and_end_when_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as parent:
        assert parent.stdout is not None
        first = [int(pid) for pid in parent.stdout.readline().split()]
        for pid in first:
            os.kill(pid, signal.SIGINT)
        time.sleep(0.5)  # meanwhile it begins to wait for the second step
        assert [alive(pid) for pid in first] == [True, True]

        os.killpg(parent.pid, signal.SIGINT)  # what a terminal does
        second = [int(pid) for pid in parent.stdout.readline().split()]  # it goes on, with new processes
        assert [alive(pid) for pid in first + second] == [False, False, True, True]

        time.sleep(0.5)
        parent.kill()
        assert wait_until(lambda: not any(alive(pid) for pid in second))
