"""Fixtures for tests of the loop: runs in this process, and `rllava` commands in processes that may be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rllava_core.config import load
from rllava_core.plugins import load_plugins
from rllava_core.training.build import Parts, build_parts
from rllava_core.training.evaluation import Evaluation
from rllava_core.training.loop import train
from rllava_core.training.run_directory import RunDirectory

HERE = Path(__file__).parent


@dataclass
class Watcher:
    """An observer that remembers what it was told."""

    resumed_at: int | None = None
    steps: list[int] = field(default_factory=list)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    stops: int = 0
    warnings: list[str] = field(default_factory=list)

    def started(self, directory: Path, total_steps: int, resumed_at: int | None) -> None:
        self.resumed_at = resumed_at

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self.evaluations[step] = evaluation

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def stopping(self) -> None:
        self.stops += 1

    def warned(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
def run_toy(toy_config: Path, tmp_path: Path, watcher: Watcher) -> Callable[..., dict[str, Any]]:
    """`run_toy("training.steps=2", …, resume=False)`: a run of the toy in `tmp_path / "run"`; returns its summary."""

    def run(*overrides: str, resume: bool = False) -> dict[str, Any]:
        registry = load_plugins()
        resolved = load(toy_config, overrides, registry)
        return train(resolved, registry, RunDirectory(tmp_path / "run"), watcher, resume=resume)

    return run


@pytest.fixture
def logged(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """`logged()`: the lines of `metrics.jsonl` of the run in `tmp_path / "run"`."""

    def read() -> list[dict[str, Any]]:
        lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return read


@pytest.fixture
def build_toy(toy_config: Path) -> Callable[..., Parts]:
    """`build_toy("algorithm=toy_critic", …)`: the parts of a run of the toy."""

    def build(*overrides: str, checkpoint: Path | None = None) -> Parts:
        return build_parts(load(toy_config, overrides, load_plugins()), checkpoint)

    return build


@dataclass(frozen=True)
class Outcome:
    """What a command in a process of its own left behind; a negative code is the signal that ended it."""

    code: int
    stdout: str
    stderr: str


class Commands:
    """Sends commands to `forked_commands.py`."""

    def __init__(self, server: subprocess.Popen[str], directory: Path) -> None:
        self._server = server
        self._directory = directory

    def __call__(
        self,
        *args: str,
        signals: Sequence[Mapping[str, Any]] = (),
        kill_after: float | None = None,
        file_limit: int | None = None,
    ) -> Outcome:
        stdout, stderr = self._directory / "stdout", self._directory / "stderr"
        request = {
            "args": args,
            "stdout": str(stdout),
            "stderr": str(stderr),
            "signals": list(signals),
            "kill_after": kill_after,
            "file_limit": file_limit,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer = json.loads(self._server.stdout.readline())
        return Outcome(answer["code"], stdout.read_text(encoding="utf-8"), stderr.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def rllava_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """`rllava_process("train", …)`: the command line in a process of its own, on one thread."""
    path = os.pathsep.join([str(HERE.parent / "toy"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, str(HERE / "forked_commands.py")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert json.loads(server.stdout.readline()) == {"ready": True}
        yield Commands(server, tmp_path_factory.mktemp("commands"))
        assert server.stdin is not None
        server.stdin.close()
