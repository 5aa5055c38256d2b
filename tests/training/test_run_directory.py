"""Whose run a directory holds, and where the next one goes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rllava_core.config import RunConfig, load
from rllava_core.errors import ConfigError, TrainingError
from rllava_core.plugins import load_plugins
from rllava_core.training.run_directory import RunDirectory, numbered_run_directory

Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(toy_config: Path) -> Configure:
    return lambda *overrides: load(toy_config, overrides, load_plugins()).run


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "mine")


def checkpoint_of(directory: RunDirectory, step: int) -> Path:
    path = directory.checkpoints / f"step-{step:06d}"
    path.mkdir()
    (path / "config.json").write_text("{}", encoding="utf-8")
    return path


def test_a_new_directory_is_made_and_holds_the_resolved_config(configure: Configure, directory: RunDirectory) -> None:
    config = configure()

    assert directory.check(config, resume=False) is None
    assert not directory.path.exists()
    directory.begin(config)

    assert directory.config.read_text(encoding="utf-8") == config.to_yaml()
    assert directory.checkpoints.is_dir()


def test_an_empty_directory_will_do(configure: Configure, directory: RunDirectory) -> None:
    directory.path.mkdir(parents=True)

    assert directory.check(configure(), resume=False) is None


def test_a_directory_that_holds_a_run_is_only_resumed(configure: Configure, directory: RunDirectory) -> None:
    directory.begin(configure())

    with pytest.raises(ConfigError) as caught:
        directory.check(configure(), resume=False)

    assert str(caught.value).startswith(f"{directory.path} already holds a run: add --resume to go on with it")
    assert directory.check(configure(), resume=True) is None
    checkpoint_of(directory, 9)
    last = checkpoint_of(directory, 10)
    assert directory.check(configure(), resume=True) == last


def test_another_config_is_not_resumed_and_the_difference_is_named(
    configure: Configure, directory: RunDirectory
) -> None:
    directory.begin(configure())
    written = directory.config.read_bytes()

    with pytest.raises(ConfigError) as caught:
        directory.check(configure("training.learning_rate=0.5", "task.choices.0=pink"), resume=True)

    message = str(caught.value)
    assert f"{directory.path} holds a run with another config (" in message
    assert "task.choices was ['red', 'green', 'blue'], is ['pink', 'green', 'blue']" in message
    assert "training.learning_rate was 0.003, is 0.5" in message
    assert directory.config.read_bytes() == written


def test_a_component_that_was_added_or_taken_away_is_a_difference(
    configure: Configure, directory: RunDirectory
) -> None:
    directory.begin(configure())

    with pytest.raises(ConfigError, match=r"task\.dataset was \{'name': 'colours', .*\}, is None"):
        directory.check(configure("task.dataset=", "task.environment=brightness"), resume=True)
    with pytest.raises(ConfigError, match=r"algorithm\.name was 'toy_gradient', is 'toy_critic'"):
        directory.check(configure("algorithm.name=toy_critic"), resume=True)


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=99",
        "training.eval_every=1",
        "training.eval_episodes=2",
        "training.save_every=1",
        "training.keep_checkpoints=9",
        "training.sample_every=0",
        "training.trackers=[tensorboard]",
    ],
)
def test_what_changes_no_step_may_differ(configure: Configure, directory: RunDirectory, override: str) -> None:
    directory.begin(configure())
    changed = configure(override)

    directory.check(changed, resume=True)
    directory.begin(changed)

    assert yaml.safe_load(directory.config.read_text(encoding="utf-8")) == changed.model_dump(mode="json")


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "checkpoints"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_of_something_else_is_left_alone(
    configure: Configure, directory: RunDirectory, name: str, resume: bool
) -> None:
    directory.path.mkdir(parents=True)
    (directory.path / name).write_text("mine", encoding="utf-8")

    with pytest.raises(ConfigError, match="exists and holds no run: choose an empty or new --run-dir"):
        directory.check(configure(), resume=resume)

    assert (directory.path / name).read_text(encoding="utf-8") == "mine"


def test_a_file_is_no_run_directory(configure: Configure, directory: RunDirectory) -> None:
    directory.path.parent.mkdir()
    directory.path.write_text("mine", encoding="utf-8")

    with pytest.raises(ConfigError, match="exists and holds no run"):
        directory.check(configure(), resume=False)


def test_a_config_that_was_damaged_is_named(configure: Configure, directory: RunDirectory) -> None:
    directory.begin(configure())
    directory.config.write_text("model: [", encoding="utf-8")

    with pytest.raises(ConfigError, match=r"config\.yaml: not valid YAML: line 1"):
        directory.check(configure(), resume=True)


def test_a_place_that_cannot_be_written_is_named(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    directory = RunDirectory(tmp_path / "file" / "run")

    with pytest.raises(TrainingError, match=r"^run directory .*file/run could not be written: "):
        directory.begin(configure())


def test_the_manifest_says_what_computed(
    configure: Configure, directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.begin(configure())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    directory.write_manifest(load_plugins(), seed=5, device="cpu", layout="shared")

    manifest = json.loads(directory.manifest.read_text(encoding="utf-8"))
    assert manifest["plugins"]["rllava-toy"] == "1.0"
    assert {"core", "torch", "transformers", "accelerate", "python", "hook_api"} <= set(manifest)
    assert (manifest["seed"], manifest["device"], manifest["git"]) == (5, "cpu", None)
    assert manifest["layout"] == "shared"


def test_the_manifest_says_of_which_commit_the_code_is(
    configure: Configure, directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", *identity, *command], cwd=code, check=True)
    monkeypatch.chdir(code)
    directory.begin(configure())

    states: list[Any] = []
    for _ in range(2):
        directory.write_manifest(load_plugins(), seed=5, device="cpu", layout="shared")
        states.append(json.loads(directory.manifest.read_text(encoding="utf-8"))["git"])
        (code / "new.py").write_text("", encoding="utf-8")

    assert len(states[0]["commit"]) == 40
    assert [state["changed"] for state in states] == [False, True]


def numbered(root: Path, *, resume: bool = False, begin: bool = True) -> str:
    """The name of the directory that a run of digits.yaml gets."""
    with numbered_run_directory(root, "digits", resume=resume) as path:
        assert path.is_dir()
        assert path.parent == root
        if begin:
            RunDirectory(path).config.write_text("", encoding="utf-8")
    return path.name


def test_runs_are_numbered_and_the_newest_is_resumed(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert [numbered(root), numbered(root), numbered(root)] == ["digits-001", "digits-002", "digits-003"]
    (root / "digits-007").mkdir()
    (root / "digits-old").mkdir()
    (root / "other-009").mkdir()

    assert numbered(root, resume=True) == "digits-003"
    assert numbered(root) == "digits-004"


def test_with_nothing_to_resume_the_first_run_begins(tmp_path: Path) -> None:
    assert numbered(tmp_path / "runs", resume=True) == "digits-001"


def test_runs_that_begin_at_the_same_time_have_directories_of_their_own(tmp_path: Path) -> None:
    with (
        numbered_run_directory(tmp_path, "digits", resume=False) as first,
        numbered_run_directory(tmp_path, "digits", resume=False) as second,
    ):
        assert (first.name, second.name) == ("digits-001", "digits-002")


def test_a_run_that_never_began_leaves_no_directory(tmp_path: Path) -> None:
    numbered(tmp_path / "runs", begin=False)
    assert not (tmp_path / "runs").exists()

    numbered(tmp_path / "runs")
    numbered(tmp_path / "runs", begin=False)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["digits-001"]


def test_a_file_in_the_place_of_all_runs_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("", encoding="utf-8")
    with pytest.raises(TrainingError, match=r"^run directory in .*runs could not be written: "):
        numbered(tmp_path / "runs")
