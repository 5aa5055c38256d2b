"""Plugins that follow a run: called in order, and detached when they fail, while the run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rllava_core.errors import PluginError, RewardError
from rllava_core.plugins import load_plugins

Run = Callable[..., dict[str, Any]]

FOLLOWER = """
from rllava_core import hookimpl
calls = []

@hookimpl
def rllava_run_start(run_dir):
    calls.append("start")

@hookimpl
def rllava_step_end(step, metrics):
    {failure}
    calls.append(step)

@hookimpl
def rllava_run_end(summary):
    calls.append(summary["status"])
"""


def follower(failure: str = "pass") -> str:
    return FOLLOWER.format(failure=failure)


def calls(module: str) -> list[Any]:
    import importlib

    found: list[Any] = importlib.import_module(module).calls
    return found


@pytest.mark.parametrize(
    ("failure", "what"),
    [
        ("if step == 2: raise KeyError('oops')", "raised KeyError: 'oops'"),
        ("if step == 2: import sys; sys.exit(3)", "called sys.exit(3)"),
    ],
)
def test_a_hook_that_fails_is_reported_and_detached_and_the_run_goes_on(
    run_toy: Run, fake_distribution: Any, tmp_path: Path, watcher: Any, failure: str, what: str
) -> None:
    fake_distribution("rllava-bad", "1.0", follower(failure))
    fake_distribution("rllava-good", "1.0", follower())

    summary = run_toy("training.steps=3")

    assert calls("rllava_bad") == ["start", 1]
    assert calls("rllava_good") == ["start", 1, 2, 3, "completed"]
    [warning] = watcher.warnings
    assert warning.startswith(f"plugin 'bad' of rllava-bad: rllava_step_end() {what}")
    assert warning.endswith("it is detached and the run goes on")
    assert "rllava_bad.py:" in warning
    assert summary["status"] == "completed"
    assert (
        json.loads((tmp_path / "run" / "summary.json").read_text())["detached_plugins"] == summary["detached_plugins"]
    )
    assert what in summary["detached_plugins"][0]


def test_an_interrupt_in_a_hook_is_an_interrupt(run_toy: Run, fake_distribution: Any) -> None:
    fake_distribution("rllava-slow", "1.0", follower("raise KeyboardInterrupt"))

    with pytest.raises(KeyboardInterrupt):
        run_toy("training.steps=2")

    assert calls("rllava_slow") == ["start", "interrupted"]


def test_what_a_hook_prints_goes_to_stderr(run_toy: Run, fake_distribution: Any, capsys: Any) -> None:
    fake_distribution("rllava-loud", "1.0", follower("print('step', step)"))

    run_toy("training.steps=2")

    assert "step 1\nstep 2\n" in capsys.readouterr().err


def test_a_run_that_fails_still_ends_for_its_followers(run_toy: Run, fake_distribution: Any, tmp_path: Path) -> None:
    fake_distribution("rllava-good", "1.0", follower())

    with pytest.raises(RewardError):
        run_toy("training.steps=3", "training.eval_every=0", "task.rewards=[{name: broken, call: 3}]")

    assert calls("rllava_good") == ["start", 1, "failed"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("failed", 1)
    assert "step 2" in summary["error"]


REWARD = """
from rllava_core import ComponentSpec, hookimpl

@hookimpl
def rllava_rewards():
    return [ComponentSpec(name="other", target="rllava_toy.task:Match")]
"""


def test_a_run_remembers_its_plugins_and_warns_of_another_version(
    run_toy: Run, fake_distribution: Any, tmp_path: Path, watcher: Any
) -> None:
    fake_distribution("rllava-other", "1.0", REWARD)
    run_toy("training.steps=1")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["plugins"]["rllava-other"] == "1.0"
    assert watcher.warnings == []

    fake_distribution("rllava-other", "1.1", REWARD)
    run_toy("training.steps=2", resume=True)

    [warning] = watcher.warnings
    assert "was made with rllava-other 1.0, installed is 1.1" in warning
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["plugins"]["rllava-other"] == "1.1"


def test_a_run_does_not_go_on_without_a_plugin_that_it_had(
    run_toy: Run, fake_distribution: Any, tmp_path: Path, watcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = fake_distribution("rllava-other", "1.0", REWARD)
    run_toy("training.steps=1")
    [info] = site.glob("*.dist-info")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    info.rename(info.with_suffix(".gone"))

    with pytest.raises(PluginError, match=r"rllava-other 1\.0 is not installed\. Install them again"):
        run_toy("training.steps=2", resume=True)

    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", "rllava-other")
    assert run_toy("training.steps=2", resume=True)["status"] == "completed"
    assert any("rllava-other 1.0, which is disabled now" in warning for warning in watcher.warnings)


def test_a_run_does_not_go_on_with_a_plugin_that_broke(run_toy: Run, fake_distribution: Any) -> None:
    site = fake_distribution("rllava-other", "1.0", REWARD)
    run_toy("training.steps=1")
    import sys

    del sys.modules["rllava_other"]
    site.joinpath("rllava_other.py").write_text("1 / 0 # and longer than it was, so that no cache is taken for it")

    with pytest.raises(PluginError, match=r"'other' of rllava-other 1\.0 is broken: importing"):
        run_toy("training.steps=2", resume=True)


def test_every_loading_is_independent_of_the_one_before(fake_distribution: Any) -> None:
    fake_distribution("rllava-good", "1.0", follower())

    first, second = load_plugins(), load_plugins()

    assert first.plugins[0].components == second.plugins[0].components
    assert len(first.lifecycle) == len(second.lifecycle) == 3


def test_what_a_hook_is_given_is_its_own_copy(run_toy: Run, fake_distribution: Any) -> None:
    greedy = FOLLOWER.format(failure="metrics['reward/mean'] = 42.0").replace(
        'calls.append(summary["status"])', 'summary["eval"]["best"]["success_rate"] = 42.0'
    )
    fake_distribution("rllava-greedy", "1.0", greedy)
    fake_distribution("rllava-later", "1.0", follower("assert metrics['reward/mean'] != 42.0"))

    summary = run_toy("training.steps=2")

    assert summary["eval"]["best"]["success_rate"] <= 1
    assert "detached_plugins" not in summary


def test_a_hook_that_changes_the_current_folder_does_not_move_the_run(
    run_toy: Run, fake_distribution: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_distribution("rllava-mover", "1.0", follower("import os; os.chdir('/')"))

    assert run_toy("training.steps=2")["status"] == "completed"
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("where", ["rllava_run_start", "rllava_step_end"])
def test_a_hook_whose_error_cannot_be_shown_is_detached_like_any(
    run_toy: Run, fake_distribution: Any, watcher: Any, where: str
) -> None:
    source = (
        "from rllava_core import hookimpl\nclass E(Exception):\n    def __str__(self): return self.nope\n"
        f"@hookimpl\ndef {where}():\n    raise E()\n"
    )
    fake_distribution("rllava-odd", "1.0", source)

    assert run_toy("training.steps=1")["status"] == "completed"
    [warning] = watcher.warnings
    assert "raised E: (its message cannot be shown)" in warning


def test_a_component_that_exits_fails_the_run_and_does_not_choose_its_code(
    run_toy: Run, fake_distribution: Any, tmp_path: Path
) -> None:
    source = (
        "from rllava_core import ComponentSpec, hookimpl\n"
        "@hookimpl\ndef rllava_rewards():\n    return [ComponentSpec(name='leaver', target='rllava_leaver:Leaver')]\n"
        "class Leaver:\n    def __init__(self, config): pass\n    def __call__(self, batch): raise SystemExit(0)\n"
    )
    fake_distribution("rllava-leaver", "1.0", source)

    with pytest.raises(RewardError, match=r"reward 'leaver' called sys\.exit\(0\) \(rllava_leaver\.py:\d+\)"):
        run_toy("task.rewards=[leaver]")

    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("disable", [False, True])
def test_a_distribution_with_a_plugin_that_was_never_used_can_be_resumed_with(
    run_toy: Run, fake_distribution: Any, monkeypatch: pytest.MonkeyPatch, watcher: Any, disable: bool
) -> None:
    entry_points = {"aok": "rllava_pair", "zbad": "rllava_pair_bad"}
    fake_distribution("rllava-pair", "1.0", REWARD, entry_points=entry_points, files={"rllava_pair_bad.py": "1 / 0"})
    if disable:
        monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", "zbad")
    run_toy("training.steps=1")

    assert run_toy("training.steps=2", resume=True)["status"] == "completed"
    assert watcher.warnings == []
