"""Looking a component up by name: one answer, or an error that says what would be right."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from rllava_core.errors import PluginError
from rllava_core.plugins import Registry, load_plugins

HEADER = "from rllava_core import ComponentSpec, hookimpl\n"


def algorithms(*names: str, target: str = "some.where:X", config: str | None = None) -> str:
    """The source of a plugin with algorithms of these names."""
    specs = ", ".join(f"ComponentSpec(name={name!r}, target={target!r}, config={config!r})" for name in names)
    return HEADER + f"@hookimpl\ndef rllava_algorithms():\n    return [{specs}]\n"


def engine(name: str, *provides: str) -> str:
    """The source of a plugin with one engine."""
    spec = f"ComponentSpec(name={name!r}, target='some.where:X', provides={set(provides)!r})"
    return HEADER + f"@hookimpl\ndef rllava_engines():\n    return [{spec}]\n"


def load(*distributions: str) -> Registry:
    """Load the plugins of these fake distributions only, whatever else is installed."""
    from importlib.metadata import distribution

    return load_plugins(entry_point for name in distributions for entry_point in distribution(name).entry_points)


def message(registry: Registry, kind: Any, name: str, role: str | None = None) -> str:
    """What `find` says when it finds nothing."""
    with pytest.raises(PluginError) as caught:
        registry.find(kind, name, role)
    return str(caught.value)


def test_a_component_is_found_by_its_bare_and_its_qualified_name(fake_distribution: Any) -> None:
    fake_distribution("vendor-things", "1.0", algorithms("fast", "slow"))
    registry = load("vendor-things")

    assert registry.find("algorithm", "fast").spec.name == "fast"
    assert registry.find("algorithm", "vendor-things/slow").spec.name == "slow"
    assert registry.find("algorithm", "Vendor_Things/slow").spec.name == "slow"


@pytest.mark.parametrize("order", [("vendor-a", "vendor-b"), ("vendor-b", "vendor-a")])
def test_of_two_components_of_one_name_neither_wins(fake_distribution: Any, order: tuple[str, str]) -> None:
    for name in order:
        fake_distribution(name, "1.0", algorithms("same"))
    registry = load(*order)

    said = message(registry, "algorithm", "same")

    assert "algorithm 'same' is provided by more than one plugin" in said
    assert "vendor-a/same, vendor-b/same" in said
    assert registry.find("algorithm", "vendor-a/same").distribution == "vendor-a"
    assert registry.find("algorithm", "vendor-b/same").distribution == "vendor-b"


def test_the_same_name_in_two_kinds_is_no_conflict(fake_distribution: Any) -> None:
    fake_distribution("vendor-a", "1.0", algorithms("same"))
    fake_distribution("vendor-b", "1.0", algorithms("same").replace("rllava_algorithms", "rllava_rewards"))
    registry = load("vendor-a", "vendor-b")

    assert registry.find("algorithm", "same").distribution == "vendor-a"
    assert registry.find("reward", "same").distribution == "vendor-b"


def test_an_unknown_name_lists_what_is_installed_and_how_to_get_it(fake_distribution: Any) -> None:
    fake_distribution("vendor-a", "1.0", algorithms("zeta", "alpha"))

    assert message(load("vendor-a"), "algorithm", "middle") == (
        "no algorithm 'middle' is installed (installed: alpha, zeta). Try: pip install rllava-middle"
    )


def test_where_nothing_of_the_kind_is_installed_it_says_none() -> None:
    assert message(load_plugins([]), "model", "some_thing") == (
        "no model 'some_thing' is installed (installed: none). Try: pip install rllava-some-thing"
    )


def test_a_close_name_is_suggested(fake_distribution: Any) -> None:
    fake_distribution("vendor-a", "1.0", algorithms("gradient"))
    registry = load("vendor-a")

    assert "Did you mean 'gradient'? Try: pip install rllava-gradeint" in message(registry, "algorithm", "gradeint")
    assert "Did you mean 'vendor-a/gradient'?" in message(registry, "algorithm", "vendor-b/gradient")


@pytest.mark.parametrize("name", ["", "Has Space", "../x", "x;y"])
def test_what_cannot_be_a_name_is_not_suggested_for_installation(name: str) -> None:
    assert "pip install" not in message(load_plugins([]), "algorithm", name)


def test_a_distribution_that_is_installed_is_not_suggested_for_installation(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "1.0", algorithms("other"))
    registry = load("rllava-example")

    assert "pip install" not in message(registry, "algorithm", "example")
    assert "pip install" not in message(registry, "algorithm", "rllava-example/example")
    assert "pip install vendor-a" in message(registry, "algorithm", "vendor-a/example")


@pytest.mark.parametrize(
    ("distribution", "entry_point", "asked"),
    [
        ("rllava-example", "anything", "example"),
        ("vendor-a", "example", "example"),
        ("vendor-a", "anything", "vendor-a/example"),
    ],
)
def test_asking_for_a_broken_plugin_stops_with_its_cause(
    fake_distribution: Any, distribution: str, entry_point: str, asked: str
) -> None:
    module = distribution.replace("-", "_")
    fake_distribution(distribution, "0.3", "import no_such_module_anywhere", entry_points={entry_point: module})
    registry = load(distribution)

    with pytest.raises(PluginError) as caught:
        registry.find("algorithm", asked)

    said = str(caught.value)
    assert f"algorithm {asked!r} cannot be used" in said
    assert f"{distribution} 0.3 is broken" in said
    assert "No module named 'no_such_module_anywhere'" in said
    assert "pip install" not in said
    assert "Traceback" in caught.value.__notes__[0]


def test_asking_for_an_incompatible_plugin_says_what_it_requires(fake_distribution: Any) -> None:
    fake_distribution("rllava-core", "1.4", entry_points={})
    fake_distribution("rllava-example", "0.3", algorithms("example"), requires=["rllava-core>=2"])

    said = message(load("rllava-example"), "algorithm", "example")

    assert "rllava-example 0.3 is incompatible: it requires rllava-core>=2, installed is rllava-core 1.4" in said


def test_an_unknown_name_mentions_plugins_that_could_not_be_loaded(fake_distribution: Any) -> None:
    fake_distribution("vendor-a", "0.3", "1 / 0")

    said = message(load("vendor-a"), "algorithm", "middle")

    assert "Not loaded: plugin 'vendor-a' of vendor-a 0.3 is broken: importing 'vendor_a' raised ZeroDivision" in said


def test_a_broken_plugin_does_not_hide_a_component_that_works(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "0.3", "1 / 0")
    fake_distribution("vendor-a", "1.0", algorithms("example"))

    assert load("rllava-example", "vendor-a").find("algorithm", "example").distribution == "vendor-a"


def test_engines_of_one_name_are_told_apart_by_role() -> None:
    registry = load_plugins([EntryPoint("core", "rllava_core.builtin", "rllava")])

    assert registry.find("engine", "local", "train").spec.target.endswith(":LocalTrainEngine")
    assert registry.find("engine", "local", "rollout").spec.target.endswith(":LocalRolloutEngine")
    assert "Say which role is meant" in message(registry, "engine", "local")


def test_an_engine_that_does_not_play_the_role_is_not_found(fake_distribution: Any) -> None:
    fake_distribution("vendor-a", "1.0", engine("server", "rollout", "logprobs"))

    assert "no train engine 'server' is installed (installed: none)" in message(
        load("vendor-a"), "engine", "server", "train"
    )


def test_engines_that_share_a_role_are_ambiguous(fake_distribution: Any) -> None:
    fake_distribution("vendor-a", "1.0", engine("server", "rollout"))
    fake_distribution("vendor-b", "1.0", engine("server", "rollout", "train"))
    registry = load("vendor-a", "vendor-b")

    assert "vendor-a/server, vendor-b/server" in message(registry, "engine", "server", "rollout")
    assert registry.find("engine", "server", "train").distribution == "vendor-b"


def test_components_are_listed_by_kind_and_sorted(fake_distribution: Any) -> None:
    fake_distribution("vendor-b", "1.0", algorithms("beta", "alpha"))
    fake_distribution("vendor-a", "1.0", algorithms("beta") + engine("server", "train"))
    registry = load("vendor-b", "vendor-a")

    assert [component.qualified_name for component in registry.components("algorithm")] == [
        "vendor-b/alpha",
        "vendor-a/beta",
        "vendor-b/beta",
    ]
    assert [component.kind for component in registry.components()] == ["algorithm"] * 3 + ["engine"]
    assert registry.components("reward") == ()


def test_target_and_config_are_imported_when_asked_for(fake_distribution: Any) -> None:
    source = algorithms("example", target="vendor_a:Target", config="vendor_a:Config")
    fake_distribution("vendor-a", "1.0", source + "class Target: ...\nclass Config: ...\n")
    component = load("vendor-a").find("algorithm", "example")

    assert component.load_target().__name__ == "Target"
    config = component.load_config()
    assert config is not None
    assert config.__name__ == "Config"


def test_a_component_without_options_has_no_config(fake_distribution: Any) -> None:
    fake_distribution("vendor-a", "1.0", algorithms("example"))

    assert load("vendor-a").find("algorithm", "example").load_config() is None


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        ("no_such_module_anywhere:X", "No module named 'no_such_module_anywhere'"),
        ("vendor_a:Missing", "has no attribute 'Missing'"),
        ("vendor_a_exits:X", "sys.exit(1)"),
        ("vendor_a_raises:X", "RuntimeError: no driver"),
    ],
)
def test_a_target_that_cannot_be_imported_is_named_with_its_cause(
    fake_distribution: Any, target: str, cause: str
) -> None:
    site = fake_distribution("vendor-a", "0.3", algorithms("example", target=target, config=target))
    site.joinpath("vendor_a_exits.py").write_text("import sys\nsys.exit(1)\n")
    site.joinpath("vendor_a_raises.py").write_text("raise RuntimeError('no driver')\n")
    component = load("vendor-a").find("algorithm", "example")

    for role, load_it in (("target", component.load_target), ("config", component.load_config)):
        with pytest.raises(PluginError) as caught:
            load_it()
        said = str(caught.value)
        assert "algorithm 'example' of vendor-a 0.3" in said
        assert f"{role} {target!r}" in said
        assert cause in said


def test_no_package_is_guessed_for_kinds_of_which_a_package_holds_several() -> None:
    said = message(load_plugins([]), "reward", "exact")

    assert said == "no reward 'exact' is installed (installed: none). Install the package that provides it."
