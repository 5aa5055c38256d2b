"""The environment decides which plugins are loaded, and how strictly."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from rllava_core.errors import PluginError
from rllava_core.plugins import Plugin, load_plugins

SOURCE = "from rllava_core import ComponentSpec, hookimpl\n@hookimpl\ndef rllava_rewards():\n    return []\n"


@pytest.fixture(autouse=True)
def two_plugins(fake_distribution: Any) -> None:
    fake_distribution("rllava-a", "1.0", SOURCE)
    fake_distribution("vendor-b", "1.0", SOURCE, entry_points={"b": "vendor_b"})


def named(name: str) -> Plugin:
    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.name == name]
    return plugin


@pytest.mark.parametrize("value", ["a", "rllava-a", "RLLAVA_A", " a , ", "a,core"])
def test_an_allow_list_loads_only_what_it_names_and_the_core(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RLLAVA_PLUGINS", value)

    statuses = {plugin.name: plugin.status for plugin in load_plugins().plugins}

    assert (statuses["a"], statuses["b"], statuses["core"], statuses["toy"]) == ("ok", "disabled", "ok", "disabled")
    assert named("b").error == "not listed in RLLAVA_PLUGINS"
    assert "vendor_b" not in sys.modules


def test_an_empty_allow_list_leaves_the_core_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLAVA_PLUGINS", "")

    assert {plugin.name for plugin in load_plugins().plugins if plugin.status != "disabled"} == {"core"}


def test_an_unknown_name_in_the_allow_list_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLAVA_PLUGINS", "a,vendor_c")

    with pytest.raises(PluginError, match="RLLAVA_PLUGINS names 'vendor_c', which is not installed; did you mean"):
        load_plugins()


@pytest.mark.parametrize("value", ["b", "vendor-b", "Vendor.B,core"])
def test_a_disabled_plugin_is_not_imported(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", value)

    assert (named("a").status, named("b").status) == ("ok", "disabled")
    assert named("b").error == "listed in RLLAVA_DISABLE_PLUGINS"
    assert "vendor_b" not in sys.modules
    assert (named("core").status == "disabled") == ("core" in value)


def test_what_is_both_allowed_and_disabled_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLAVA_PLUGINS", "a,b")
    monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", "b")

    assert (named("a").status, named("b").status) == ("ok", "disabled")


def test_disabling_what_is_not_installed_is_only_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", "vendor-c")

    [warning] = load_plugins().warnings
    assert "RLLAVA_DISABLE_PLUGINS names 'vendor-c', which is not installed" in warning


@pytest.mark.parametrize("variable", ["RLLAVA_PLUGINS", "RLLAVA_DISABLE_PLUGINS"])
def test_a_name_of_two_plugins_chooses_neither(
    fake_distribution: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    fake_distribution("vendor-c", "1.0", SOURCE, entry_points={"b": "vendor_c"})
    monkeypatch.setenv(variable, "b")

    with pytest.raises(PluginError, match=f"{variable}: 'b' is a plugin of vendor-b, vendor-c; name the distribution"):
        load_plugins()

    monkeypatch.setenv(variable, "vendor-c")
    load_plugins()


def test_a_component_of_a_disabled_plugin_is_missing_for_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", "a")

    with pytest.raises(PluginError, match=r"'a' of rllava-a 1\.0 is disabled: listed in RLLAVA_DISABLE_PLUGINS"):
        load_plugins().find("reward", "a")


def test_strictness_makes_every_problem_an_error(fake_distribution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLAVA_STRICT_PLUGINS", "1")
    monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", "a")
    load_plugins()
    fake_distribution("vendor-bad", "0.1", "1 / 0")

    with pytest.raises(PluginError, match=r"not every plugin is ok:\nplugin 'vendor-bad' of vendor-bad 0\.1 is broken"):
        load_plugins()

    assert load_plugins(strict=False).plugins
    monkeypatch.setenv("RLLAVA_STRICT_PLUGINS", "0")
    assert load_plugins().plugins


def test_a_switch_is_one_or_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLLAVA_STRICT_PLUGINS", "yes")

    with pytest.raises(PluginError, match="RLLAVA_STRICT_PLUGINS is 'yes': set it to 1 or 0"):
        load_plugins()
