"""Names that more than one plugin uses: all who use one are marked, and none wins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rllava_core.plugins.records import Component, Plugin


def mark_conflicts(plugins: Sequence[Plugin]) -> list[Plugin]:
    """The same plugins; those of them that can be used and share a name with another have the status `conflict`."""
    return [_marked(plugin, plugins) for plugin in plugins]


def _marked(plugin: Plugin, plugins: Sequence[Plugin]) -> Plugin:
    if not plugin.usable:
        return plugin
    others = [other for other in plugins if other is not plugin and other.usable]
    problems = [
        *([plugin.error] if plugin.error else []),
        *_same_plugin_name(plugin, others),
        *_same_module(plugin, others),
        *_same_components(plugin, others),
    ]
    return replace(plugin, status="conflict", error="; ".join(problems)) if problems else plugin


def _same_plugin_name(plugin: Plugin, others: Iterable[Plugin]) -> list[str]:
    owners = sorted({other.distribution for other in others if other.name == plugin.name})
    return [f"{' and '.join(owners)} has a plugin of this name too"] if owners else []


def _same_module(plugin: Plugin, others: Iterable[Plugin]) -> list[str]:
    twins = sorted(f"{other.name!r} of {other.distribution}" for other in others if _same_entry(other, plugin))
    return [f"its module is also that of plugin {' and '.join(twins)}"] if twins else []


def _same_components(plugin: Plugin, others: Sequence[Plugin]) -> list[str]:
    problems = []
    for component in plugin.components:
        owners = [other for other in others if any(component.same_name(item) for item in other.components)]
        if owners:
            problems.append(f"{component.kind} {component.spec.name!r} {_remedy(component, owners)}")
    return problems


def _remedy(component: Component, owners: Sequence[Plugin]) -> str:
    inside = sorted(repr(owner.name) for owner in owners if owner.distribution == component.distribution)
    if inside:  # its qualified name is no clearer than the bare one
        return f"is also that of plugin {' and '.join(inside)} of the same distribution"
    names = " and ".join(sorted({owner.distribution for owner in owners}))
    return f"is also provided by {names}: a config must write {component.qualified_name!r}"


def _same_entry(one: Plugin, other: Plugin) -> bool:
    return one.entry_point == other.entry_point
