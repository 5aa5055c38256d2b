"""What is installed, and the one place where a component is looked up by the name that a config writes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import pluggy
from packaging.utils import canonicalize_name

from rllava_core.errors import PluginError
from rllava_core.plugins.records import Component, Plugin
from rllava_core.specs import Kind


@dataclass(frozen=True)
class Implementation:
    """A plugin's function for one lifecycle hook."""

    plugin: str
    distribution: str
    hook: str
    function: pluggy.HookImpl

    def __call__(self, arguments: Mapping[str, Any]) -> None:
        """Call it with those of the hook's arguments that it names."""
        self.function.function(*(arguments[name] for name in self.function.argnames))


class Registry:
    """What is installed.

    plugins: all of them, those that cannot be used included, sorted by name and distribution.
    lifecycle: the lifecycle hooks of those that can, in the same order.
    warnings: what the user should know of the selection of plugins.
    disabled: the names, of plugins or distributions, that the environment says not to load.
    """

    def __init__(
        self,
        plugins: Iterable[Plugin],
        lifecycle: Iterable[Implementation] = (),
        warnings: Iterable[str] = (),
        disabled: Iterable[str] = (),
    ) -> None:
        self.plugins: tuple[Plugin, ...] = tuple(sorted(plugins, key=lambda plugin: (plugin.name, plugin.distribution)))
        self.lifecycle = tuple(lifecycle)
        self.warnings = tuple(warnings)
        self.disabled = tuple(disabled)

    def components(self, kind: Kind | None = None) -> tuple[Component, ...]:
        """The components of every plugin that can be used, or those of one kind, sorted by kind and name."""
        found = (item for plugin in self.plugins for item in plugin.components if kind is None or item.kind == kind)
        return tuple(sorted(found, key=lambda c: (c.kind, c.spec.name, c.distribution, sorted(c.spec.provides))))

    def is_disabled(self, distribution: str) -> bool:
        """Whether the environment keeps a distribution, or some of its plugins, out, installed or not."""
        owned = [plugin for plugin in self.plugins if plugin.distribution == distribution]
        if owned:
            return any(plugin.status == "disabled" for plugin in owned)
        return distribution in {canonicalize_name(name) for name in self.disabled}

    def find(self, kind: Kind, name: str, role: str | None = None) -> Component:
        """The one component of this kind that a config calls `name`, bare or as `distribution/name`.

        role: `train` or `rollout`, which the engine must provide.

        Raises PluginError if it is not installed, if the name is ambiguous, or, with the cause, if the plugin that
        seems to have been asked for cannot be used.
        """
        candidates = [item for item in self.components(kind) if role is None or role in item.spec.provides]
        distribution, _, bare = name.rpartition("/")
        wanted = canonicalize_name(distribution)
        found = [item for item in candidates if item.spec.name == bare and wanted in ("", item.distribution)]
        if len(found) == 1:
            return found[0]
        what = f"{role} {kind}" if role else kind
        if found:
            raise PluginError(_ambiguous(what, name, found))
        raise self._missing(what, name, candidates)

    def _missing(self, what: str, name: str, candidates: Sequence[Component]) -> PluginError:
        prefix, _, bare = name.rpartition("/")
        distribution = canonicalize_name(prefix or f"rllava-{bare}")
        unusable = [plugin for plugin in self.plugins if not plugin.usable]
        asked_for = [p for p in unusable if p.distribution == distribution or (not prefix and p.name == bare)]
        if asked_for:
            return _with_tracebacks(f"{what} {name!r} cannot be used: {_problems(asked_for)}", asked_for)

        names = sorted({item.qualified_name if prefix else item.spec.name for item in candidates})
        parts = [f"no {what} {name!r} is installed (installed: {', '.join(names) or 'none'})."]
        parts += [f"Did you mean {close!r}?" for close in get_close_matches(name, names, n=1)]
        present = distribution in {plugin.distribution for plugin in self.plugins}
        if re.fullmatch(r"[a-z][a-z0-9_-]*", prefix or bare) and not present:
            # Algorithms and model families have packages of their own name; packages of the others hold several.
            named = bool(prefix) or what in ("algorithm", "model")
            parts.append(f"Try: pip install {distribution}" if named else "Install the package that provides it.")
        if unusable:
            # Any of them may be the one that provides it.
            parts.append(f"Not loaded: {_problems(unusable)}")
        return _with_tracebacks(" ".join(parts), unusable)


def _problems(plugins: Sequence[Plugin]) -> str:
    return "; ".join(plugin.problem for plugin in plugins)


def _with_tracebacks(message: str, plugins: Sequence[Plugin]) -> PluginError:
    error = PluginError(message)
    for plugin in plugins:
        if plugin.traceback:
            error.add_note(plugin.traceback)
    return error


def _ambiguous(what: str, name: str, found: Sequence[Component]) -> str:
    names = sorted({item.qualified_name for item in found})
    if len(names) == len(found):
        return f"{what} {name!r} is provided by more than one plugin: {', '.join(names)}. Use one of these names"
    if len({item.plugin for item in found}) > 1:
        plugins = ", ".join(repr(item.plugin) for item in found)
        return (
            f"{what} {name!r} is provided by more than one plugin of one distribution: {plugins} of "
            f"{found[0].distribution}. Disable all but one: RLLAVA_DISABLE_PLUGINS={found[-1].plugin}"
        )
    roles = ", ".join(f"{item.qualified_name} ({', '.join(sorted(item.spec.provides))})" for item in found)
    return f"{what} {name!r} plays more than one role: {roles}. Say which role is meant"
