"""What is known of a plugin and of a component: plain records."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Literal

from rllava_core.errors import PluginError, what_happened
from rllava_core.specs import ComponentSpec, Kind, PluginInfo

ENGINE_ROLES = frozenset({"train", "rollout"})
"""Engines of one name that play different roles are different components: a config chooses one for each role."""

Status = Literal["ok", "conflict", "disabled", "incompatible", "broken", "unloaded"]
"""As the package's docstring says; unloaded: nobody tried, as `rllava plugins --no-load` asks."""


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

    @property
    def roles(self) -> frozenset[str]:
        """Of an engine: what it can be chosen for."""
        return self.spec.provides & ENGINE_ROLES if self.kind == "engine" else frozenset()

    def same_name(self, other: Component) -> bool:
        """Whether a config that writes the bare name could mean either."""
        same = (self.kind, self.spec.name) == (other.kind, other.spec.name)
        return same and (self.kind != "engine" or not self.roles.isdisjoint(other.roles))

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
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # as in isolation.py
            owner = f"{self.kind} {self.spec.name!r} of {self.distribution} {self.version}"
            raise PluginError(f"{owner}: loading its {role} {target!r} {what_happened(error)}") from error


@dataclass(frozen=True)
class Plugin:
    """One entry point and what became of it.

    name, entry_point: the entry point's name and value.
    distribution, version, location: where it came from; the name is normalised, as package indexes do.
    hook_api: the versions of the hook specifications that its distribution accepts, such as `1`; None if unsaid.
    editable: installed from a source tree that is imported in place.
    shadowed: further installations of the same distribution that Python does not import, as `version in directory`.
    error, traceback: the cause in one line, and where it was raised; None for a plugin that is ok.
    hooks: names of the hooks that it implements.
    load_seconds: what importing it and calling its hooks took; None if it was not imported.
    """

    name: str
    distribution: str
    version: str
    entry_point: str
    location: str
    hook_api: str | None = None
    editable: bool = False
    shadowed: tuple[str, ...] = ()
    status: Status = "ok"
    error: str | None = None
    traceback: str | None = None
    info: PluginInfo = field(default_factory=PluginInfo)
    hooks: tuple[str, ...] = ()
    load_seconds: float | None = None
    components: tuple[Component, ...] = ()

    @property
    def identity(self) -> tuple[str, str, str]:
        """Distribution, name and value of the entry point: no two plugins share all three."""
        return self.distribution, self.name, self.entry_point

    @property
    def usable(self) -> bool:
        """Whether its components can be looked up and its lifecycle hooks are called."""
        return self.status in ("ok", "conflict")

    @property
    def problem(self) -> str:
        """One sentence that names the plugin, its distribution and version, and the cause; for a plugin not ok."""
        state = "in conflict" if self.status == "conflict" else self.status
        # Where a distribution cannot say its name, its place is all there is to find it by.
        owner = f"{self.distribution} {self.version}" if self.distribution != "unknown" else self.location
        return f"plugin {self.name!r} of {owner} is {state}: {self.error}"
