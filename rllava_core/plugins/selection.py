"""Which plugins the environment wants loaded.

RLLAVA_PLUGINS=a,b          load only these, beside the core's own; empty: none beside it. A name that is not installed
                            is an error.
RLLAVA_DISABLE_PLUGINS=a,b  do not load these, whatever else is said.
RLLAVA_STRICT_PLUGINS=1     a plugin that is broken, incompatible or in conflict is an error, whether or not it is used.

A plugin is named by its entry point or by its distribution; the name of a distribution stands for all its plugins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from packaging.utils import canonicalize_name

from rllava_core.errors import PluginError
from rllava_core.plugins.discovery import CORE_DISTRIBUTION
from rllava_core.plugins.records import Plugin

ALLOW = "RLLAVA_PLUGINS"
DISABLE = "RLLAVA_DISABLE_PLUGINS"
STRICT = "RLLAVA_STRICT_PLUGINS"


@dataclass(frozen=True)
class Selection:
    """What the environment says; None for a list that it does not hold."""

    allowed: tuple[str, ...] | None
    disabled: tuple[str, ...]
    strict: bool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Selection:
        """Read the three variables. Raises PluginError for a value that means nothing."""
        values = os.environ if environment is None else environment
        strict = values.get(STRICT, "").strip()
        if strict not in ("", "0", "1"):
            raise PluginError(f"{STRICT} is {strict!r}: set it to 1 or 0")
        allowed = _names(values[ALLOW]) if ALLOW in values else None
        return cls(allowed, _names(values.get(DISABLE, "")), strict == "1")

    def check(self, installed: Sequence[Plugin]) -> list[str]:
        """What to warn of. Raises PluginError for a name that is unknown to RLLAVA_PLUGINS, or ambiguous."""
        warnings = []
        for variable, names in ((ALLOW, self.allowed or ()), (DISABLE, self.disabled)):
            for name in names:
                distributions = {plugin.distribution for plugin in installed if is_called(plugin, name)}
                if len(distributions) > 1:
                    listed = ", ".join(sorted(distributions))
                    raise PluginError(f"{variable}: {name!r} is a plugin of {listed}; name the distribution instead")
                if not distributions:
                    problem = f"{variable} names {name!r}, which is not installed{_hint(name, installed)}"
                    if variable == ALLOW:
                        raise PluginError(problem)
                    # A plugin that is not there is not loaded, as was asked; but it may be a slip of the pen.
                    warnings.append(problem)
        return warnings

    def reason_to_skip(self, plugin: Plugin) -> str | None:
        """Why a plugin is not to be loaded; None if it is."""
        if any(is_called(plugin, name) for name in self.disabled):
            return f"listed in {DISABLE}"
        if self.allowed is None or plugin.distribution == CORE_DISTRIBUTION:
            return None
        return None if any(is_called(plugin, name) for name in self.allowed) else f"not listed in {ALLOW}"


def is_called(plugin: Plugin, name: str) -> bool:
    """Whether a name means this plugin: its own, or its distribution's however that is spelt."""
    return name == plugin.name or canonicalize_name(name) == plugin.distribution


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _hint(name: str, installed: Sequence[Plugin]) -> str:
    known = sorted({plugin.name for plugin in installed} | {plugin.distribution for plugin in installed})
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f" (installed: {', '.join(known)})"
