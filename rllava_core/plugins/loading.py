"""From entry points to a registry: each plugin is imported and asked on its own, and refused on its own."""

from __future__ import annotations

import inspect
import time
import traceback as tracebacks
from collections.abc import Iterable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from importlib.metadata import EntryPoint
from typing import Any

import pluggy

from rllava_core import hookspecs
from rllava_core.errors import PluginError
from rllava_core.plugins.conflicts import mark_conflicts
from rllava_core.plugins.discovery import Found, core_version, describe, discover
from rllava_core.plugins.isolation import RefusedError, isolated
from rllava_core.plugins.records import Component, Plugin
from rllava_core.plugins.registry import Implementation, Registry
from rllava_core.plugins.selection import Selection
from rllava_core.specs import KINDS, ComponentSpec, Kind, PluginInfo

KIND_HOOKS: dict[Kind, str] = {kind: f"rllava_{kind}s" for kind in KINDS}
HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("rllava_"))
LIFECYCLE_HOOKS = ("rllava_run_start", "rllava_step_end", "rllava_run_end")


def load_plugins(
    entry_points: Iterable[EntryPoint] | None = None, *, strict: bool | None = None, load: bool = True
) -> Registry:
    """Load every installed plugin that the environment does not exclude, or those of `entry_points`.

    strict: raise for any plugin that is not ok or disabled; None: as RLLAVA_STRICT_PLUGINS says.
    load: off to import nothing and go by metadata alone.

    A plugin that fails is reported, never raised. Raises PluginError for an environment variable that names no plugin,
    and where strict.
    """
    selection = Selection.from_environment()
    if entry_points is None:
        found = discover()
    else:
        running = core_version()
        found = [describe(entry_point, running) for entry_point in entry_points]
    warnings = selection.check([item.plugin for item in found])
    plugins: list[Plugin] = []
    implementations: list[Implementation] = []
    seen: set[int] = set()
    for item in sorted(found, key=lambda item: (item.plugin.name, item.plugin.distribution, item.plugin.entry_point)):
        reason = selection.reason_to_skip(item.plugin)
        if reason is not None:
            plugins.append(replace(item.plugin, status="disabled", error=reason))
            continue
        plugin, hooks, module = _load(item, load)
        plugins.append(plugin)
        # A module that two entry points name is still called once.
        if id(module) not in seen:
            implementations += [Implementation(plugin.name, plugin.distribution, name, call) for name, call in hooks]
        seen.add(id(module))
    registry = Registry(mark_conflicts(plugins), implementations, warnings, selection.disabled)
    if selection.strict if strict is None else strict:
        raise_problems(registry)
    return registry


def raise_problems(registry: Registry) -> None:
    """Raise PluginError for every plugin that is neither ok nor disabled; nothing if there is none."""
    problems = [plugin for plugin in registry.plugins if plugin.status in ("broken", "incompatible", "conflict")]
    if problems:
        listed = "\n".join(plugin.problem for plugin in problems)
        raise PluginError(f"RLLAVA_STRICT_PLUGINS=1, and not every plugin is ok:\n{listed}")


def load_alone(item: Found) -> Plugin:
    """Load one plugin into nothing, to see what becomes of it."""
    return _load(item, load=True)[0]


Hooks = list[tuple[str, pluggy.HookImpl]]


def _load(item: Found, load: bool) -> tuple[Plugin, Hooks, object]:
    """Carry one plugin from its metadata to its components. Returns its lifecycle hooks and its module beside it."""
    plugin, entry_point = item.plugin, item.entry_point
    try:
        if item.refusal is not None:
            raise item.refusal
        assert entry_point is not None
        if not load:
            return replace(plugin, status="unloaded"), [], None
        began = time.perf_counter()
        with isolated(f"importing {plugin.entry_point!r}"):
            module = entry_point.load()
        # Whatever is touched here is the plugin's, and may do anything.
        with isolated("reading what it provides"):
            trial = _register_alone(module)
            info = _read_info(trial)
            components = _read_components(plugin, trial)
        seconds = time.perf_counter() - began
    except RefusedError as refusal:
        cause = refusal.__cause__
        traceback = "".join(tracebacks.format_exception(cause)) if cause else None
        traceback = traceback and traceback.encode("utf-8", "backslashreplace").decode()
        return replace(plugin, status=refusal.status, error=str(refusal), traceback=traceback), [], None
    names = tuple(name for name in HOOKS if getattr(trial.hook, name).get_hookimpls())
    plugin = replace(plugin, info=info, hooks=names, load_seconds=seconds, components=components)
    if item.alike:
        again = f"{plugin.location} holds it more than once (also {', '.join(item.alike)}); install it again"
        plugin = replace(plugin, error=again)
    hooks = [(name, hook) for name in LIFECYCLE_HOOKS for hook in getattr(trial.hook, name).get_hookimpls()]
    return plugin, hooks, module


def _register_alone(module: Any) -> pluggy.PluginManager:
    """A manager that holds this plugin only. Refuses hooks that do not exist, have no marker, or are none at all."""
    trial = pluggy.PluginManager("rllava")
    trial.add_hookspecs(hookspecs)
    with isolated("registering its hooks"):
        trial.register(module)
    hooks = trial.get_hookcallers(module) or []
    try:
        trial.check_pending()
    except pluggy.PluginValidationError:
        pending = [hook for hook in hooks if not hook.has_spec() and not hook.get_hookimpls()[0].optionalhook]
        unknown = pending[0].name
        close = get_close_matches(unknown, HOOKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"hooks are {', '.join(HOOKS)}"
        raise RefusedError(f"there is no hook {unknown!r}; {hint}") from None
    marked = {hook.name for hook in hooks}
    for name in HOOKS:
        if name not in marked and callable(getattr(module, name, None)):
            raise RefusedError(f"{name}() is not marked with @rllava_core.hookimpl")
    if not marked:
        raise RefusedError("it implements no hook: nothing is marked with @rllava_core.hookimpl")
    for hook in hooks:
        for implementation in hook.get_hookimpls():
            _check_function(hook.name, implementation)
    return trial


def _check_function(hook: str, implementation: pluggy.HookImpl) -> None:
    """Refuse functions that could never do what their hook is for."""
    function = implementation.function
    if implementation.wrapper or implementation.hookwrapper:
        raise RefusedError(f"{hook}() is a hook wrapper, which could change what other plugins return")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise RefusedError(f"{hook}() is async; hooks are called and not awaited")
    if hook not in LIFECYCLE_HOOKS:
        return
    if inspect.isgeneratorfunction(function):
        raise RefusedError(f"{hook}() is a generator, whose body would never run")
    wanted = inspect.signature(function).parameters.values()
    optional = [item.name for item in wanted if item.default is not item.empty or item.kind is item.KEYWORD_ONLY]
    if optional:
        raise RefusedError(f"{hook}() has {', '.join(optional)} as optional or keyword-only: it would never be given")


def _read_info(trial: pluggy.PluginManager) -> PluginInfo:
    for returned in _call(trial, "rllava_plugin_info"):
        if not isinstance(returned, PluginInfo):
            raise RefusedError(f"rllava_plugin_info() returned {_a(returned)}, expected a PluginInfo")
        return returned
    return PluginInfo()


def _read_components(plugin: Plugin, trial: pluggy.PluginManager) -> tuple[Component, ...]:
    components: list[Component] = []
    for kind, hook in KIND_HOOKS.items():
        for returned in _call(trial, hook):
            if not isinstance(returned, Iterable):
                raise RefusedError(f"{hook}() returned {_a(returned)}, expected an iterable of ComponentSpec")
            with isolated(f"{hook}()"):
                specs = list(returned)
            for spec in specs:
                if type(spec) is not ComponentSpec:
                    raise RefusedError(f"{hook}() returned {_a(returned)} of {_a(spec)}, expected only ComponentSpec")
                component = Component(kind, spec, plugin.name, plugin.distribution, plugin.version)
                if any(component.same_name(other) for other in components):
                    raise RefusedError(f"{component.qualified_name!r} is defined twice as {kind}")
                components.append(component)
    return tuple(components)


def _call(trial: pluggy.PluginManager, hook: str) -> Iterator[object]:
    """What the plugin's implementations return, called directly: pluggy would drop a None returned by mistake."""
    for implementation in getattr(trial.hook, hook).get_hookimpls():
        with isolated(f"{hook}()"):
            returned = implementation.function()
        yield returned


def _a(value: object) -> str:
    return f"a {type(value).__name__}"
