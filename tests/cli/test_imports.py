"""What a user meets before a run begins comes at once, since it imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "accelerate", "torchvision", "numpy", "PIL", "sklearn"}

REPORT = """
import atexit, sys
atexit.register(lambda: print("imported", *sys.modules, file=sys.stderr))
from rllava_core.cli import main
main()
"""

LAUNCHES_NOTHING = """
import sys
from rllava_core.cli import train
train.launch = lambda *_, **__: sys.exit(3)
"""


def run(*args: str, folder: Path, launches: bool = True) -> tuple[int, str, set[str]]:
    """Exit code, what was printed, and the modules that were imported, of `rllava` in a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parents[1] / "toy"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", ("" if launches else LAUNCHES_NOTHING) + REPORT, *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    message, _, modules = done.stderr.rpartition("imported ")
    return done.returncode, done.stdout + message, set(modules.split())


@pytest.mark.parametrize("command", ["--help", "train --help", "eval --help", "--version", "plugins", "plugins --json"])
def test_help_and_lists_import_nothing_heavy(tmp_path: Path, command: str) -> None:
    code, output, modules = run(*command.split(), folder=tmp_path)

    assert code == 0, output
    assert output
    assert "rllava_core.cli" in modules
    assert modules.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train missing.yaml", "missing.yaml: no such file"),
        ("train toy.yaml training.stepz=3", "did you mean 'steps'?"),
        ("train toy.yaml algorithm.grop_size=3", "did you mean 'group_size'?"),
        ("train toy.yaml algorithm=ppo2", "no algorithm 'ppo2' is installed"),
        ("train toy.yaml algorithm=toy_discrete task.choices=", "needs choices"),
        ("eval toy.yaml training.steps=none", "training.steps: Input should be a valid integer"),
        ("eval runs", "runs is no run directory"),
        ("eval begun", "begun holds no checkpoint yet"),
        ("train toy.yaml --run-dir begun", "begun already holds a run: add --resume"),
        ("train toy.yaml --run-dir begun --num-processes 2", "begun already holds a run: add --resume"),
        ("train toy.yaml training.seed=7 --run-dir begun --resume", "begun holds a run with another config"),
    ],
)
def test_a_mistake_is_found_without_anything_heavy(tmp_path: Path, command: str, message: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text((tmp_path / "toy.yaml").read_text())

    code, output, modules = run(*command.split(), folder=tmp_path)

    assert code == 2
    assert output.startswith("error: ")
    assert message in output
    assert modules.isdisjoint(HEAVY)


def test_who_starts_several_processes_imports_nothing_that_they_will(tmp_path: Path) -> None:
    code, output, modules = run("train", "toy.yaml", "--num-processes", "2", folder=tmp_path, launches=False)

    assert (code, output) == (3, "")
    assert "rllava_core.cli.launching" in modules
    assert modules.isdisjoint(HEAVY)
