"""Environments in processes of their own: one that raises, hangs or dies ends its own episode, never the run.

Episode i runs in worker i % workers, each of which does its requests one after another. A worker that hangs or dies is
replaced, and the other episodes that ran in it are played again in the new one: an environment is a function of seed,
example and actions, so they go on where they were. `worker_process.py` is the other side.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from rllava_core.errors import ConfigError, DataError, TrainingError, what_happened
from rllava_core.mdp.environment import Environment, Failure, Start
from rllava_core.mdp.messages import Action, Observation, Transition
from rllava_core.mdp.pool import require_running
from rllava_core.mdp.worker_process import MADE, Answer, Stop, serve

MAKING_SECONDS = 120.0
"""How long a worker may take to start, import the environment and make it, where the timeout is not longer still.
Imports from a cold disk or a shared one take far longer than any step."""

LEAVING_SECONDS = 2.0
"""How long idle workers may take to end when the pool is closed, so that environments can tidy up."""

_SPAWN = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in whatever state they are


class WorkerEnvironments:
    """Environments in `workers` processes, which are started at once.

    workers: at least one.
    make: must be sent to them, so a frozen dataclass with `__call__`, say, at the top of a module; no lambda.
    timeout: seconds that one reset or step of one environment may take, counted from the worker's answer before; a
        reset that must make its environment first has `MAKING_SECONDS` more, for a new worker its start included.

    An environment may start programs, which end with its worker; but multiprocessing refuses it children of its own.
    A script that trains must do so under `if __name__ == "__main__":`, for new processes import it.

    Raises ConfigError if `make` cannot be sent. After an error of `reset` or `step` no episode is running, and the next
    reset begins with new processes.
    """

    def __init__(self, make: Callable[[], Environment], workers: int, timeout: float) -> None:
        self._make = make
        self._timeout = timeout
        self._workers: list[_Worker | None] = [None] * workers
        self._episodes: dict[int, _Episode] = {}
        self._answers: dict[int, Answer] = {}
        self._lost: dict[int, Failure] = {}  # failed while no one had asked for them
        self._made_one = False
        # Also when the pool is garbage, and at the end of the process.
        self._finalizer = weakref.finalize(self, _end, self._workers, os.getpid())
        for place in range(workers):
            self._worker(place)  # they import what they need while the caller loads its model, say

    def reset(self, starts: Sequence[Start]) -> list[Observation | Failure]:
        if not self._finalizer.alive:
            raise ValueError("reset() was called after close()")
        self._lost.clear()
        self._episodes = {number: _Episode(start) for number, start in enumerate(starts)}
        answers = self._ask({number: _Job(number, start) for number, start in enumerate(starts)})
        return [_of(Observation, answers[number]) for number in range(len(starts))]

    def step(self, actions: Mapping[int, Action]) -> dict[int, Transition | Failure]:
        require_running(actions, self._episodes.keys() | self._lost.keys())
        lost = {number: self._lost.pop(number) for number in actions if number in self._lost}
        answers = self._ask({n: _Job(n, action) for n, action in actions.items() if n not in lost})
        return {number: _of(Transition, lost.get(number) or answers[number]) for number in actions}

    def close(self) -> None:
        self._finalizer()
        self._episodes.clear()
        self._lost.clear()

    def _ask(self, jobs: Mapping[int, _Job]) -> Mapping[int, Answer]:
        self._answers = {}
        try:
            rows: dict[int, list[_Job]] = {}
            for number, job in jobs.items():
                rows.setdefault(number % len(self._workers), []).append(job)
            for place in rows:
                self._worker(place)  # all of them before the first row is sent, so that they start together
            for place, row in rows.items():
                self._give(place, row)
            while busy := [(place, worker) for place, worker in enumerate(self._workers) if worker and worker.jobs]:
                first = min(worker.deadline for _, worker in busy)
                ready = wait([worker.connection for _, worker in busy], max(0.0, first - time.monotonic()))
                now = time.monotonic()
                for place, worker in busy:
                    if worker.connection in ready:
                        self._receive(place, worker)
                    elif worker.deadline <= now:
                        self._replace(place, worker, f"did not answer for {worker.allowance:g} s")
            for number in sorted(self._answers):
                answer = self._answers[number]
                if isinstance(answer, Stop):  # the first of them, whichever worker was the fastest
                    raise answer.kind(answer.message)
        except BaseException:
            # Answers may be under way that nobody will fetch.
            _end(self._workers, os.getpid())
            self._episodes.clear()
            raise
        self._lost |= {n: a for n, a in self._answers.items() if n not in jobs and isinstance(a, Failure)}
        return self._answers

    def _worker(self, place: int) -> _Worker:
        """The worker of this place; a new one if there is none."""
        worker = self._workers[place]
        if worker is None:
            worker = self._workers[place] = _Worker(self._make)
        return worker

    def _give(self, place: int, jobs: list[_Job]) -> None:
        """Send requests to a worker that has none."""
        worker = self._worker(place)
        worker.jobs.extend(jobs)
        self._next(worker)
        # Nothing is answered before the row is complete, so the two sides never wait for each other to read.
        with suppress(OSError):  # it is dead; receiving finds out
            for job in jobs:
                try:
                    worker.connection.send((job.number, job.request))
                except OSError:
                    raise
                except Exception as error:
                    start = self._episodes[job.number].start
                    what = what_happened(error)
                    raise DataError(f"{start.name}: cannot be sent to a worker process: it {what}") from error
            worker.connection.send(None)

    def _receive(self, place: int, worker: _Worker) -> None:
        """One message of a worker that has sent one, or has ended."""
        answer: Any
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(place, worker, worker.how_it_ended())
            return
        except Exception as error:  # noqa: BLE001 - whatever an environment's objects raise when put together again
            answer = Failure(f"returned what cannot be read in this process: it {what_happened(error)}")
        if answer == MADE:
            self._made_one = True
            worker.allow(self._timeout, making=False)
            return
        job = worker.jobs.popleft()
        self._next(worker)
        self._note(job, answer)

    def _next(self, worker: _Worker) -> None:
        """The clock of the next request begins."""
        making = bool(worker.jobs) and isinstance(worker.jobs[0].request, Start)
        worker.allow(self._timeout + MAKING_SECONDS if making else self._timeout, making)

    def _note(self, job: _Job, answer: Answer) -> None:
        episode = self._episodes.get(job.number)
        if episode is None:
            return  # it failed before, in the same row
        if isinstance(answer, Stop) and job.again is None:
            del self._episodes[job.number]
            self._answers[job.number] = answer
        elif isinstance(answer, Stop):
            self._fail(job, f"raised {answer.kind.__name__}: {answer.message}")
        elif isinstance(answer, Failure):
            self._fail(job, answer.what)
        elif job.again is not None:
            difference = _difference(job.again.shown, _Shown.of(answer))
            if difference:
                self._fail(job, difference)
        else:
            episode.course.append((job.request, _Shown.of(answer)))
            self._answers[job.number] = answer
            if isinstance(answer, Transition) and answer.done:
                del self._episodes[job.number]

    def _fail(self, job: _Job, what: str) -> None:
        if self._episodes.pop(job.number, None) is not None:
            if job.again is not None:
                what = f"could not be played again in a new process after {job.again.cause}: {what}"
            self._answers[job.number] = Failure(what)

    def _replace(self, place: int, worker: _Worker, what: str) -> None:
        """A worker that hangs or is dead: its episode fails, and its other episodes move to a new worker."""
        worker.kill()
        self._workers[place] = None
        lost, *waiting = worker.jobs
        if worker.making and not self._made_one:
            # Not an episode's misfortune: there has never been an environment.
            raise TrainingError(
                f"no environment could be made in a worker process ({what}); what it printed may say why, and with "
                "task.workers=0 environments are made in this process"
            )
        culprit = self._episodes[lost.number].start.name if lost.number in self._episodes else "another"
        self._fail(lost, what)
        cause = f"{culprit} ({what})"
        self._give(
            place,
            [
                _Job(number, request, _Again(shown, cause))
                for number, episode in self._episodes.items()
                if number % len(self._workers) == place
                for request, shown in episode.course
            ]
            + [job for job in waiting if job.again is None and job.number in self._episodes],
        )


@dataclass(frozen=True, eq=False)
class _Shown:
    """What an environment showed, as far as it must show it again: `info` may hold times and the like."""

    observation: Observation | None
    reward: float
    ended: tuple[bool, bool]

    @classmethod
    def of(cls, answer: Observation | Transition) -> _Shown:
        if isinstance(answer, Observation):
            return cls(answer, 0.0, (False, False))
        return cls(answer.observation, answer.reward, (answer.terminated, answer.truncated))


@dataclass(frozen=True)
class _Again:
    """Of a request that is made again: what was shown then, and why."""

    shown: _Shown
    cause: str


@dataclass(frozen=True)
class _Job:
    """One request of one episode."""

    number: int
    request: Start | Action
    again: _Again | None = None


@dataclass
class _Episode:
    """A running episode. course: what has been asked of it and what it showed."""

    start: Start
    course: list[tuple[Start | Action, _Shown]] = field(default_factory=list)


class _Worker:
    """One process, and the requests that it has not answered yet."""

    def __init__(self, make: Callable[[], Environment]) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.jobs: deque[_Job] = deque()
        self._joined = False
        self.process: BaseProcess = _SPAWN.Process(
            target=serve, args=(theirs, os.getpid()), name="rllava-environments", daemon=True
        )
        # A new process inherits what is blocked, so that Ctrl-C does not end it before it can say that it ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
            self._pid = cast(int, self.process.pid)
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            with suppress(OSError):  # it is dead; receiving finds out
                self.connection.send(make)
        except Exception as error:
            self.kill()
            raise ConfigError(
                f"task.workers: the environment cannot be made in another process: its factory {what_happened(error)}; "
                "write task.workers=0"
            ) from error

    def allow(self, seconds: float, making: bool) -> None:
        self.making = making
        self.allowance = seconds
        self.deadline = time.monotonic() + seconds

    def how_it_ended(self) -> str:
        """Of a worker whose end of the pipe is closed, and which is killed if it has not ended."""
        ended = wait([self.process.sentinel], 1.0)
        self.kill()
        code = self.process.exitcode or 0
        if not ended:
            return "closed its connection"
        return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"

    def kill(self) -> None:
        """End it at once, with all that its environments started. May be called again."""
        self.connection.close()
        if self._joined:
            return  # its number may be another process's by now
        # It has no group of its own in its first moments; macOS forbids signals to a group of the dead.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self._joined = True


def _end(workers: list[_Worker | None], owner: int) -> None:
    """End all workers: idle ones may tidy up for a moment, busy ones are killed."""
    if os.getpid() != owner:
        return  # a fork of the process that owns them
    ending = [worker for worker in workers if worker is not None]
    workers[:] = [None] * len(workers)
    for worker in ending:
        if worker.jobs:
            worker.kill()
        else:
            worker.connection.close()
    deadline = time.monotonic() + LEAVING_SECONDS
    for worker in ending:
        if not worker.jobs:
            wait([worker.process.sentinel], max(0.0, deadline - time.monotonic()))
        worker.kill()


def _of(kind: type[Any], answer: Answer) -> Any:
    assert isinstance(answer, kind | Failure)
    return answer


def _difference(before: _Shown, now: _Shown) -> str | None:
    """In which an episode that was played again is another; None where it is the same."""
    if before.observation != now.observation:
        return "it shows something else"
    if before.reward != now.reward:
        return f"it gives the reward {now.reward:g}, not {before.reward:g}"
    return "it ends at another step" if before.ended != now.ended else None
