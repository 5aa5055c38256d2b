"""Whole runs: they learn, and a run that was killed goes on bit for bit, its replay included."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rllava_core.config import load
from rllava_core.errors import ConfigError
from rllava_core.plugins import load_plugins
from rllava_core.testing.fixtures import FakeDistribution
from rllava_core.training.evaluation import Evaluation
from rllava_core.training.loop import train
from rllava_core.training.run_directory import RunDirectory
from rllava_dqn.replay import Replay

CONFIG = """\
model: {adapter: tiny, from_scratch: any}
algorithm:
  {name: dqn, gamma: 0.9, batch_size: 8, warmup_turns: 30, updates_per_turn: 0.3, target_every: 10, epsilon_turns: 200}
task: {environment: corridor, history: 1, max_turns: 12}
training:
  {steps: 8, prompts_per_step: 3, learning_rate: 3.0e-3, eval_every: 4, eval_episodes: 2, save_every: 2, seed: 0}
"""

EVERYTHING = [
    "algorithm.dueling=true",
    "algorithm.n_steps=3",
    "algorithm.priority_alpha=0.6",
    "algorithm.target_every=1",
    "algorithm.target_rate=0.1",
    "algorithm.replay_size=40",
    "task.history=all",
]

KILLED = """\
import os, signal, sys
import rllava_dqn.replay
from rllava_core.cli import rllava

original, calls = rllava_dqn.replay.Replay.set_priorities, 0

def set_priorities(*args):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    original(*args)

rllava_dqn.replay.Replay.set_priorities = set_priorities
rllava(sys.argv[2:])
"""
"""`rllava …`, which kills itself in the middle of an iteration, after the optimizer step of this number."""


class Silent:
    def started(self, directory: Path, total_steps: int, resumed_at: int | None) -> None:
        self.resumed_at = resumed_at

    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def stopping(self) -> None: ...

    def warned(self, message: str) -> None: ...


@pytest.fixture
def run_corridor(fake_distribution: FakeDistribution, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run_corridor(name, "algorithm.n_steps=3", …, resume=False)`: a run in `tmp_path / name`; returns its summary.

    resume: of a run that was killed; it must have a checkpoint.
    """
    source = Path(__file__).with_name("corridor.py").read_text(encoding="utf-8")
    fake_distribution("rllava-corridor", "1.0", source)
    config = tmp_path / "corridor.yaml"
    config.write_text(CONFIG, encoding="utf-8")

    def run(name: str, *overrides: str, resume: bool = False) -> dict[str, Any]:
        registry, observer = load_plugins(), Silent()
        resolved = load(config, overrides, registry)
        summary = train(resolved, registry, RunDirectory(tmp_path / name), observer, resume=resume)
        assert (observer.resumed_at is not None) == resume
        return summary

    return run


def outcome(run: Path) -> dict[str, Any]:
    """Everything about a finished run that must not depend on how often it was interrupted."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = max((run / "checkpoints").iterdir())
    return {
        "metrics": [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines],
        "last": last.name,
        "weights": (last / "model.safetensors").read_bytes(),
        "state": [(last / "resume" / name).read_bytes() for name in ("state.json", "state.safetensors")],
    }


def in_the_middle(run: Path) -> int:
    """The number of an optimizer step in the middle of iteration 6, of which a checkpoint of iteration 4 is there."""
    updates = [int(line["policy/updates"]) for line in outcome(run)["metrics"][1:]]
    assert updates[5] > 2
    return sum(updates[:5]) + 2


def assert_same(resumed: dict[str, Any], whole: dict[str, Any]) -> None:
    for part, value in whole.items():
        assert resumed[part] == value, part


def test_a_killed_run_goes_on_bit_for_bit(run_corridor: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run_corridor("whole", *EVERYTHING)

    command = ["train", str(tmp_path / "corridor.yaml"), *EVERYTHING, "--run-dir", str(tmp_path / "killed")]
    script = [sys.executable, "-c", KILLED, str(in_the_middle(tmp_path / "whole"))]
    killed = subprocess.run([*script, *command], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_corridor("killed", *EVERYTHING, resume=True)

    assert_same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_a_run_that_failed_goes_on_bit_for_bit(
    run_corridor: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_corridor("whole")
    original, left = Replay.set_priorities, in_the_middle(tmp_path / "whole")

    def failing(self: Replay, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError("no more")
        original(self, *args)

    monkeypatch.setattr(Replay, "set_priorities", failing)
    with pytest.raises(OSError, match="no more"):
        run_corridor("failed")
    monkeypatch.setattr(Replay, "set_priorities", original)
    run_corridor("failed", resume=True)

    assert_same(outcome(tmp_path / "failed"), outcome(tmp_path / "whole"))


def test_it_learns_to_walk_to_the_end(run_corridor: Callable[..., dict[str, Any]]) -> None:
    summary = run_corridor(
        "run", "training.steps=40", "training.save_every=0", "algorithm.n_steps=3", "algorithm.dueling=true"
    )
    assert summary["eval"]["last"]["success_rate"] == 1.0


def test_the_step_reports_the_replay_and_epsilon(run_corridor: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run_corridor("run", "training.steps=2", "algorithm.warmup_turns=0")
    lines = outcome(tmp_path / "run")["metrics"][1:]
    turns = [3 * line["rollout/turns"] for line in lines]

    assert [line["replay/transitions"] for line in lines] == [turns[0], sum(turns)]
    assert lines[0]["policy/epsilon"] == 1.0
    assert lines[1]["policy/epsilon"] == pytest.approx(1.0 - 0.95 * turns[0] / 200)
    assert all(line["q/td_error"] >= 0 for line in lines)


def test_episodes_sampled_ahead_are_refused(run_corridor: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm 'dqn' has no correction for that"):
        run_corridor("run", "engine.rollout.async=1")

    assert not (tmp_path / "run").exists()
