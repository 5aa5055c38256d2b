"""Plugins are loaded one at a time; one that fails is named with its cause and harms no other."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
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


def test_a_healthy_plugin_is_ok_and_says_what_it_provides(fake_distribution: Any) -> None:
    site = fake_distribution("rllava-example", "1.2", HEALTHY)

    plugin = plugin_named("example")

    assert (plugin.status, plugin.error, plugin.traceback) == ("ok", None, None)
    assert (plugin.distribution, plugin.version, plugin.entry_point) == ("rllava-example", "1.2", "rllava_example")
    assert Path(plugin.location) == site
    assert plugin.info.summary == "An example."
    [component] = plugin.components
    assert (component.kind, component.spec.name, component.plugin) == ("algorithm", "example", "example")
    assert component.qualified_name == "rllava-example/example"


def test_every_kind_of_component_has_its_hook(fake_distribution: Any) -> None:
    kinds = ["model", "algorithm", "reward", "engine", "environment", "dataset"]
    source = HEADER + "".join(
        f"@hookimpl\ndef rllava_{kind}s():\n    return (ComponentSpec(name='{kind}-one', target='a.b:C'),)\n"
        for kind in kinds
    )
    fake_distribution("rllava-example", "1.0", source)

    assert {(c.kind, c.spec.name) for c in plugin_named("example").components} == {(k, f"{k}-one") for k in kinds}


SPEC = "ComponentSpec(name='x', target='a:B')"

BROKEN = {
    "a missing import": ("import no_such_module_anywhere", ["ModuleNotFoundError", "no_such_module_anywhere"]),
    "a syntax error": ("def broken(:\n", ["SyntaxError", "rllava_example"]),
    "an exit while it is imported": ("import sys\nsys.exit(3)", ["importing 'rllava_example'", "sys.exit(3)"]),
    "an exception that is no Exception": (
        "class Panic(BaseException): pass\nraise Panic('in Rust')",
        ["importing 'rllava_example'", "Panic: in Rust"],
    ),
    "a hook that raises": (
        HEADER + "@hookimpl\ndef rllava_rewards():\n    raise KeyError('oops')",
        ["rllava_rewards()", "KeyError", "oops"],
    ),
    "a generator hook that raises": (
        HEADER + f"@hookimpl\ndef rllava_rewards():\n    yield {SPEC}\n    raise KeyError('oops')",
        ["rllava_rewards()", "KeyError"],
    ),
    "a hook that exits": (
        HEADER + "import sys\n@hookimpl\ndef rllava_models():\n    sys.exit('bye')",
        ["rllava_models()", "sys.exit('bye')"],
    ),
    "a misspelt hook": (
        HEADER + "@hookimpl\ndef rllava_algoritms():\n    return []",
        ["'rllava_algoritms'", "did you mean 'rllava_algorithms'"],
    ),
    "an unknown hook": (HEADER + "@hookimpl\ndef frobnicate():\n    return []", ["'frobnicate'", "rllava_models"]),
    "a lifecycle hook with an unknown argument": (
        HEADER + "@hookimpl\ndef rllava_step_end(step, loss):\n    pass",
        ["rllava_step_end", "loss"],
    ),
    "a hook without its marker": (
        HEADER + "@hookimpl\ndef rllava_models():\n    return []\ndef rllava_rewards():\n    return []",
        ["rllava_rewards()", "hookimpl"],
    ),
    "no hook at all": ("x = 1", ["no hook", "hookimpl"]),
    "an exception that cannot be shown": (
        "class E(Exception):\n    def __str__(self): return self.nope\nraise E()",
        ["importing 'rllava_example'", "raised E: (its message cannot be shown)"],
    ),
    "an exception with half a surrogate pair and an escape": (
        "raise ValueError('f \\udcff \\x1b[31m')",
        ["ValueError", "\\udcff", "\\x1b[31m"],
    ),
    "a module whose __getattr__ raises": (
        HEADER + f"@hookimpl\ndef rllava_rewards():\n    return [{SPEC}]\ndef __getattr__(name): return {{}}[name]",
        ["reading what it provides", "KeyError"],
    ),
    "an object whose class raises": (
        HEADER + "class Proxy:\n    @property\n    def __class__(self): raise RuntimeError('unbound')\n"
        "@hookimpl\ndef rllava_rewards():\n    return [Proxy()]",
        ["rllava_rewards()", "Proxy"],
    ),
    "a summary that is no text": (
        HEADER + "@hookimpl\ndef rllava_plugin_info():\n    return PluginInfo(summary=b'bytes')",
        ["rllava_plugin_info()", "summary of the plugin: expected text"],
    ),
    "a component's summary that is no text": (
        HEADER + "@hookimpl\ndef rllava_rewards():\n"
        "    return [ComponentSpec(name='x', target='a:B', summary=object())]",
        ["summary of component 'x': expected text"],
    ),
    "a spec of a class of its own": (
        HEADER + "class Mine(ComponentSpec):\n    def __post_init__(self): pass\n"
        "@hookimpl\ndef rllava_rewards():\n    return [Mine(name=None, target='a:B')]",
        ["rllava_rewards()", "Mine", "only ComponentSpec"],
    ),
    "an async hook": (
        HEADER + "@hookimpl\nasync def rllava_run_end(summary):\n    pass",
        ["rllava_run_end()", "async"],
    ),
    "a lifecycle hook that is a generator": (
        HEADER + "@hookimpl\ndef rllava_run_end(summary):\n    yield",
        ["rllava_run_end()", "generator"],
    ),
    "a lifecycle hook with a default": (
        HEADER + "@hookimpl\ndef rllava_step_end(step, metrics=None):\n    pass",
        ["rllava_step_end()", "metrics", "would never be given"],
    ),
    "a lifecycle hook with keyword-only arguments": (
        HEADER + "@hookimpl\ndef rllava_step_end(*, step):\n    pass",
        ["rllava_step_end()", "step", "keyword-only"],
    ),
    "a hook wrapper": (
        "import pluggy\n@pluggy.HookimplMarker('rllava')(wrapper=True)\ndef rllava_rewards():\n    return (yield)",
        ["rllava_rewards()", "wrapper"],
    ),
    "a hook that returns None": (
        HEADER + "@hookimpl\ndef rllava_datasets():\n    pass",
        ["rllava_datasets()", "NoneType", "iterable of ComponentSpec"],
    ),
    "a hook that returns one spec": (
        HEADER + f"@hookimpl\ndef rllava_datasets():\n    return {SPEC}",
        ["rllava_datasets()", "iterable of ComponentSpec"],
    ),
    "a hook that returns strings": (
        HEADER + "@hookimpl\ndef rllava_datasets():\n    return ['x']",
        ["rllava_datasets()", "list of a str", "ComponentSpec"],
    ),
    "info that is no PluginInfo": (
        HEADER + "@hookimpl\ndef rllava_plugin_info():\n    return 'nice'",
        ["rllava_plugin_info()", "a str", "PluginInfo"],
    ),
    "a component name of the wrong form": (algorithm_plugin("Not A Name"), ["rllava_algorithms()", "'Not A Name'"]),
    "the same component twice": (
        HEADER + f"@hookimpl\ndef rllava_models():\n    return [{SPEC}, {SPEC}]",
        ["rllava-example/x", "twice", "model"],
    ),
    "the same engine role twice": (
        HEADER
        + "@hookimpl\ndef rllava_engines():\n"
        + "    return [ComponentSpec(name='x', target='a:B', provides={'train'}) for _ in 'ab']",
        ["rllava-example/x", "twice", "engine"],
    ),
}


@pytest.mark.parametrize(("source", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_plugin_is_named_with_its_cause_and_the_rest_work(
    fake_distribution: Any, source: str, words: list[str]
) -> None:
    fake_distribution("rllava-example", "0.3", source)
    fake_distribution("rllava-other", "1.0", algorithm_plugin("other"))

    registry = load_plugins()

    [plugin] = [plugin for plugin in registry.plugins if plugin.name == "example"]
    assert plugin.status == "broken"
    assert plugin.error is not None
    assert "\n" not in plugin.error
    assert all(word in plugin.error for word in words), plugin.error
    assert plugin.components == ()
    assert registry.find("algorithm", "other").distribution == "rllava-other"


def test_a_broken_plugin_keeps_the_traceback_of_its_cause(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "0.3", "def first():\n    1 / 0\nfirst()\n")

    traceback = plugin_named("example").traceback

    assert traceback is not None
    assert "rllava_example.py" in traceback
    assert "ZeroDivisionError" in traceback


def test_an_interrupt_is_not_taken_for_a_broken_plugin(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "0.3", "raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        load_plugins()


def test_what_a_plugin_prints_while_it_is_loaded_goes_to_stderr(fake_distribution: Any, capsys: Any) -> None:
    hook = "@hookimpl\ndef rllava_models():\n    print('two')\n    return []\n"
    fake_distribution("rllava-example", "1.0", HEADER + "print('one')\n" + hook)

    assert plugin_named("example").status == "ok"
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "one\ntwo\n")


def test_a_plugin_says_which_hooks_it_implements_and_how_long_it_took(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "1.0", "import time\ntime.sleep(0.05)\n" + HEALTHY)

    plugin = plugin_named("example")

    assert plugin.hooks == ("rllava_plugin_info", "rllava_algorithms")
    assert plugin.load_seconds is not None
    assert 0.05 <= plugin.load_seconds < 5


def test_hooks_of_a_broken_plugin_are_not_called(fake_distribution: Any) -> None:
    lifecycle = "@hookimpl\ndef rllava_run_end(summary):\n    summary['called'].append(__name__)\n"
    fake_distribution("rllava-example", "1.0", HEADER + lifecycle + "@hookimpl\ndef rllava_models():\n    1 / 0\n")
    fake_distribution("rllava-other", "1.0", HEADER + lifecycle)
    called: list[str] = []

    for implementation in load_plugins().lifecycle:
        implementation({"summary": {"called": called}})

    assert called == ["rllava_other"]


def test_a_plugin_that_changes_the_current_folder_does_not_change_it_for_others(
    fake_distribution: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_distribution("rllava-example", "0.3", "import os\nos.chdir('/')\n" + HEALTHY)

    assert plugin_named("example").status == "ok"
    assert Path.cwd() == tmp_path


def test_capabilities_may_come_from_a_generator(fake_distribution: Any) -> None:
    source = (
        HEADER
        + "@hookimpl\ndef rllava_rewards():\n"
        + "    return [ComponentSpec(name='x', target='a:B', needs=(c for c in 'ab'))]"
    )
    fake_distribution("rllava-example", "0.3", source)

    [component] = plugin_named("example").components
    assert component.spec.needs == {"a", "b"}


def test_entry_points_may_be_given_without_a_distribution(fake_distribution: Any) -> None:
    fake_distribution("rllava-example", "1.0", HEALTHY, entry_points={})

    registry = load_plugins([EntryPoint("anything", "rllava_example", "rllava")])

    [plugin] = registry.plugins
    assert (plugin.status, plugin.distribution, plugin.version) == ("ok", "rllava-example", "unknown")


def test_plugins_are_sorted_by_name_whatever_the_order_given(fake_distribution: Any) -> None:
    names = ["rllava-b", "rllava-c", "rllava-a"]
    for name in names:
        fake_distribution(name, "1.0", algorithm_plugin(name))
    entry_points = [EntryPoint(name, name.replace("-", "_"), "rllava") for name in names]

    assert [plugin.name for plugin in load_plugins(entry_points).plugins] == sorted(names)
    assert [plugin.name for plugin in load_plugins(entry_points[::-1]).plugins] == sorted(names)


def test_the_core_registers_its_own_components_like_any_plugin() -> None:
    registry = load_plugins([EntryPoint("core", "rllava_core.builtin", "rllava")])

    assert [plugin.status for plugin in registry.plugins] == ["ok"]
    assert [(c.kind, c.spec.name, sorted(c.spec.provides)) for c in registry.components()] == [
        ("engine", "local", ["action_values", "logprobs", "rollout"]),
        ("engine", "local", ["train"]),
        ("environment", "single_turn", []),
        ("model", "hosted", []),
    ]
