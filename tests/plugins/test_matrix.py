"""Every way in which a plugin can be bad, as a user sees it: the list, the other plugins, and a run that needs it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rllava_core.cli import rllava

HEADER = "from rllava_core import ComponentSpec, hookimpl\n"


def rewards(*names: str, target: str = "rllava_toy.task:Match") -> str:
    specs = ", ".join(f"ComponentSpec(name={name!r}, target={target!r})" for name in names)
    return HEADER + f"@hookimpl\ndef rllava_rewards():\n    return [{specs}]\n"


@dataclass(frozen=True)
class Case:
    """A bad distribution, its status and cause in the list, and what a run that needs it says; None where that works.

    damage: done to its metadata. twin: whether another distribution has the same source.
    """

    source: str
    status: str
    cause: str
    run: str | None
    requires: tuple[str, ...] = ("rllava-core>=1.0.0a1,<2",)
    damage: Callable[[Path], object] | None = None
    twin: bool = False


def write_garbage(info: Path) -> None:
    info.joinpath("METADATA").write_bytes(b"\xff\xfe\x00 no metadata")
    info.joinpath("entry_points.txt").write_bytes(b"[rllava]\nbad = caf\xe9\n")


PARTS = {
    True: "class E(Exception):\n    def __str__(self): return self.nope\nraise E()\n",
    False: (
        "from pydantic import model_validator\nfrom rllava_core.config import Options\n"
        "class Config(Options):\n    @model_validator(mode='before')\n    @classmethod\n"
        "    def check(cls, value): raise KeyError('oops')\n"
    ),
}
"""Whether the module itself breaks, or the config in it."""

CASES = {
    "a missing import": Case(
        "import no_such_module\n" + rewards("bad"), "broken", "ModuleNotFoundError", "No module named 'no_such_module'"
    ),
    "a syntax error": Case("def (:\n", "broken", "SyntaxError", "SyntaxError"),
    "an exit while it is imported": Case("import sys\nsys.exit(3)\n", "broken", "called sys.exit(3)", "sys.exit(3)"),
    "a hook that raises": Case(
        HEADER + "@hookimpl\ndef rllava_rewards():\n    raise KeyError('oops')\n",
        "broken",
        "rllava_rewards() raised KeyError: 'oops'",
        "KeyError: 'oops'",
    ),
    "a misspelt hook": Case(
        rewards("bad").replace("rllava_rewards", "rllava_rewrads"),
        "broken",
        "there is no hook 'rllava_rewrads'; did you mean 'rllava_rewards'?",
        "did you mean 'rllava_rewards'?",
    ),
    "a spec with an invalid name": Case(
        rewards("Bad Name"), "broken", "component name 'Bad Name': use lower-case letters", "'Bad Name'"
    ),
    "a target that does not exist": Case(
        rewards("bad", target="rllava_bad:Nowhere"),
        "ok",
        "",
        "loading its target 'rllava_bad:Nowhere' raised Attribute",
    ),
    "a target in a module that does not exist": Case(
        rewards("bad", target="rllava_bad.nowhere:X"),
        "ok",
        "",
        "loading its target 'rllava_bad.nowhere:X' raised Module",
    ),
    "a class that cannot be made from its config": Case(
        rewards("bad", target="rllava_bad:Bad") + "\nclass Bad:\n    def __init__(self):\n        pass\n",
        "ok",
        "",
        "reward 'rllava-bad/bad': making 'Bad' from its config raised TypeError",
    ),
    "a target whose error cannot be shown": Case(
        rewards("bad", target="rllava_bad_parts:X"), "ok", "", "raised E: (its message cannot be shown)"
    ),
    "a config that is no config": Case(
        rewards("bad").replace("Match')", "Match', config='rllava_toy.task:Match')"),
        "ok",
        "",
        "'rllava-bad/bad': its config <class 'rllava_toy.task.Match'> is no pydantic model",
    ),
    "a config whose validator breaks": Case(
        rewards("bad").replace("Match')", "Match', config='rllava_bad_parts:Config')"),
        "ok",
        "",
        "its config raised KeyError",
    ),
    "a duplicate name": Case(
        rewards("bad"),
        "conflict",
        "reward 'bad' is also provided by rllava-twin: a config must write 'rllava-bad/bad'",
        "provided by more than one plugin: rllava-bad/bad, rllava-twin/bad",
        twin=True,
    ),
    "another major of the hook API": Case(
        "1 / 0",
        "incompatible",
        "it requires rllava-core>=2,<3",
        "it requires rllava-core>=2,<3, installed is",
        requires=("rllava-core>=2,<3",),
    ),
    "a distribution with broken metadata": Case(
        rewards("bad"), "broken", "reading its entry points raised", "reading its entry points", damage=write_garbage
    ),
    "a module that prints while it is imported": Case("print('{\"hello\": 1}')\n" + rewards("bad"), "ok", "", None),
    "a module that takes two seconds to import": Case("import time\ntime.sleep(2)\n" + rewards("bad"), "ok", "", None),
}


def run(*args: str) -> Result:
    return CliRunner().invoke(rllava, args, catch_exceptions=False)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_bad_plugin_is_named_with_its_cause_harms_nobody_and_stops_only_who_needs_it(
    fake_distribution: Any, toy_config: Path, tmp_path: Path, case: Case
) -> None:
    files = (
        {}
        if "rllava_bad_parts" not in case.source
        else {"rllava_bad_parts.py": PARTS[".X" in case.source.replace(":", ".")]}
    )
    site = fake_distribution("rllava-bad", "0.1", case.source, requires=case.requires, files=files)
    if case.damage:
        [info] = site.glob("*.dist-info")
        case.damage(info)
    fake_distribution("rllava-good", "1.0", rewards("good"))
    if case.twin:
        fake_distribution("rllava-twin", "1.0", rewards("bad"))

    listed = json.loads(run("plugins", "--json").stdout)["plugins"]
    [bad] = [plugin for plugin in listed if plugin["location"] == str(site)]
    assert bad["status"] == case.status
    assert case.cause in (bad["error"] or "")
    assert [plugin["status"] for plugin in listed if plugin["name"] in ("good", "core", "toy")] == ["ok"] * 3

    table = run("plugins").stdout
    owner = str(site) if bad["distribution"] == "unknown" else bad["distribution"]
    below = [line for line in table.splitlines() if line.startswith("plugin ") and f" of {owner} " in line]
    explained = [line for line in below if "See: rllava plugins show" in line]
    assert len(explained) == (0 if case.status == "ok" else 1)
    assert all(case.cause in line for line in explained)

    def train(reward: str) -> Result:
        small = ["training.steps=1", "training.prompts_per_step=1", "training.eval_episodes=1"]
        directory = tmp_path / f"run-{reward}-{time.monotonic_ns()}"
        return run("train", str(toy_config), f"task.rewards=[{reward}]", *small, "--run-dir", str(directory))

    assert train("good").exit_code == 0
    result = train("bad")
    if case.run is None:
        assert result.exit_code == 0
        return
    assert result.exit_code == 2
    assert case.run in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
    if case.twin:
        assert train("rllava-bad/bad").exit_code == 0


def test_what_breaks_is_explained_by_show(fake_distribution: Any) -> None:
    fake_distribution("rllava-bad", "0.1", CASES["a missing import"].source)

    output = run("plugins", "show", "bad").stdout

    assert "ModuleNotFoundError: No module named 'no_such_module'" in output
    assert "rllava_bad.py" in output


def test_all_of_them_at_once_leave_the_good_one_usable(
    fake_distribution: Any, toy_config: Path, tmp_path: Path
) -> None:
    for number, case in enumerate(CASES.values()):
        name = f"rllava-bad{number}"
        source = case.source.replace("'bad'", f"'bad{number}'").replace("rllava_bad", f"rllava_bad{number}")
        site = fake_distribution(name, "0.1", source, requires=case.requires)
        if case.damage:
            case.damage(next(site.glob("*.dist-info")))
    fake_distribution("rllava-good", "1.0", rewards("good"))

    overrides = ["task.rewards=[good]", "training.steps=1", "training.prompts_per_step=1", "training.eval_episodes=1"]
    result = run("train", str(toy_config), *overrides, "--run-dir", str(tmp_path / "run"))

    assert result.exit_code == 0, result.stderr
