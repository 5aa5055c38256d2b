"""An environment of several turns that misbehaves on demand, and otherwise shows a course of pictures and rewards that
depends on seed and actions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rllava_core.errors import DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition

if TYPE_CHECKING:
    from rllava_core.config import TaskSection
    from rllava_toy.config import How, MisbehavingConfig


@dataclass(frozen=True)
class MakeMisbehaving:
    """Makes it in another process, and takes the place of its config there: importing pydantic would take too long."""

    how: How = "well"
    at: int = 3
    seeds: tuple[int, ...] | None = None
    length: int = 5
    size: int = 8

    def __call__(self) -> Misbehaving:
        return Misbehaving(self)


class Misbehaving:
    """Two choices in every turn; an episode is terminated after `length` steps, with even seeds truncated."""

    def __init__(self, config: MisbehavingConfig | MakeMisbehaving, task: TaskSection | None = None) -> None:
        self.config = config
        self.resets = 0
        sys.stdout.write("made\n")  # must not reach what the command prints
        self._begin(-1, None)
        self._misbehave(-1)

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        self._begin(seed, example)
        self.resets += 1
        wrong = self._misbehave(0)
        return self._observation() if wrong is None else wrong

    def step(self, action: Action) -> Transition:
        self.turn += 1
        wrong = self._misbehave(self.turn)
        if wrong is not None:
            return wrong
        self.state = (31 * self.state + 7 * (action.choice or 0) + len(action.text)) % 10_007
        ended, even = self.turn == self.config.length, self.seed % 2 == 0
        info = {"pid": os.getpid(), "resets": self.resets, "turn": self.turn, "success": True}
        return Transition(self.state % 7, self._observation(), ended and not even, ended and even, info=info)

    def _begin(self, seed: int, example: Example | None) -> None:
        self.seed, self.turn, self.state = seed, 0, 1_000 + seed
        asked = example.fields if example is not None else {}
        concerned = self.config.seeds is None or seed in self.config.seeds
        self.how = asked.get("how", self.config.how if concerned else "well")
        self.at = asked.get("at", self.config.at)

    def _observation(self) -> Observation:
        pixels = np.random.default_rng(self.state).integers(0, 256, (self.config.size, self.config.size, 3), np.uint8)
        process = f", process {os.getpid()}" if self.how == "differs" else ""
        return Observation((Message.user(Image.from_array(pixels), f"state {self.state}{process}"),), ("left", "right"))

    def _misbehave(self, turn: int) -> Any:
        """Do it, or return what is wrong to return; None where this is not the turn."""
        if turn != self.at:
            return None
        match self.how:
            case "raises":
                raise KeyError("no such move")
            case "data_error":
                raise DataError("maps.jsonl:3: no such map")
            case "exits":
                sys.exit(7)
            case "dies":
                os._exit(3)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hangs":
                subprocess.Popen(["sleep", "1000"])  # must not outlive the worker
                time.sleep(1000)
            case "spins":
                while True:
                    pass
            case "wrong_type":
                return {"reward": 1.0}
            case "nan":
                return Transition(float("nan"), self._observation(), terminated=False)
            case "no_observation":
                return Transition(0.0, None, terminated=False, truncated=True)
            case "unsendable":
                return Transition(0.0, self._observation(), False, info={"turn": 1, "lock": threading.Lock()})
            case "unreadable":
                return Transition(0.0, self._observation(), False, info={"broken": Unreadable()})
        return None


class Unreadable:
    """Can be sent and not put together again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)
