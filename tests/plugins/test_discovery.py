"""Which plugins are installed, by their metadata: versions, places, requirements, and metadata that are damaged."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from rllava_core.plugins import Plugin, load_plugins

HEADER = "from rllava_core import ComponentSpec, PluginInfo, hookimpl\n"

HEALTHY = (
    HEADER
    + """
@hookimpl
def rllava_plugin_info():
    return PluginInfo(summary="An example.")

@hookimpl
def rllava_algorithms():
    yield ComponentSpec(name="example", target="rllava_example:Example", summary="Does little.")
"""
)


def algorithm_plugin(name: str) -> str:
    """The source of a plugin with one algorithm."""
    return (
        HEADER
        + f"@hookimpl\ndef rllava_algorithms():\n    return [ComponentSpec(name={name!r}, target='some.where:X')]\n"
    )


def plugin_named(name: str) -> Plugin:
    """The one plugin of this name, after loading all that is installed."""
    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.name == name]
    return plugin


def test_a_plugin_that_is_not_loaded_is_not_imported(fake_distribution: Any) -> None:
    fake_distribution("rllava-core", "1.4", entry_points={})
    fake_distribution("rllava-example", "1.0", HEALTHY)
    fake_distribution("rllava-old", "1.0", HEALTHY, requires=["rllava-core<1"])

    statuses = {plugin.name: plugin.status for plugin in load_plugins(load=False).plugins}

    assert (statuses["example"], statuses["old"]) == ("unloaded", "incompatible")
    assert "rllava_example" not in sys.modules


@pytest.mark.parametrize(
    ("requires", "majors"),
    [
        (["rllava-core>=1,<2"], "1"),
        (["rllava-core>=1.0.0a1,<2"], "1"),
        (["rllava-core~=1.3"], "1"),
        (["rllava-core>=1,<3"], "1–2"),
        (["rllava-core>=1"], "1+"),
        (["rllava-core"], "0+"),
        (["rllava-core==1.2.3"], "1"),
        (["rllava-core>=1", "rllava-core<2"], "1"),
        (["numpy"], None),
    ],
)
def test_a_plugin_says_which_hook_api_it_accepts(fake_distribution: Any, requires: list[str], majors: str) -> None:
    fake_distribution("rllava-core", "1.2.3", entry_points={})
    fake_distribution("rllava-example", "1.0", HEALTHY, requires=requires)

    assert plugin_named("example").hook_api == majors


def test_a_plugin_for_another_major_is_refused_where_the_core_is_no_distribution(
    fake_distribution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rllava_core.plugins.discovery.core_version", lambda: None)
    fake_distribution("rllava-example", "1.0", HEALTHY, requires=["rllava-core>=2,<3"])

    assert plugin_named("example").status == "incompatible"


def test_an_editable_installation_is_known_as_one(fake_distribution: Any) -> None:
    for name, origin in {
        "rllava-a": '{"url": "file:///a", "dir_info": {"editable": true}}',
        "rllava-b": '{"url": "file:///b", "dir_info": {}}',
        "rllava-c": "not JSON",
    }.items():
        site = fake_distribution(name, "1.0", algorithm_plugin(name[-1]))
        [info] = site.glob("*.dist-info")
        info.joinpath("direct_url.json").write_text(origin)

    assert [plugin_named(name).editable for name in "abc"] == [True, False, False]
    assert plugin_named("a").location == "/a"


@pytest.mark.parametrize("requirement", ["rllava-core>=2,<3", "RLLaVA_Core<1", 'rllava-core>=2; python_version>"3"'])
def test_a_plugin_for_another_core_is_incompatible_and_not_imported(fake_distribution: Any, requirement: str) -> None:
    fake_distribution("rllava-core", "1.4", entry_points={})
    fake_distribution("rllava-example", "0.3", HEALTHY, requires=["numpy", requirement])

    plugin = plugin_named("example")

    assert plugin.status == "incompatible"
    assert plugin.error is not None
    assert "installed is rllava-core 1.4" in plugin.error
    assert "requires rllava-core" in plugin.error
    assert "rllava_example" not in sys.modules


@pytest.mark.parametrize(
    ("running", "requires"),
    [
        ("1.0.0a2", ["rllava-core>=1.0.0a2,<2"]),
        ("1.4", ["rllava-core>=1,<2"]),
        ("1.4", []),
        ("1.4", ['rllava-core>=2; python_version<"3"', 'rllava-core>=2; extra == "next"']),
        ("1.0.0a1", ["rllava-core>=1.0.0a1,<2"]),
        ("1.0.0a1", ["rllava-core>=1,<2"]),
        ("1.5.dev3", ["rllava-core>=1,<2"]),
    ],
)
def test_a_plugin_for_this_core_is_ok(fake_distribution: Any, running: str, requires: list[str]) -> None:
    fake_distribution("rllava-core", running, entry_points={})
    fake_distribution("rllava-example", "0.3", HEALTHY, requires=requires)

    assert plugin_named("example").status == "ok"


@pytest.mark.parametrize("requirement", ["rllava-core!=1.0.0a1", "rllava-core>=1.0.0a2,<2", "rllava-core===1.0"])
def test_a_requirement_that_speaks_of_prereleases_is_taken_at_its_word(
    fake_distribution: Any, requirement: str
) -> None:
    fake_distribution("rllava-core", "1.0.0a1", entry_points={})
    fake_distribution("rllava-example", "0.3", HEALTHY, requires=[requirement])

    assert plugin_named("example").status == "incompatible"


@pytest.mark.parametrize(
    "content", ["[ rllava ]\nexample = rllava_example\n", "\ufeff[rllava]\nexample = rllava_example\n"]
)
def test_an_odd_header_is_not_overlooked(fake_distribution: Any, content: str) -> None:
    site = fake_distribution("rllava-example", "1.0", HEALTHY)
    next(site.glob("*.dist-info/entry_points.txt")).write_text(content, encoding="utf-8")

    assert [plugin for plugin in load_plugins().plugins if plugin.distribution == "rllava-example"]


@pytest.mark.parametrize("name", ["a,b", "a b", "a/b"])
def test_a_name_that_no_list_can_hold_is_refused(fake_distribution: Any, name: str) -> None:
    fake_distribution("rllava-example", "1.0", HEALTHY, entry_points={name: "rllava_example"})

    plugin = plugin_named(name)
    assert plugin.status == "broken"
    assert "cannot be written in a list" in str(plugin.error)


@pytest.mark.parametrize("running", ["2.0.0a1", "0.9"])
def test_a_prerelease_of_the_next_major_is_another_core(fake_distribution: Any, running: str) -> None:
    fake_distribution("rllava-core", running, entry_points={})
    fake_distribution("rllava-example", "0.3", HEALTHY, requires=["rllava-core>=1,<2"])

    assert plugin_named("example").status == "incompatible"


def test_of_a_distribution_found_twice_the_first_on_the_path_counts(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "1.0", HEALTHY)
    fake_distribution("rllava-example", "2.0", HEALTHY)  # goes before the one above

    plugin = plugin_named("example")
    assert (plugin.version, plugin.status) == ("2.0", "ok")
    [other] = plugin.shadowed
    assert other.startswith("1.0 in ")


def test_an_older_plugin_is_shadowed_by_a_distribution_without_entry_points(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "1.0", HEALTHY)
    fake_distribution("rllava-example", "2.0", HEALTHY, entry_points={})

    assert "example" not in {plugin.name for plugin in load_plugins().plugins}


@pytest.mark.parametrize("content", [b"[rllava]\nno equals sign\n", b"[rllava]\nname = caf\xe9\n"])
def test_entry_points_that_cannot_be_read_break_only_their_distribution(fake_distribution: Any, content: bytes) -> None:
    site = fake_distribution("rllava-example", "1.0", HEALTHY)
    [listing] = site.glob("*.dist-info/entry_points.txt")
    listing.write_bytes(content)
    fake_distribution("rllava-other", "1.0", algorithm_plugin("other"))

    plugin = plugin_named("rllava-example")

    assert plugin.status == "broken"
    assert "reading its entry points" in str(plugin.error)
    assert plugin_named("other").status == "ok"


def test_metadata_that_cannot_be_read_breaks_only_its_distribution(fake_distribution: Any) -> None:
    site = fake_distribution("rllava-example", "1.0", HEALTHY)
    [header] = site.glob("*.dist-info/METADATA")
    header.write_bytes(b"Name: caf\xe9\n")
    fake_distribution("rllava-other", "1.0", algorithm_plugin("other"))

    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.location == str(site)]
    assert plugin.status == "broken"
    assert str(site) in plugin.problem
    assert plugin_named("other").status == "ok"


@pytest.mark.parametrize("value", ["not a module", "rllava_example:", "rllava_example:missing"])
def test_an_entry_point_that_names_nothing_is_broken(fake_distribution: Any, value: str) -> None:
    fake_distribution("rllava-example", "1.0", HEALTHY, entry_points={"example": value})

    plugin = plugin_named("example")

    assert plugin.status == "broken"
    assert value in str(plugin.error)


def test_an_invalid_requirement_breaks_the_plugin(fake_distribution: Any) -> None:
    fake_distribution("rllava-core", "1.4", entry_points={})
    fake_distribution("rllava-example", "1.0", HEALTHY, requires=["rllava-core =>> 1"])

    plugin = plugin_named("example")

    assert plugin.status == "broken"
    assert "InvalidRequirement" in str(plugin.error)
