"""`rllava plugins`: the table, the JSON, and what is left out of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import rllava_core
from rllava_core.cli import rllava

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
        "–",
        "ok",
        "algorithm example",
    ]
    assert any("engine server (rollout)" in line for line in lines)
    order = [i for name in ("rllava-example", "rllava-failing", "rllava-future") for i in _rows(lines, name)]
    assert order == sorted(order)
    assert (
        "plugin 'failing' of rllava-failing 0.3 is broken: importing 'rllava_failing' raised ModuleNotFoundError: "
        "No module named 'no_such_module_anywhere'. See: rllava plugins show failing"
    ) in lines
    assert (
        "plugin 'future' of rllava-future 9.0 is incompatible: it requires rllava-core>=9, installed is rllava-core "
        "1.4. See: rllava plugins show future"
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


SNAPSHOT = Path(__file__).parent / "plugins.json"


def test_the_json_is_that_of_the_snapshot(fake_distribution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of this file is a change of what other programs read: raise the schema unless keys are only added."""
    fake_distribution("rllava-core", "1.4", entry_points={})
    places = {
        str(fake_distribution("rllava-example", "1.2", EXAMPLE, requires=["rllava-core>=1,<2"])): "EXAMPLE",
        str(fake_distribution("rllava-failing", "0.3", "import no_such_module_anywhere")): "FAILING",
        str(fake_distribution("rllava-future", "9.0", EXAMPLE, requires=["rllava-core>=9"])): "FUTURE",
        str(fake_distribution("rllava-off", "1.0", EXAMPLE)): "OFF",
    }
    monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", "off,absent")

    result = run("plugins", "--json")

    assert result.exit_code == 0
    found = json.loads(result.stdout)
    found["plugins"] = [plugin for plugin in found["plugins"] if plugin["location"] in places]
    # What is installed beside the four differs from machine to machine.
    found["warnings"] = [
        warning.partition("; did you mean")[0].partition(" (installed")[0] for warning in found["warnings"]
    ]
    for plugin in found["plugins"]:
        plugin["location"] = places[plugin["location"]]
        if plugin["status"] == "ok":
            assert 0 <= plugin["load_seconds"] < 10
            plugin["load_seconds"] = 0.001
    assert found == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_the_snapshot_shows_every_key_that_the_documentation_names() -> None:
    from rllava_core.plugins import listing

    document = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    plugin = document["plugins"][0]
    for key in [*document, *plugin, *plugin["components"][0]]:
        assert re.search(rf"\b{key}\b", str(listing.__doc__)), f"{key} is not documented in listing.py"


def test_one_kind_can_be_listed(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "1.2", EXAMPLE)
    fake_distribution("rllava-failing", "0.3", "1 / 0")
    fake_distribution("rllava-none", "1.0", HEADER + "@hookimpl\ndef rllava_rewards():\n    return []\n")

    listing = json.loads(run("plugins", "--json", "--kind", "algorithm").stdout)
    table = run("plugins", "--kind", "algorithm").stdout

    assert [item["name"] for item in plugin_in(listing, "example")["components"]] == ["example"]
    assert plugin_in(listing, "failing")["status"] == "broken"  # who knows what it would have provided
    assert "none" not in {plugin["name"] for plugin in listing["plugins"]}
    assert "algorithm example" in table
    assert "engine server" not in table


def test_a_plugin_that_follows_runs_is_listed_as_one(fake_distribution: Any) -> None:
    fake_distribution("rllava-logger", "1.0", HEADER + "@hookimpl\ndef rllava_step_end(step):\n    pass\n")

    [row] = [line for line in run("plugins").stdout.splitlines() if "rllava-logger" in line]
    assert row.strip("│").split("│")[-1].strip() == "follows runs"
    assert "rllava-logger" not in run("plugins", "--kind", "reward").stdout


NOISY = (
    "import atexit, os\nos.write(1, b'one')\nos.system('echo two')\n"
    "atexit.register(lambda: os.write(1, b'three'))\n" + EXAMPLE
)


def test_nothing_that_a_plugin_starts_gets_into_the_json(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "1.2", NOISY)
    command = [sys.executable, "-c", "from rllava_core.cli import main; main()", "plugins", "--json"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert plugin_in(json.loads(done.stdout), "example")["status"] == "ok"
    assert "one" in done.stderr
    assert "two" in done.stderr


def test_a_listing_can_be_printed_whatever_an_error_says(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "1.2", "raise ValueError('f \\udcff')")

    for command in (["plugins"], ["plugins", "--json"], ["plugins", "show", "example"]):
        run(*command).stdout.encode("utf-8")


def test_without_loading_nothing_of_a_plugin_runs(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "1.2", EXAMPLE)

    result = run("plugins", "--no-load", "--json")

    assert plugin_in(json.loads(result.stdout), "example")["status"] == "unloaded"
    assert "rllava_example" not in sys.modules
    assert "hello" not in result.stderr
    assert "unloaded" in run("plugins", "--no-load").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plugins", "--no-load", "--kind", "reward"], "--kind needs the plugins loaded"),
        (["plugins", "--kind", "rewards"], "'rewards' is not one of"),
        (["plugins", "--json", "check"], "write the options of `rllava plugins check` behind it"),
    ],
)
def test_options_that_mean_nothing_are_refused(args: list[str], message: str) -> None:
    result = run(*args)

    assert result.exit_code == 2
    assert message in result.stderr


def test_a_slow_plugin_is_mentioned(fake_distribution: Any) -> None:
    fake_distribution("rllava-slow", "1.0", "import time\ntime.sleep(1.1)\n" + EXAMPLE)

    output = run("plugins").stdout

    assert re.search(r"plugin 'slow' of rllava-slow took 1\.\d s to load\. See: rllava plugins check slow", output)


def test_strictness_lists_everything_and_then_fails(fake_distribution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_distribution("rllava-failing", "0.3", "1 / 0")
    monkeypatch.setenv("RLLAVA_STRICT_PLUGINS", "1")

    result = run("plugins")

    assert result.exit_code == 2
    assert "rllava-failing" in result.stdout
    assert "not every plugin is ok" in result.stderr


def test_what_the_environment_got_wrong_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLAVA_PLUGINS", "no-such-plugin")

    result = run("plugins")

    assert result.exit_code == 2
    assert "RLLAVA_PLUGINS names 'no-such-plugin', which is not installed" in result.stderr


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
