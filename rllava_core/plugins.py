"""Find the installed plugins, load them one at a time, keep a bad one from harming the rest, look components up.

A plugin is an entry point of the group `rllava`. It ends as one of

- ok: its components can be looked up and its lifecycle hooks are called;
- incompatible: its distribution requires another version of `rllava-core`; its module is not imported;
- broken: its module, or one of its hooks, does not work; `Plugin.error` says why.

Plugins are loaded in the order of their names, whatever order they were installed in, and of two components of one
kind and name neither wins: the bare name is ambiguous.
"""

from __future__ import annotations

import importlib
import re
import traceback as tracebacks
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import metadata
from importlib.metadata import Distribution, EntryPoint
from typing import Any, Literal

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from rllava_core import hookspecs
from rllava_core.errors import PluginError
from rllava_core.specs import ENTRY_POINT_GROUP, KINDS, ComponentSpec, Kind, PluginInfo

CORE_DISTRIBUTION = "rllava-core"

ENGINE_ROLES = frozenset({"train", "rollout"})
"""Engines of one name that play different roles are different components: a config chooses one for each role."""

KIND_HOOKS: dict[Kind, str] = {kind: f"rllava_{kind}s" for kind in KINDS}

Status = Literal["ok", "incompatible", "broken"]


@dataclass(frozen=True)
class Component:
    """A `ComponentSpec` and the plugin it came from."""

    kind: Kind
    spec: ComponentSpec
    plugin: str
    distribution: str
    version: str

    @property
    def qualified_name(self) -> str:
        """`distribution/name`: what a config writes where the bare name is ambiguous."""
        return f"{self.distribution}/{self.spec.name}"

    def load_target(self) -> Any:
        """Import and return the component's class. Raises PluginError with the cause if that fails."""
        return self._load("target", self.spec.target)

    def load_config(self) -> type[Any] | None:
        """Import and return the component's config model, None if it has none. Raises PluginError as above."""
        return None if self.spec.config is None else self._load("config", self.spec.config)

    def _load(self, role: str, target: str) -> Any:
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:  # isolating a plugin: reported with its name and cause
            owner = f"{self.kind} {self.spec.name!r} of {self.distribution} {self.version}"
            raise PluginError(f"{owner}: loading its {role} {target!r} {_what_happened(error)}") from error


@dataclass(frozen=True)
class Plugin:
    """One entry point and what became of it.

    name, entry_point: the entry point's name and value.
    distribution, version, location: where it came from; the name is normalised, as package indexes do.
    error, traceback: the cause in one line, and where it was raised; None for a plugin that is ok.
    """

    name: str
    distribution: str
    version: str
    entry_point: str
    location: str
    status: Status = "ok"
    error: str | None = None
    traceback: str | None = None
    info: PluginInfo = field(default_factory=PluginInfo)
    components: tuple[Component, ...] = ()

    @property
    def problem(self) -> str:
        """One sentence that names the plugin, its distribution and version, and the cause; for a plugin not ok."""
        return f"plugin {self.name!r} of {self.distribution} {self.version} is {self.status}: {self.error}"


class Registry:
    """What is installed.

    plugins: all of them, those that cannot be used included, sorted by name and distribution.
    hook: pluggy's relay over the plugins that are ok, for the lifecycle hooks.
    """

    def __init__(self, plugins: Iterable[Plugin], manager: pluggy.PluginManager) -> None:
        self.plugins: tuple[Plugin, ...] = tuple(sorted(plugins, key=lambda plugin: (plugin.name, plugin.distribution)))
        self.hook: pluggy.HookRelay = manager.hook

    def components(self, kind: Kind | None = None) -> tuple[Component, ...]:
        """The components of every plugin that is ok, or those of one kind, sorted by kind, name and distribution."""
        found = (item for plugin in self.plugins for item in plugin.components if kind is None or item.kind == kind)
        return tuple(sorted(found, key=lambda c: (c.kind, c.spec.name, c.distribution, sorted(c.spec.provides))))

    def find(self, kind: Kind, name: str, role: str | None = None) -> Component:
        """The one component of this kind that a config calls `name`, bare or as `distribution/name`.

        role: `train` or `rollout`, which the engine must provide.

        Raises PluginError if it is not installed, if the name is ambiguous, or, with the cause, if the plugin that
        seems to have been asked for is broken or incompatible.
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

    def _missing(self, what: str, name: str, candidates: list[Component]) -> PluginError:
        prefix, _, bare = name.rpartition("/")
        distribution = canonicalize_name(prefix or f"rllava-{bare}")
        unusable = [plugin for plugin in self.plugins if plugin.status != "ok"]
        asked_for = [p for p in unusable if p.distribution == distribution or (not prefix and p.name == bare)]
        if asked_for:
            error = PluginError(f"{what} {name!r} cannot be used: {'; '.join(plugin.problem for plugin in asked_for)}")
            for plugin in asked_for:
                error.add_note(plugin.traceback or "")
            return error

        names = sorted({item.qualified_name if prefix else item.spec.name for item in candidates})
        parts = [f"no {what} {name!r} is installed (installed: {', '.join(names) or 'none'})."]
        parts += [f"Did you mean {close!r}?" for close in get_close_matches(name, names, n=1)]
        if unusable:
            parts.append(f"Not loaded: {', '.join(f'{p.distribution} {p.version} ({p.status})' for p in unusable)}.")
        present = distribution in {plugin.distribution for plugin in self.plugins}
        if re.fullmatch(r"[a-z][a-z0-9_-]*", prefix or bare) and not present:
            # Algorithms and model families have packages of their own name; packages of the others hold several.
            named = bool(prefix) or what in ("algorithm", "model")
            parts.append(f"Try: pip install {distribution}" if named else "Install the package that provides it.")
        return PluginError(" ".join(parts))


def load_plugins(entry_points: Iterable[EntryPoint] | None = None) -> Registry:
    """Load every installed plugin, or those of `entry_points`. A plugin that fails is reported, never raised."""
    plugins: list[Plugin] = []
    if entry_points is None:
        entry_points, plugins = _discover()
    manager = pluggy.PluginManager("rllava")
    manager.add_hookspecs(hookspecs)
    described = {_describe(entry.dist, entry.name, entry.value): entry for entry in entry_points}
    for plugin in sorted(described, key=lambda plugin: (plugin.name, plugin.distribution, plugin.entry_point)):
        taken = [item for other in plugins if other.distribution == plugin.distribution for item in other.components]
        plugins.append(_load(plugin, described[plugin], manager, taken))
    return Registry(plugins, manager)


def core_version() -> str | None:
    """The version of `rllava-core` that runs; None where it is not installed as a distribution."""
    try:
        return metadata.version(CORE_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


class _RefusedError(Exception):
    """Why a plugin is not used, in one line; the exception behind it is its `__cause__`."""

    def __init__(self, reason: str, status: Status = "broken") -> None:
        super().__init__(reason)
        self.status: Status = status


def _discover() -> tuple[list[EntryPoint], list[Plugin]]:
    """The entry points of the group, and a broken plugin for each distribution whose entry points cannot be read.

    `importlib.metadata.entry_points` would raise for all distributions because of one.
    """
    found: dict[str, list[EntryPoint]] = {}
    unreadable: list[Plugin] = []
    for distribution in metadata.distributions():
        try:
            with _isolated("reading its entry points"):
                if f"[{ENTRY_POINT_GROUP}]" in (distribution.read_text("entry_points.txt") or ""):
                    name = canonicalize_name(distribution.name)
                    # The name may be on the path twice; this returns the first, which is the one that Python imports.
                    first = metadata.distribution(name)
                    found[name] = list(first.entry_points.select(group=ENTRY_POINT_GROUP))
        except _RefusedError as refusal:
            plugin = _describe(distribution, name="unknown", value="")
            unreadable.append(_refused(replace(plugin, name=plugin.distribution), refusal))
    return [entry_point for entry_points in found.values() for entry_point in entry_points], unreadable


def _describe(distribution: Distribution | None, name: str, value: str) -> Plugin:
    """A plugin as far as metadata tells; one whose entry point has no distribution is named by its package."""
    if distribution is None:
        package = re.split(r"[.:]", value, maxsplit=1)[0]
        return Plugin(name, canonicalize_name(package), "unknown", value, "unknown")
    location = str(distribution.locate_file(""))
    try:
        title, version = canonicalize_name(distribution.metadata["Name"]), distribution.metadata["Version"]
    except Exception:  # noqa: BLE001 - isolating a plugin: what cannot be read is reported as unknown
        return Plugin(name, "unknown", "unknown", value, location)
    return Plugin(name, title, version or "unknown", value, location)


def _load(plugin: Plugin, entry_point: EntryPoint, manager: pluggy.PluginManager, taken: list[Component]) -> Plugin:
    """Carry one plugin from its metadata to its components; register it with `manager` only if all of it works.

    taken: components of other plugins of the same distribution, whose qualified names it must not repeat.
    """
    try:
        _check_compatible(entry_point.dist)
        with _isolated(f"importing {plugin.entry_point!r}"):
            module = entry_point.load()
        if manager.is_registered(module):
            raise _RefusedError(f"its module is already loaded as plugin {manager.get_name(module)!r}")
        trial = _register_alone(module)
        info = _read_info(trial)
        components = _read_components(plugin, trial, taken)
        with _isolated("registering it"):
            manager.register(module, name=f"{plugin.distribution}:{plugin.name}")
    except _RefusedError as refusal:
        return _refused(plugin, refusal)
    return replace(plugin, info=info, components=components)


def _check_compatible(distribution: Distribution | None) -> None:
    """Refuse a distribution that does not accept the running core; where the core's version is unknown, accept."""
    running = core_version()
    if distribution is None or running is None:
        return
    with _isolated("reading its requirements"):
        requirements = [Requirement(line) for line in distribution.requires or ()]
        active = [item for item in requirements if item.marker is None or item.marker.evaluate()]
    # A pre-release of 1.0 implements the contract of 1.0, so a plugin for '>=1,<2' can be tried with it.
    versions = {running, Version(running).base_version}
    for requirement in active:
        accepts = any(requirement.specifier.contains(version, prereleases=True) for version in versions)
        if canonicalize_name(requirement.name) == CORE_DISTRIBUTION and not accepts:
            needed = f"{CORE_DISTRIBUTION}{requirement.specifier}"
            raise _RefusedError(f"it requires {needed}, installed is {CORE_DISTRIBUTION} {running}", "incompatible")


def _register_alone(module: Any) -> pluggy.PluginManager:
    """A manager that holds this plugin only. Refuses hooks that do not exist, have no marker, or are none at all."""
    trial = pluggy.PluginManager("rllava")
    trial.add_hookspecs(hookspecs)
    with _isolated("registering its hooks"):
        trial.register(module)
    known = [name for name in vars(hookspecs) if name.startswith("rllava_")]
    hooks = trial.get_hookcallers(module) or []
    try:
        trial.check_pending()
    except pluggy.PluginValidationError as error:
        pending = [hook for hook in hooks if not hook.has_spec() and not hook.get_hookimpls()[0].optionalhook]
        unknown = pending[0].name
        close = get_close_matches(unknown, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"hooks are {', '.join(known)}"
        raise _RefusedError(f"there is no hook {unknown!r}; {hint}") from error
    marked = {hook.name for hook in hooks}
    for name in known:
        if name not in marked and callable(getattr(module, name, None)):
            raise _RefusedError(f"{name}() is not marked with @rllava_core.hookimpl")
    if not marked:
        raise _RefusedError("it implements no hook: nothing is marked with @rllava_core.hookimpl")
    return trial


def _read_info(trial: pluggy.PluginManager) -> PluginInfo:
    for returned in _call(trial, "rllava_plugin_info"):
        if not isinstance(returned, PluginInfo):
            raise _RefusedError(f"rllava_plugin_info() returned {_a(returned)}, expected a PluginInfo")
        return returned
    return PluginInfo()


def _read_components(plugin: Plugin, trial: pluggy.PluginManager, taken: list[Component]) -> tuple[Component, ...]:
    components: list[Component] = []
    for kind, hook in KIND_HOOKS.items():
        for returned in _call(trial, hook):
            if not isinstance(returned, Iterable):
                raise _RefusedError(f"{hook}() returned {_a(returned)}, expected an iterable of ComponentSpec")
            with _isolated(f"{hook}()"):
                specs = list(returned)
            for spec in specs:
                if not isinstance(spec, ComponentSpec):
                    raise _RefusedError(f"{hook}() returned {_a(returned)} of {_a(spec)}, expected only ComponentSpec")
                component = Component(kind, spec, plugin.name, plugin.distribution, plugin.version)
                for other in (*taken, *components):
                    if _conflict(component, other):
                        where = f" (also in plugin {other.plugin!r})" if other.plugin != plugin.name else ""
                        raise _RefusedError(f"{component.qualified_name!r} is defined twice as {kind}{where}")
                components.append(component)
    return tuple(components)


def _call(trial: pluggy.PluginManager, hook: str) -> Iterator[object]:
    """What the plugin's implementations return, called directly: pluggy would drop a None returned by mistake."""
    for implementation in getattr(trial.hook, hook).get_hookimpls():
        with _isolated(f"{hook}()"):
            returned = implementation.function()
        yield returned


def _conflict(one: Component, other: Component) -> bool:
    same = (one.kind, one.spec.name) == (other.kind, other.spec.name)
    if one.kind == "engine":
        return same and not ENGINE_ROLES.isdisjoint(one.spec.provides & other.spec.provides)
    return same


def _ambiguous(what: str, name: str, found: list[Component]) -> str:
    names = [item.qualified_name for item in found]
    if len(set(names)) < len(names):
        roles = ", ".join(f"{item.qualified_name} ({', '.join(sorted(item.spec.provides))})" for item in found)
        return f"{what} {name!r} plays more than one role: {roles}. Say which role is meant"
    return f"{what} {name!r} is provided by more than one plugin: {', '.join(names)}. Use one of these names"


@contextmanager
def _isolated(action: str) -> Iterator[None]:
    """Whatever a plugin's code raises, `sys.exit` included, becomes the reason why that plugin is refused."""
    try:
        yield
    except (Exception, SystemExit) as error:  # isolating a plugin: reported with its name and cause
        raise _RefusedError(f"{action} {_what_happened(error)}") from error


def _refused(plugin: Plugin, refusal: _RefusedError) -> Plugin:
    cause = refusal.__cause__
    traceback = "".join(tracebacks.format_exception(cause)) if cause else None
    return replace(plugin, status=refusal.status, error=str(refusal), traceback=traceback)


def _what_happened(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r})"
    return " ".join(f"raised {type(error).__name__}: {error}".split())


def _a(value: object) -> str:
    return f"a {type(value).__name__}"
