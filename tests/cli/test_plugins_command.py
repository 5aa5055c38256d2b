"""`rllava plugins`, and how the command line as a whole starts and fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import rllava_core
from rllava_core.cli import COMMANDS, LazyGroup, rllava
from rllava_core.errors import ConfigError, RllavaError, TrainingError

HEADER = "from rllava_core import ComponentSpec, PluginInfo, hookimpl\n"

EXAMPLE = (
    HEADER
    + """
print("hello from a plugin")

@hookimpl
def rllava_plugin_info():
    return PluginInfo(summary="An example.")

@hookimpl
def rllava_engines():
    return [ComponentSpec(name="server", target="a.b:C", config="a.c:D", summary="Serves.",
                          provides={"rollout", "logprobs"}, needs={"z", "a"})]

@hookimpl
def rllava_algorithms():
    return [ComponentSpec(name="example", target="a.b:C")]
"""
)


def run(*args: str) -> Result:
    """`rllava ...` in this process, with an exception that escapes raised here."""
    return CliRunner().invoke(rllava, args, catch_exceptions=False)


def plugin_in(listing: dict[str, Any], name: str) -> dict[str, Any]:
    """The one plugin of this name."""
    [plugin] = [plugin for plugin in listing["plugins"] if plugin["name"] == name]
    return dict(plugin)


def test_the_table_shows_every_plugin_and_what_is_wrong_with_it(fake_distribution: Any) -> None:
    fake_distribution("rllava-core", "1.4", entry_points={})
    fake_distribution("rllava-example", "1.2", EXAMPLE)
    fake_distribution("rllava-failing", "0.3", "import no_such_module_anywhere")
    fake_distribution("rllava-future", "9.0", EXAMPLE, requires=["rllava-core>=9"])

    result = run("plugins")

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    [row] = [line for line in lines if "rllava-example" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "example",
        "rllava-example",
        "1.2",
        "ok",
        "algorithm example",
    ]
    assert any("engine server (rollout)" in line for line in lines)
    order = [i for name in ("rllava-example", "rllava-failing", "rllava-future") for i in _rows(lines, name)]
    assert order == sorted(order)
    assert (
        "plugin 'failing' of rllava-failing 0.3 is broken: importing 'rllava_failing' raised ModuleNotFoundError: "
        "No module named 'no_such_module_anywhere'"
    ) in lines
    assert (
        "plugin 'future' of rllava-future 9.0 is incompatible: it requires rllava-core>=9, installed is rllava-core 1.4"
    ) in lines


def _rows(lines: list[str], name: str) -> list[int]:
    return [index for index, line in enumerate(lines) if line.startswith("│") and name in line]


def test_the_table_is_not_cut_where_stdout_is_no_terminal(
    fake_distribution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    name = "rllava-" + "very-long-" * 15 + "name"
    fake_distribution(name, "1.0", EXAMPLE, entry_points={"[bold]odd[/bold]": name.replace("-", "_")})

    output = click.unstyle(run("plugins").stdout)

    assert name in output
    assert "[bold]odd[/bold]" in output
    assert "…" not in output


def test_json_describes_every_plugin(fake_distribution: Any) -> None:
    fake_distribution("rllava-core", "1.4", entry_points={})
    site = fake_distribution("rllava-example", "1.2", EXAMPLE)
    fake_distribution("rllava-failing", "0.3", "import no_such_module_anywhere")

    result = run("plugins", "--json")

    assert result.exit_code == 0
    listing = json.loads(result.stdout)
    assert set(listing) == {"schema", "core_version", "hook_api", "plugins"}
    assert (listing["schema"], listing["core_version"], listing["hook_api"]) == (1, "1.4", "1.0")
    assert plugin_in(listing, "example") == {
        "name": "example",
        "distribution": "rllava-example",
        "version": "1.2",
        "entry_point": "rllava_example",
        "location": str(site),
        "status": "ok",
        "error": None,
        "summary": "An example.",
        "components": [
            {
                "kind": "algorithm",
                "name": "example",
                "qualified_name": "rllava-example/example",
                "summary": "",
                "target": "a.b:C",
                "config": None,
                "provides": [],
                "needs": [],
            },
            {
                "kind": "engine",
                "name": "server",
                "qualified_name": "rllava-example/server",
                "summary": "Serves.",
                "target": "a.b:C",
                "config": "a.c:D",
                "provides": ["logprobs", "rollout"],
                "needs": ["a", "z"],
            },
        ],
    }
    failing = plugin_in(listing, "failing")
    assert failing["status"] == "broken"
    assert "no_such_module_anywhere" in failing["error"]
    assert failing["components"] == []


def failing_group(error: BaseException) -> LazyGroup:
    """The command line with one more subcommand, `fail`, that raises."""

    def fail() -> None:
        raise error

    group = LazyGroup("rllava", lazy_commands=COMMANDS, params=rllava.params)
    group.callback = rllava.callback
    group.add_command(click.Command("fail", callback=fail, help="Fail."))
    return group


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("key 'x' is wrong"), 2), (TrainingError("disk full"), 1), (RllavaError("no"), 1)]
)
def test_an_error_for_the_user_is_one_message_and_its_exit_code(error: RllavaError, code: int) -> None:
    result = CliRunner().invoke(failing_group(error), ["fail"])

    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == f"error: {error}\n"


def test_debug_adds_the_traceback() -> None:
    result = CliRunner().invoke(failing_group(ConfigError("key 'x' is wrong")), ["--debug", "fail"])

    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("error: key 'x' is wrong\n")


def test_an_interrupt_exits_with_130() -> None:
    result = CliRunner().invoke(failing_group(KeyboardInterrupt()), ["fail"])

    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_a_mistake_of_our_own_is_not_disguised() -> None:
    result = CliRunner().invoke(failing_group(ZeroDivisionError("ours")), ["fail"])

    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize("args", [["no-such-command"], ["plugins", "--no-such-option"], ["--no-such-option"]])
def test_wrong_usage_exits_with_2(args: list[str]) -> None:
    assert run(*args).exit_code == 2


def test_version_is_that_of_the_core(fake_distribution: Any) -> None:
    fake_distribution("rllava-core", "1.4", entry_points={})

    assert run("--version").stdout == "rllava 1.4\n"


def test_help_lists_every_command() -> None:
    result = run("--help")

    assert result.exit_code == 0
    assert all(f"  {name} " in result.stdout for name in COMMANDS)


HEAVY = ("torch", "transformers", "numpy", "pydantic", "accelerate")

REPORT = """
import atexit, sys
atexit.register(lambda: print(*(name for name in sys.modules), file=sys.stderr))
from rllava_core.cli import main
main()
"""


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["plugins"], ["plugins", "--json"]])
def test_help_and_listing_import_nothing_heavy(fake_distribution: Any, args: list[str]) -> None:
    site = fake_distribution("rllava-example", "1.2", EXAMPLE)
    path = os.pathsep.join([str(site), str(Path(rllava_core.__file__).parents[1])])

    done = subprocess.run(
        [sys.executable, "-c", REPORT, *args],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    imported = set(done.stderr.split())
    assert "rllava_core.cli" in imported
    assert imported.isdisjoint(HEAVY)
    assert ("rich" in imported) == (args == ["plugins"])
    assert ("rllava_core.plugins" in imported) == (args != ["--help"])
