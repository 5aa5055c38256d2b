"""`rllava new-plugin`: for every kind a package that works as it is."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from rllava_core.cli.new_plugin import render
from rllava_core.plugins import load_plugins
from rllava_core.specs import KINDS, Kind
from rllava_core.testing import deep

Run = Callable[..., Result]


@pytest.fixture
def install(fake_distribution: Any) -> Callable[[Path], Path]:
    """Installs a package's folder as its pyproject.toml says."""

    def run(folder: Path) -> Path:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        source = folder / "src"
        files = {str(path.relative_to(source)): path.read_text() for path in source.rglob("*") if path.is_file()}
        site: Path = fake_distribution(
            project["name"],
            project["version"],
            requires=project["dependencies"],
            entry_points=project["entry-points"]["rllava"],
            files=files,
        )
        (site / f"{project['name'].replace('-', '_')}.py").unlink()
        return site

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_is_listed_and_passes_every_check(
    run_rllava: Run, install: Callable[[Path], Path], tmp_path: Path, kind: Kind
) -> None:
    result = run_rllava("new-plugin", "shiny-new", "--kind", kind)
    assert result.exit_code == 0, result.output
    install(tmp_path / "rllava-shiny-new")

    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.name == "shiny-new"]
    assert (plugin.status, plugin.error, plugin.hook_api) == ("ok", None, "1")
    assert [(component.kind, component.spec.name) for component in plugin.components] == [(kind, "shiny-new")]
    checked = run_rllava("plugins", "check", "shiny-new", "--json")
    assert checked.exit_code == 0, checked.stdout
    deep.main(str(tmp_path / "findings.json"), *plugin.identity)  # as --deep does in its own process
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert [finding for finding in findings if finding["level"] not in ("ok", "skipped")] == []
    assert sum(finding["level"] == "ok" for finding in findings) > 15


def test_the_tests_of_new_plugins_pass(run_rllava: Run, install: Callable[[Path], Path], tmp_path: Path) -> None:
    folders = []
    for kind in KINDS:
        run_rllava("new-plugin", f"own-{kind}", "--kind", kind)
        folders.append(tmp_path / f"rllava-own-{kind}")
        install(folders[-1])

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 120  # type: ignore[index]


def test_a_new_algorithm_trains_where_only_its_name_is_changed(
    run_rllava: Run, install: Callable[[Path], Path], toy_config: Path, tmp_path: Path
) -> None:
    run_rllava("new-plugin", "shiny-new", "--kind", "algorithm")
    install(tmp_path / "rllava-shiny-new")

    result = run_rllava("train", "toy.yaml", "algorithm.name=shiny-new", "training.steps=2", "--run-dir", "run")

    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "completed"


def test_a_new_environment_and_a_new_data_set_can_be_trained_on(
    run_rllava: Run, install: Callable[[Path], Path], toy_config: Path, tmp_path: Path
) -> None:
    for kind in ("environment", "dataset", "reward", "engine"):
        run_rllava("new-plugin", f"new-{kind}", "--kind", kind)
        install(tmp_path / f"rllava-new-{kind}")
    small = ["training.steps=2", "training.eval_episodes=4", "training.micro_batch_tokens=4000"]

    alone = run_rllava(
        *("train", "toy.yaml", "task.environment=new-environment", "task.dataset=", "task.rewards=[]", "task.choices="),
        *("engine.rollout=new-engine", *small, "--run-dir", "one"),
    )
    asked = run_rllava(
        *("train", "toy.yaml", "task.dataset={name: new-dataset, count: 40, size: 16}", "task.choices="),
        *("task.rewards=[match, {name: new-reward, weight: 0.1}]", *small, "--run-dir", "two"),
    )

    assert alone.exit_code == 0, alone.output
    assert asked.exit_code == 0, asked.output


def test_it_says_what_to_do_next(run_rllava: Run, tmp_path: Path) -> None:
    result = run_rllava("new-plugin", "rllava-brevity", "--kind", "reward", "--dir", "deep/er")

    folder = Path("deep/er/rllava-brevity")
    assert result.stdout.splitlines() == [
        f"Wrote {folder}: the reward 'brevity'. Next:",
        "",
        f"    cd {folder}",
        "    pip install -e '.[test]'",
        "    rllava plugins check brevity --deep",
        "    pytest",
    ]
    written = sorted(
        str(path.relative_to(tmp_path / folder)) for path in (tmp_path / folder).rglob("*") if path.is_file()
    )
    assert written == [
        ".gitignore",
        "README.md",
        "pyproject.toml",
        "src/rllava_brevity/__init__.py",
        "src/rllava_brevity/config.py",
        "src/rllava_brevity/plugin.py",
        "src/rllava_brevity/py.typed",
        "src/rllava_brevity/reward.py",
        "tests/test_brevity.py",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Brevity", "is no name for a plugin"),
        ("2fast", "is no name for a plugin"),
        ("with space", "is no name for a plugin"),
        ("a/b", "is no name for a plugin"),
        ("..", "is no name for a plugin"),
        ("rllava-", "is no name for a plugin"),
        ("two--dashes", "is no name for a plugin"),
        ("x" * 300, "at most 60 characters"),
        ("rllava-core", "is the core itself"),
        ("match", "rllava-toy provides a reward 'match' already"),
    ],
)
def test_a_bad_name_is_refused_and_nothing_is_written(
    refused: Callable[..., str], tmp_path: Path, name: str, message: str
) -> None:
    before = sorted(tmp_path.iterdir())

    assert message in refused("new-plugin", name, "--kind", "reward")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("name", "kind"), [("policy-gradient", "algorithm"), ("model", "model")])
def test_a_name_whose_class_would_hide_one_of_the_core_is_refused(
    refused: Callable[..., str], name: str, kind: str
) -> None:
    assert "would hide one that it imports" in refused("new-plugin", name, "--kind", kind)


def test_nothing_is_overwritten(refused: Callable[..., str], run_rllava: Run, tmp_path: Path) -> None:
    folder = tmp_path / "rllava-brevity"
    folder.mkdir()
    folder.joinpath("mine.txt").write_text("precious")

    assert "exists already" in refused("new-plugin", "brevity", "--kind", "reward")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_place_that_cannot_be_written_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_text("no folder")

    assert "cannot be written" in refused("new-plugin", "brevity", "--kind", "reward", "--dir", "file/below")
    assert not list(tmp_path.glob("**/.rllava-*"))


def test_a_kind_that_does_not_exist_is_wrong_usage(run_rllava: Run) -> None:
    result = run_rllava("new-plugin", "brevity", "--kind", "rewards")

    assert result.exit_code == 2
    assert "'rewards' is not one of" in result.stderr
    assert run_rllava("new-plugin", "brevity").exit_code == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x", "none", "a_b-c9", "class", "reward", "test"])
def test_every_name_that_is_accepted_gives_files_that_compile(name: str, kind: Kind) -> None:
    for path, text in render(name, kind).items():
        if path.endswith(".py"):
            ast.parse(text, path)
        if path.endswith(".toml"):
            tomllib.loads(text)
        assert "$" not in text or path.endswith(".md")
