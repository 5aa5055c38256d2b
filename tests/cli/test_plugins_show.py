"""`rllava plugins show`: a plugin, a distribution, a component, and the tail of what broke."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]

PLUGIN = """
from rllava_core import ComponentSpec, PluginInfo, hookimpl

@hookimpl
def rllava_plugin_info():
    return PluginInfo(summary="An example.", homepage="https://example.org")

@hookimpl
def rllava_rewards():
    return [
        ComponentSpec(name="brevity", target="brevity_parts:Brevity", config="brevity_parts:BrevityConfig",
                      summary="Short answers.", needs={"choices"}, provides={"laughter"}),
        ComponentSpec(name="plain", target="brevity_parts:Plain"),
        ComponentSpec(name="hollow", target="brevity_parts:Plain", config="brevity_parts:Nothing"),
    ]

@hookimpl
def rllava_engines():
    return [ComponentSpec(name="server", target="brevity_parts:Server", provides={"rollout"})]
"""

PARTS = """
from typing import Literal
from pydantic import Field
from rllava_core.config import Options

class BrevityConfig(Options):
    limit: int = Field(default=10, description="words [at most]")
    unit: Literal["word", "letter"] = Field(description="what is counted")
    name: str | None = Field(default=None, description="for reports")
    weights: tuple[float, float] = Field(default=(1.0, 0.5), description="two of them")
"""


@pytest.fixture
def brevity(fake_distribution: Any) -> Any:
    site = fake_distribution("vendor-brevity", "1.2", PLUGIN, requires=["rllava-core>=1.0.0a1,<2"])
    site.joinpath("brevity_parts.py").write_text(PARTS)
    [header] = site.glob("*.dist-info/METADATA")
    header.write_text(header.read_text() + "Project-URL: Source, https://example.org/source\n")
    return site


def cells(output: str) -> list[list[str]]:
    """The rows of the table in an output."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line[:1] == "│"]


@pytest.mark.parametrize("name", ["vendor-brevity", "Vendor_Brevity"])
def test_a_plugin_says_what_it_is_and_provides(run_rllava: Run, brevity: Any, name: str) -> None:
    result = run_rllava("plugins", "show", name)

    assert result.exit_code == 0
    for words in (
        "An example.",
        "status        ok",
        "vendor-brevity 1.2",
        f"location      {brevity}",
        "hook API      1",
        "rllava_plugin_info, rllava_rewards, rllava_engines",
        "reward brevity: Short answers.",
        "engine server (rollout)\n",
        "https://example.org\n",
        "https://example.org/source (Source)",
    ):
        assert words in result.stdout
    assert "Traceback" not in result.stdout


@pytest.mark.parametrize("name", ["brevity", "vendor-brevity/brevity"])
def test_a_component_shows_its_options(run_rllava: Run, brevity: Any, name: str) -> None:
    result = run_rllava("plugins", "show", name)

    assert result.exit_code == 0
    assert "needs     choices" in result.stdout
    assert "provides  laughter" in result.stdout
    assert "task: {rewards: [{name: brevity}]}" in result.stdout
    assert cells(result.stdout) == [
        ["limit", "int", "10", "words [at most]"],
        ["unit", "word, letter", "required", "what is counted"],
        ["name", "str or null", "null", "for reports"],
        ["weights", "list of float", "[1.0, 0.5]", "two of them"],
    ]


def test_a_component_without_options_says_so(run_rllava: Run, brevity: Any) -> None:
    output = run_rllava("plugins", "show", "plain").stdout

    assert "It has no options." in output
    assert "needs     nothing" in output


def test_an_engine_says_where_a_config_names_it(run_rllava: Run, brevity: Any) -> None:
    assert "engine: {rollout: server}" in run_rllava("plugins", "show", "server").stdout


def test_options_that_cannot_be_imported_are_an_answer_too(run_rllava: Run, brevity: Any) -> None:
    result = run_rllava("plugins", "show", "hollow")

    assert result.exit_code == 0
    assert "its options cannot be shown: reward 'hollow' of vendor-brevity 1.2: loading its config" in result.stdout


def test_in_a_conflict_the_config_must_write_the_qualified_name(
    run_rllava: Run, brevity: Any, fake_distribution: Any
) -> None:
    source = PLUGIN.replace("brevity_parts", "other_parts")
    fake_distribution("vendor-other", "1.0", source).joinpath("other_parts.py").write_text(PARTS)

    output = run_rllava("plugins", "show", "brevity").stdout

    assert "task: {rewards: [{name: vendor-brevity/brevity}]}" in output
    assert "task: {rewards: [{name: vendor-other/brevity}]}" in output


def test_a_broken_plugin_shows_the_tail_of_its_traceback(run_rllava: Run, fake_distribution: Any) -> None:
    deep = "def down(n):\n    return 1 / n if n == 0 else down(n - 1)\ndown(40)\n"
    fake_distribution("rllava-failing", "0.3", deep)

    output = run_rllava("plugins", "show", "failing").stdout

    assert "status        broken" in output
    assert "cause         importing 'rllava_failing' raised ZeroDivisionError: division by zero" in output
    assert output.rstrip().endswith("ZeroDivisionError: division by zero")
    assert "rllava_failing.py" in output
    assert len(output.splitlines()) < 30


def test_an_unknown_name_is_refused_with_the_nearest(refused: Callable[..., str], brevity: Any) -> None:
    message = refused("plugins", "show", "brevty")

    assert message == (
        "no plugin, distribution or component 'brevty' is installed. Did you mean 'brevity'? See: rllava plugins"
    )
