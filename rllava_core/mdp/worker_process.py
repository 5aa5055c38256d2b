"""What runs in a worker process: environments, one after another, and their answers to the pool in `workers.py`.

The pool sends the factory of the environments, and then rows of requests that end with None: (number of the episode,
`Start` or `Action`). For each the worker answers in order, and for a `Start` with `MADE` before, when there is an
environment to begin it in. Objects travel in both directions as multiprocessing sends them between a program and
processes that it started itself; nothing from anywhere else is ever read so.

The process ends when the pool's end of the pipe is closed, and when the process of the pool is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import rllava_core.errors
from rllava_core.errors import RllavaError, TrainingError, describe, what_happened
from rllava_core.mdp.environment import Environment, Failure, Start
from rllava_core.mdp.messages import Action, Observation, Transition
from rllava_core.mdp.pool import ContractError, act, begin, make_environment

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

MADE = "made"
"""There is an environment for the episode, and its reset begins."""

ORPHANED_AFTER = 0.5
"""Seconds between looks at whether the process of the pool is still there."""


@dataclass(frozen=True)
class Stop:
    """An error that is not the episode's but the run's: its class and its message."""

    kind: type[RllavaError]
    message: str

    @classmethod
    def of(cls, error: RllavaError) -> Stop:
        """The class is the nearest of the core's own: a plugin's may need other arguments, or a module of its own."""
        core = (kind for kind in type(error).__mro__ if kind.__module__ == rllava_core.errors.__name__)
        return cls(next(core), str(error))


Answer = Observation | Transition | Failure | Stop


@dataclass(frozen=True)
class _Unreadable:
    """A request, or the factory, that this process could not put together again."""

    what: str


def serve(connection: Connection[Any, Any], pool_process: int) -> None:
    """Answer requests until the pool hangs up. pool_process: the id of the process to end with."""
    _settle(connection)
    threading.Thread(target=_end_with, args=(pool_process,), daemon=True).start()
    try:
        desk = _Desk(connection, _factory(_receive(connection)))
        while True:
            for request in list(iter(lambda: _receive(connection), None)):
                desk.answer(request)
    except (EOFError, OSError):
        return  # the pool has hung up; it does so only where no answer is wanted any more


class _Desk:
    """The environments of this process by the number of their episode, kept for the next episode of that number."""

    def __init__(self, connection: Connection[Any, Any], make: Callable[[], Environment]) -> None:
        self._connection = connection
        self._make = make
        self._environments: dict[int, Environment] = {}

    def answer(self, request: tuple[int, Start | Action] | _Unreadable) -> None:
        if isinstance(request, _Unreadable):
            self._connection.send(Failure(request.what))
            return
        number, asked = request
        answer = self._begin(number, asked) if isinstance(asked, Start) else self._act(number, asked)
        try:
            self._connection.send(answer)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever an environment's objects raise when they are to be sent
            answer = Failure(f"its {_unsendable(answer, error)}")
            self._connection.send(answer)
        if isinstance(answer, Failure | Stop):
            # Whoever broke off in the middle may be in any state; the next episode gets a new one.
            self._environments.pop(number, None)

    def _begin(self, number: int, start: Start) -> Answer:
        try:
            if number not in self._environments:
                self._environments[number] = make_environment(self._make)
        except RllavaError as error:
            return Stop.of(error)
        self._connection.send(MADE)
        try:
            return _hashed(begin(self._environments[number], start))
        except ContractError as error:
            return Failure(f"its {error}")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the environment's; it is reported
            if isinstance(error, RllavaError) and error.exit_code == 2:
                return Stop.of(error)  # the config or the data are wrong, and would be for every episode
            return Failure(describe(error))

    def _act(self, number: int, action: Action) -> Answer:
        if number not in self._environments:
            return Failure("failed before")  # earlier in the same row of requests; the pool knows
        try:
            transition = act(self._environments[number], action)
        except ContractError as error:
            return Failure(f"its {error}")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the environment's; it is reported
            return Failure(describe(error))
        if transition.observation is not None:
            _hashed(transition.observation)
        return transition


def _settle(connection: Connection[Any, Any]) -> None:
    # Ctrl-C is the pool's to decide about. It was blocked while this process started.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # A process group of its own, so that the pool can end this process with all that environments start in it, and so
    # that the terminal stops and interrupts only the pool's process.
    os.setpgid(0, 0)
    # What an environment prints, or the libraries and programs that it uses, is not part of what the command prints.
    sys.stdout = sys.stderr
    os.dup2(2, 1)
    # A program that an environment leaves behind must not keep the pipe open.
    os.set_inheritable(connection.fileno(), False)


def _end_with(pool_process: int) -> None:
    """End this process and all that it started when the pool's process is gone, whatever an environment is busy with.

    A pipe that closes is not enough: another child of the pool's process may hold a copy of its other end.
    """
    while os.getppid() == pool_process:
        time.sleep(ORPHANED_AFTER)
    os.killpg(0, signal.SIGKILL)


def _receive(connection: Connection[Any, Any]) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a plugin's objects raise when they are put together again
        return _Unreadable(f"cannot be read in a worker process: it {what_happened(error)}")


def _factory(received: Callable[[], Environment] | _Unreadable) -> Callable[[], Environment]:
    if not isinstance(received, _Unreadable):
        return received
    message = f"the environment {received.what}"

    def refuse() -> Environment:
        raise TrainingError(message)

    return refuse


def _hashed(observation: Observation) -> Observation:
    """Digests are computed here, where it costs the pool no time, and travel with the images."""
    for image in observation.images:
        _ = image.digest
    return observation


def _unsendable(answer: Answer, error: Exception) -> str:
    """What of an answer cannot be sent: `step() returned info['lock'], which cannot be sent …`."""
    method = "step()" if isinstance(answer, Transition) else "reset()"
    culprit = "something"
    if isinstance(answer, Transition):
        for key, value in answer.info.items():
            try:
                ForkingPickler.dumps(value)
            except Exception as cause:  # noqa: BLE001 - looking for the one that raises
                culprit, error = f"info[{key!r}]", cause
                break
    return f"{method} returned {culprit}, which cannot be sent to another process: it {what_happened(error)}"
