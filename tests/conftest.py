"""Fixtures for all tests of the core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rllava_core.cli import rllava
from rllava_core.testing.fixtures import fake_distribution as fake_distribution

TOY = """\
model: {adapter: toy, from_scratch: any}
algorithm: {name: toy_gradient, group_size: 4}
task:
  dataset: {name: colours, count: 24}
  choices: [red, green, blue]
  rewards: [{name: match}]
training: {steps: 7, prompts_per_step: 4, learning_rate: 3.0e-3, temperature: 4.0, eval_every: 3, save_every: 2}
"""


@pytest.fixture(autouse=True)
def _toy_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest puts the toy plugin on the path of this process only, not on that of processes it starts."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "toy"))


@pytest.fixture
def toy_config(tmp_path: Path) -> Path:
    """The config of a run of a second with the toy plugin: 18 examples to train on, 6 held out."""
    path = tmp_path / "toy.yaml"
    path.write_text(TOY, encoding="utf-8")
    return path


@pytest.fixture
def run_rllava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`run_rllava("train", …)` in this process, with `tmp_path` as the current folder.

    An exception that is no message for the user is raised here.
    """
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(rllava, args, catch_exceptions=False)


@pytest.fixture
def refused(run_rllava: Callable[..., Result]) -> Callable[..., str]:
    """`refused("train", …, code=2)`: a command that must end with one message and this code; returns the message."""

    def run(*args: str, code: int = 2) -> str:
        result = run_rllava(*args)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        assert result.stderr.count("error: ") == 1
        assert result.stderr.startswith("error: ")
        assert result.stderr.endswith("\n")
        return result.stderr.removeprefix("error: ").removesuffix("\n")

    return run
