"""Names that two plugins share: both are marked, neither wins, and both stay usable."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from rllava_core.errors import PluginError
from rllava_core.plugins import Plugin, Registry, load_plugins

HEADER = "from rllava_core import ComponentSpec, hookimpl\n"


def plugin_with(*names: str, kind: str = "algorithm", provides: str = "()") -> str:
    """The source of a plugin with components of these names, and a hook that says when it was called."""
    specs = ", ".join(f"ComponentSpec(name={name!r}, target='a:B', provides={provides})" for name in names)
    return (
        HEADER
        + f"@hookimpl\ndef rllava_{kind}s():\n    return [{specs}]\n"
        + "@hookimpl\ndef rllava_run_end(summary):\n    summary['called'].append(__name__)\n"
    )


def of(registry: Registry, distribution: str) -> Plugin:
    [plugin] = [plugin for plugin in registry.plugins if plugin.distribution == distribution]
    return plugin


def test_two_components_of_one_name_put_both_plugins_in_conflict(fake_distribution: Any) -> None:
    fake_distribution("vendor-a", "1.0", plugin_with("same", "other"))
    fake_distribution("vendor-b", "2.0", plugin_with("same"))

    registry = load_plugins()

    one, two = of(registry, "vendor-a"), of(registry, "vendor-b")
    assert (one.status, two.status) == ("conflict", "conflict")
    assert one.error == "algorithm 'same' is also provided by vendor-b: a config must write 'vendor-a/same'"
    assert two.problem == (
        "plugin 'vendor-b' of vendor-b 2.0 is in conflict: algorithm 'same' is also provided by vendor-a: a config "
        "must write 'vendor-b/same'"
    )
    assert registry.find("algorithm", "other").distribution == "vendor-a"
    assert registry.find("algorithm", "vendor-b/same").distribution == "vendor-b"
    with pytest.raises(PluginError, match="vendor-a/same, vendor-b/same"):
        registry.find("algorithm", "same")


def test_the_same_name_in_two_kinds_or_two_engine_roles_is_no_conflict(fake_distribution: Any) -> None:
    fake_distribution("vendor-a", "1.0", plugin_with("same"))
    fake_distribution("vendor-b", "1.0", plugin_with("same", kind="reward"))
    fake_distribution("vendor-c", "1.0", plugin_with("same", kind="engine", provides="{'train'}"))
    fake_distribution("vendor-d", "1.0", plugin_with("same", kind="engine", provides="{'rollout'}"))

    registry = load_plugins()

    assert [of(registry, f"vendor-{letter}").status for letter in "abcd"] == ["ok"] * 4


def test_a_broken_plugin_is_in_conflict_with_nobody(fake_distribution: Any) -> None:
    fake_distribution("vendor-a", "1.0", plugin_with("same"))
    fake_distribution("vendor-b", "1.0", plugin_with("same") + "1 / 0")

    assert of(load_plugins(), "vendor-a").status == "ok"


def test_two_distributions_may_use_one_entry_point_name_and_both_work(fake_distribution: Any) -> None:
    for letter in "ab":
        fake_distribution(f"vendor-{letter}", "1.0", plugin_with(letter), entry_points={"same": f"vendor_{letter}"})
    called: list[str] = []

    registry = load_plugins()
    for implementation in registry.lifecycle:
        implementation({"summary": {"called": called}})

    assert of(registry, "vendor-a").status == "conflict"
    assert of(registry, "vendor-a").error == "vendor-b has a plugin of this name too"
    assert called == ["vendor_a", "vendor_b"]
    assert registry.find("algorithm", "a").distribution == "vendor-a"
    assert registry.find("algorithm", "b").distribution == "vendor-b"


def test_a_module_that_two_distributions_name_is_called_once(fake_distribution: Any) -> None:
    """As a distribution that was renamed leaves it, the old one not uninstalled."""
    fake_distribution("rllava-example", "1.0", plugin_with("x"), entry_points={"example": "rllava_example"})
    fake_distribution("example-rllava", "1.0", entry_points={"example": "rllava_example"})
    called: list[str] = []

    registry = load_plugins()
    for implementation in registry.lifecycle:
        implementation({"summary": {"called": called}})

    assert called == ["rllava_example"]
    assert {of(registry, name).status for name in ("rllava-example", "example-rllava")} == {"conflict"}
    assert "its module is also that of plugin 'example' of example-rllava" in str(of(registry, "rllava-example").error)


def test_plugins_of_one_distribution_that_repeat_a_component_can_only_be_told_apart_by_disabling_one(
    fake_distribution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_points = {"first": "rllava_example", "second": "second_example"}
    site = fake_distribution("rllava-example", "1.0", plugin_with("x"), entry_points=entry_points)
    site.joinpath("second_example.py").write_text(plugin_with("x"))

    registry = load_plugins()

    assert [plugin.status for plugin in registry.plugins if plugin.distribution == "rllava-example"] == ["conflict"] * 2
    for name in ("x", "rllava-example/x"):
        with pytest.raises(PluginError, match="Disable all but one: RLLAVA_DISABLE_PLUGINS=second"):
            registry.find("algorithm", name)
    monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", "second")
    assert load_plugins().find("algorithm", "x").plugin == "first"


def test_a_distribution_that_is_twice_in_one_directory_is_in_conflict_with_itself(fake_distribution: Any) -> None:
    site = fake_distribution("rllava-example", "1.10", plugin_with("x"))
    old = site / "rllava_example-1.9.dist-info"
    shutil.copytree(site / "rllava_example-1.10.dist-info", old)
    old.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: rllava-example\nVersion: 1.9\n")

    plugin = of(load_plugins(), "rllava-example")

    assert (plugin.status, plugin.version) == ("conflict", "1.10")
    assert f"{site} holds it more than once (also 1.9 in {site}); install it again" in str(plugin.error)
