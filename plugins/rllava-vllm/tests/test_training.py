"""Bars of the issue, on real vLLM: runs as a user starts them, in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "digits.yaml"

pytestmark = pytest.mark.usefixtures("_vllm", "qwen")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def colocated() -> str:
    return "engine.rollout=vllm"


def server() -> str:
    return f"engine.rollout={{name: vllm, mode: server, start: true, url: 'http://127.0.0.1:{free_port()}'}}"


def train(directory: Path, *overrides: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """before: what the process does first."""
    arguments = ["train", str(EXAMPLE), "model.from_scratch=tiny-64", *overrides, "--run-dir", str(directory)]
    script = f"{before}\nfrom rllava_core.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [colocated, server])
def test_digits_are_learnt_by_changing_one_line(engine: Any, tmp_path: Path) -> None:
    done = train(tmp_path / "run", engine())
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval"]["best"]["success_rate"] >= 0.85
    gaps = [line["policy/logprob_gap"] for line in metrics(tmp_path / "run")[1:]]
    assert max(gaps) <= 1e-4
    assert max(line.get("parity/max_gap", 0.0) for line in metrics(tmp_path / "run")) <= 1e-4


@pytest.mark.slow
def test_a_run_whose_engine_is_never_given_new_weights_is_stopped(tmp_path: Path) -> None:
    stale = (
        "from rllava_vllm.engine import VLLMRolloutEngine as Engine\n"
        "first = Engine.sync\n"
        "def sync(self, policy):\n"
        "    if not hasattr(self, '_terms'):\n"
        "        first(self, policy)\n"
        "Engine.sync = sync\n"
    )
    limit = "training.max_logprob_gap=0.02"  # rounding is a millionth; the first step is a tenth
    done = train(tmp_path / "run", colocated(), "training.eval_episodes=20", "training.steps=20", limit, before=stale)
    assert done.returncode == 1
    assert "while sampling and recomputed" in done.stderr
