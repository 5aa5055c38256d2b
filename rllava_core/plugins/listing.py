"""What is installed as plain data, for programs: `rllava plugins --json`.

The object has

- schema: 1; a key is never given another meaning nor taken away without raising it, keys may be added;
- core_version: of `rllava-core`, null where it is not installed as a distribution; hook_api: of the contract;
- warnings: what is odd about the environment's choice of plugins;
- plugins: a list, sorted by name and distribution, of objects with
  - name, entry_point: of the entry point, its name and its value;
  - distribution, version, location, editable: where it came from;
  - shadowed: other installations of the distribution, which Python does not import;
  - hook_api: the versions of the contract that it accepts (`1`), null if it requires no `rllava-core`;
  - status: ok, conflict, disabled, incompatible, broken, or, with `--no-load`, unloaded;
  - error: why the status is not ok, null if it is;
  - summary, homepage: what the plugin says of itself;
  - hooks: the names of those that it implements; load_seconds: null if it was not imported;
  - components: a list, sorted by kind and name, of objects with kind, name, qualified_name, summary, target, config
    (null if it has no options), provides, needs.
"""

from __future__ import annotations

from typing import Any

from rllava_core.plugins.discovery import core_version
from rllava_core.plugins.records import Component, Plugin
from rllava_core.plugins.registry import Registry
from rllava_core.specs import HOOK_API, Kind

SCHEMA = 1


def listing(registry: Registry, kind: Kind | None = None) -> dict[str, Any]:
    """As the module's docstring says.

    kind: only components of this kind, and only plugins that have such or that cannot be used.
    """
    return {
        "schema": SCHEMA,
        "core_version": core_version(),
        "hook_api": HOOK_API,
        "warnings": list(registry.warnings),
        "plugins": [_plugin(plugin, kind) for plugin in plugins_with(registry, kind)],
    }


def plugins_with(registry: Registry, kind: Kind | None) -> list[Plugin]:
    """The plugins that have components of this kind, and those that cannot be used, for they might; None: all."""
    return [plugin for plugin in registry.plugins if not plugin.usable or kind is None or components_of(plugin, kind)]


def components_of(plugin: Plugin, kind: Kind | None) -> list[Component]:
    """A plugin's components of this kind, or all, sorted by kind and name."""
    own = [component for component in plugin.components if kind is None or component.kind == kind]
    return sorted(own, key=lambda item: (item.kind, item.spec.name, sorted(item.spec.provides)))


def _plugin(plugin: Plugin, kind: Kind | None) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "entry_point": plugin.entry_point,
        "location": plugin.location,
        "editable": plugin.editable,
        "shadowed": list(plugin.shadowed),
        "hook_api": plugin.hook_api,
        "status": plugin.status,
        "error": plugin.error,
        "summary": plugin.info.summary,
        "homepage": plugin.info.homepage,
        "hooks": list(plugin.hooks),
        "load_seconds": None if plugin.load_seconds is None else round(plugin.load_seconds, 4),
        "components": [_component(component) for component in components_of(plugin, kind)],
    }


def _component(component: Component) -> dict[str, Any]:
    spec = component.spec
    return {
        "kind": component.kind,
        "name": spec.name,
        "qualified_name": component.qualified_name,
        "summary": spec.summary,
        "target": spec.target,
        "config": spec.config,
        "provides": sorted(spec.provides),
        "needs": sorted(spec.needs),
    }
