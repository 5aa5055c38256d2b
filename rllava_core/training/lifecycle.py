"""The lifecycle hooks: plugins that follow a run and must not be able to stop it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rllava_core.config import RunConfig
from rllava_core.errors import describe
from rllava_core.plugins import Implementation
from rllava_core.plugins.isolation import contained


class Lifecycle:
    """Calls `rllava_run_start`, `rllava_step_end` and `rllava_run_end` of each plugin, one after another.

    A plugin whose hook raises, or calls `sys.exit`, is reported with `warn` and detached: none of its hooks is called
    again in this run, which goes on. What a plugin is given is its own copy.

    detached: one line for each plugin that was.
    """

    def __init__(self, implementations: Sequence[Implementation], warn: Callable[[str], None]) -> None:
        self._implementations = list(implementations)
        self._warn = warn
        self.detached: list[str] = []

    def run_start(self, config: RunConfig, run_dir: Path) -> None:
        """A run begins or resumes."""
        self._call("rllava_run_start", {"config": config, "run_dir": run_dir})

    def step_end(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self._call("rllava_step_end", {"step": step, "metrics": metrics})

    def run_end(self, summary: Mapping[str, Any]) -> None:
        """The run ended."""
        self._call("rllava_run_end", {"summary": summary})

    def _call(self, hook: str, arguments: Mapping[str, Any]) -> None:
        for implementation in [item for item in self._implementations if item.hook == hook]:
            if implementation not in self._implementations:  # detached by another of its functions
                continue
            # A copy for each: what a plugin is given it may keep, and cannot change for anybody else.
            own = {name: copy.deepcopy(value) for name, value in arguments.items()}
            try:
                with contained():
                    implementation(own)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 - isolating a plugin: reported by name, with its cause
                self._detach(implementation, error)

    def _detach(self, implementation: Implementation, error: BaseException) -> None:
        owner = (implementation.plugin, implementation.distribution)
        self._implementations = [item for item in self._implementations if (item.plugin, item.distribution) != owner]
        owned = f"plugin {implementation.plugin!r} of {implementation.distribution}: {implementation.hook}()"
        what = f"{owned} {describe(error)}"
        self.detached.append(what)
        self._warn(f"{what}; it is detached and the run goes on")
