"""`rllava plugins check`, which looks at each plugin in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]

HEADER = "from rllava_core import ComponentSpec, PluginInfo, hookimpl\n"
INFO = "@hookimpl\ndef rllava_plugin_info():\n    return PluginInfo(summary='An example.')\n"
GOOD = (
    HEADER
    + INFO
    + "@hookimpl\ndef rllava_rewards():\n"
    + "    return [ComponentSpec(name='example', target='example_parts:Reward', config='example_parts:Config',\n"
    + "                          summary='Does little.')]\n"
)
PARTS = """
from pydantic import Field
from rllava_core.config import Options

class Config(Options):
    value: float = Field(default=0.5, description="of every trajectory")

class Reward:
    def __init__(self, config):
        self.value = config.value

    def __call__(self, trajectories, /):
        return [self.value * len(item.answer) for item in trajectories]
"""
REQUIRES = ("rllava-core>=1.0.0a1,<2",)


@pytest.fixture
def plugin(fake_distribution: Any) -> Callable[..., Path]:
    """Installs `rllava-example` with parts."""

    def install(source: str = GOOD, parts: str = PARTS, **options: Any) -> Path:
        site: Path = fake_distribution(
            options.pop("name", "rllava-example"),
            options.pop("version", "1.0"),
            source,
            requires=options.pop("requires", REQUIRES),
            files={"example_parts.py": parts},
            **options,
        )
        return site

    return install


def findings(result: Result, name: str = "example") -> dict[str, tuple[str, str]]:
    """Level and message of each check of one plugin; those of a component are named `check of component`."""
    [report] = [report for report in json.loads(result.stdout)["plugins"] if report["name"] == name]
    found = {}
    for finding in report["findings"]:
        about = f" of {finding['component']}" if "component" in finding else ""
        found[finding["check"] + about] = (finding["level"], finding["message"])
    return found


def test_a_good_plugin_passes(run_rllava: Run, plugin: Any) -> None:
    plugin()

    result = run_rllava("plugins", "check", "example", "--json")

    assert result.exit_code == 0, result.stdout
    document = json.loads(result.stdout)
    assert (document["schema"], document["hook_api"], document["deep"], document["ok"]) == (1, "1.0", False, True)
    assert {level for level, _ in findings(result).values()} == {"ok"}
    assert list(findings(result)) == [
        "requirement on the core",
        "installation",
        "import time",
        "heavy imports",
        "loading",
        "names",
        "target of reward example",
        "config of reward example",
    ]


def test_in_words(run_rllava: Run, plugin: Any) -> None:
    plugin(GOOD.replace(", summary='Does little.'", "").replace("summary='Does little.'", ""))

    result = run_rllava("plugins", "check", "rllava-example")

    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "example (rllava-example 1.0): ok, 8 checks passed",
        "  warning: description: reward 'example' has no summary",
    ]


@pytest.mark.parametrize(
    ("change", "check", "level", "words"),
    [
        ({"requires": ()}, "requirement on the core", "error", "does not require rllava-core; require"),
        ({"requires": ("rllava-core>=1",)}, "requirement on the core", "warning", "every later hook API"),
        ({"requires": ("rllava-core>=7,<8",)}, "requirement on the core", "error", "installed is rllava-core"),
        ({"requires": ("rllava-core =>> 1",)}, "requirement on the core", "error", "InvalidRequirement"),
        ({"source": GOOD + "import time\ntime.sleep(0.3)\n"}, "import time", "error", "budget 200 ms"),
        ({"source": GOOD + "import numpy, PIL\n"}, "heavy imports", "error", "PIL, numpy"),
        ({"source": GOOD + "print('hello')\n"}, "output", "warning", "'hello'"),
        ({"source": GOOD + "1 / 0\n"}, "loading", "error", "ZeroDivisionError"),
        ({"source": GOOD + "import os\nos._exit(7)\n"}, "loading", "error", "ended with code 7"),
        ({"source": GOOD.replace("rllava_rewards", "rllava_reward")}, "loading", "error", "did you mean 'rllava_rewa"),
        ({"source": GOOD.replace("'example'", "'No Name'")}, "loading", "error", "'No Name'"),
        ({"source": GOOD.replace(INFO, "")}, "description", "warning", "rllava_plugin_info"),
        ({"source": GOOD.replace("parts:Reward", "part:Reward")}, "target of reward example", "error", "example_part'"),
        ({"source": GOOD.replace("parts:Config", "parts:Conf")}, "config of reward example", "error", "AttributeError"),
        (
            {"parts": PARTS.replace("class Reward", "class Rewart")},
            "target of reward example",
            "error",
            "defines no 'Reward'; did you mean 'Rewart'?",
        ),
        (
            {"parts": PARTS.replace("value: float", "weight: float")},
            "config of reward example",
            "error",
            "a reward's section has a key 'weight' of its own",
        ),
        ({"parts": "def (:\n"}, "target of reward example", "error", "SyntaxError"),
        (
            {"source": GOOD.replace("summary='Does", "needs={'logprob'}, summary='Does")},
            "needs of reward example",
            "warning",
            "nothing that is installed provides 'logprob'; did you mean 'logprobs'?",
        ),
        ({"parts": "import torch\n" + PARTS}, "config of reward example", "error", "imports torch"),
        ({"parts": PARTS.replace("(Options)", "")}, "config of reward example", "error", "no pydantic model"),
        (
            {
                "parts": PARTS.replace(
                    "from rllava_core.config import Options", "from pydantic import BaseModel as Options"
                )
            },
            "config of reward example",
            "error",
            "accepts unknown keys",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_wrong_is_found_and_named(
    run_rllava: Run, plugin: Any, change: dict[str, Any], check: str, level: str, words: str
) -> None:
    plugin(**change)

    result = run_rllava("plugins", "check", "example", "--json")

    found_level, message = findings(result)[check]
    assert (found_level, words in message) == (level, True), message
    assert result.exit_code == (1 if level == "error" else 0)


@pytest.mark.parametrize(
    ("parts", "check", "words"),
    [
        (
            PARTS.replace("for item in trajectories]", "for item in trajectories[1:]]"),
            "every trajectory gets one finite",
            "1",
        ),
        (PARTS.replace(', description="of every trajectory"', ""), "every option has a description", "value"),
    ],
)
def test_only_a_deep_check_looks_into_components(
    run_rllava: Run, plugin: Any, parts: str, check: str, words: str
) -> None:
    plugin(parts=parts)
    assert run_rllava("plugins", "check", "example").exit_code == 0

    result = run_rllava("plugins", "check", "example", "--deep", "--json")

    assert result.exit_code == 1
    [(level, message)] = [found for name, found in findings(result).items() if name.startswith(check)]
    assert level == "error"
    assert words in message


def test_a_good_plugin_passes_the_deep_check_too(run_rllava: Run, plugin: Any) -> None:
    plugin()

    result = run_rllava("plugins", "check", "example", "--deep")

    assert result.exit_code == 0, result.stdout
    assert result.stdout.startswith("example (rllava-example 1.0): ok, ")


def test_components_of_a_plugin_that_cannot_be_loaded_are_not_looked_for(run_rllava: Run, plugin: Any) -> None:
    plugin("1 / 0")

    result = run_rllava("plugins", "check", "example", "--deep")

    assert result.exit_code == 1
    assert result.stdout.endswith("  skipped: 1 check (components): the plugin cannot be loaded\n")


def test_what_a_plugin_writes_may_be_any_bytes(run_rllava: Run, plugin: Any) -> None:
    plugin("import os\nos.write(2, b'caf\\xe9')\nos._exit(5)\n")

    result = run_rllava("plugins", "check", "example")

    assert result.exit_code == 1
    assert "ended with code 5: caf" in result.stdout


def test_a_process_that_a_plugin_leaves_behind_is_not_waited_for(run_rllava: Run, plugin: Any) -> None:
    plugin(GOOD + "import subprocess\nsubprocess.Popen(['sleep', '30'])\n")
    began = time.monotonic()

    run_rllava("plugins", "check", "example")

    assert time.monotonic() - began < 25


def test_two_entry_points_of_one_name_are_checked_apart(run_rllava: Run, plugin: Any, fake_distribution: Any) -> None:
    site = plugin()
    next(site.glob("*.dist-info/entry_points.txt")).write_text(
        "[rllava]\nexample = rllava_example\nexample = rllava_missing\n"
    )

    result = run_rllava("plugins", "check", "example", "--json")

    reports = json.loads(result.stdout)["plugins"]
    assert [report["ok"] for report in reports] == [True, False]
    assert any("rllava_missing" in finding["message"] for finding in reports[1]["findings"])


def test_modules_in_the_current_folder_are_not_taken_for_the_plugins(
    run_rllava: Run, plugin: Any, tmp_path: Path
) -> None:
    plugin()
    tmp_path.joinpath("rllava_example.py").write_text("1 / 0")

    assert run_rllava("plugins", "check", "example").exit_code == 0


def test_a_name_that_two_plugins_use_is_an_error_of_both(run_rllava: Run, plugin: Any) -> None:
    plugin()
    plugin(name="vendor-other")

    for name in ("example", "vendor-other"):
        result = run_rllava("plugins", "check", name, "--json")
        assert result.exit_code == 1
        assert "is also provided by" in findings(result, name)["names"][1]


def test_a_second_installation_is_mentioned_and_two_in_one_directory_are_an_error(run_rllava: Run, plugin: Any) -> None:
    plugin(version="1.0")
    site = plugin(version="1.1")

    result = run_rllava("plugins", "check", "example", "--json")
    assert result.exit_code == 0
    assert "not imported" in findings(result)["installation"][1]

    old = site / "rllava_example-0.9.dist-info"
    old.mkdir()
    old.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: rllava-example\nVersion: 0.9\n")
    old.joinpath("entry_points.txt").write_text("[rllava]\nexample = rllava_example\n")
    result = run_rllava("plugins", "check", "example")
    assert result.exit_code == 1
    assert f"error: installation: {site} holds metadata of 0.9 in {site} too" in result.stdout


def test_files_that_are_gone_make_an_installation_stale(run_rllava: Run, plugin: Any) -> None:
    site = plugin()
    [info] = site.glob("*.dist-info")
    info.joinpath("RECORD").write_text("rllava_example.py,,\nrllava_gone.py,,\n")

    result = run_rllava("plugins", "check", "example", "--json")

    assert result.exit_code == 1
    assert findings(result)["installation"] == (
        "error",
        "stale: 1 of the files it recorded are gone, such as rllava_gone.py; install it again",
    )


def test_one_bad_plugin_fails_the_check_of_all_and_hides_none(run_rllava: Run, plugin: Any) -> None:
    plugin()
    plugin("1 / 0", name="vendor-bad")

    result = run_rllava("plugins", "check", "--json")

    reports = {report["name"]: report["ok"] for report in json.loads(result.stdout)["plugins"]}
    assert result.exit_code == 1
    assert (reports["example"], reports["vendor-bad"], reports["core"]) == (True, False, True)


def test_the_check_does_not_import_the_plugin_into_its_own_process(run_rllava: Run, plugin: Any) -> None:
    plugin()
    run_rllava("plugins", "check", "example")

    assert "rllava_example" not in sys.modules


def test_a_disabled_plugin_is_checked_when_it_is_named(
    run_rllava: Run, plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin("1 / 0")
    monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", "example")

    assert run_rllava("plugins", "check", "example").exit_code == 1
    everything = run_rllava("plugins", "check", "--json")
    assert everything.exit_code == 0
    assert findings(everything)["loading"][0] == "skipped"


def test_a_plugin_that_is_not_there_is_wrong_usage(refused: Callable[..., str], plugin: Any) -> None:
    plugin()

    assert refused("plugins", "check", "exampel") == (
        "no plugin, distribution or component 'exampel' is installed. Did you mean 'example'? See: rllava plugins"
    )


def test_a_plugin_that_never_ends_is_given_up(run_rllava: Run, plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(GOOD + "import time\ntime.sleep(60)\n")
    monkeypatch.setattr("rllava_core.cli.plugins_check.TIMEOUT", 1)

    result = run_rllava("plugins", "check", "example", "--json")

    assert result.exit_code == 1
    assert findings(result)["loading"] == ("error", "it did not end within 1 s")
