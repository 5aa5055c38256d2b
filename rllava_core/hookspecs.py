"""The contract, on one page: every hook that a plugin may implement.

A plugin is a module of functions marked with `rllava_core.hookimpl`, named by an entry point of the group `rllava`.
The module imports neither torch nor transformers. The kind hooks are called once, right after the module is imported,
and return `ComponentSpec`s; the order in which plugins are called never decides anything.

The lifecycle hooks follow a training run. A hook names the arguments that it wants, in any order, and can change none
of them. A plugin whose lifecycle hook raises is reported and detached, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from rllava_core.specs import ComponentSpec, PluginInfo

if TYPE_CHECKING:
    from pathlib import Path

    from rllava_core.config import RunConfig

hookspec = pluggy.HookspecMarker("rllava")


@hookspec
def rllava_plugin_info() -> PluginInfo:  # type: ignore[empty-body]
    """Summary and homepage of the plugin."""


@hookspec
def rllava_models() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Model families: targets follow `rllava_core.policy.adapter.ModelAdapter`."""


@hookspec
def rllava_algorithms() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Algorithms: targets follow `rllava_core.algorithms.protocol.Algorithm`."""


@hookspec
def rllava_rewards() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Reward functions: targets follow `rllava_core.mdp.rewards.Reward`."""


@hookspec
def rllava_engines() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Engines: targets follow `TrainEngine` or `RolloutEngine` of `rllava_core.engines.protocol`."""


@hookspec
def rllava_environments() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Environments: targets follow `rllava_core.mdp.environment.Environment`."""


@hookspec
def rllava_datasets() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Data sets: targets follow `rllava_core.mdp.examples.Dataset`."""


@hookspec
def rllava_run_start(config: RunConfig, run_dir: Path) -> None:
    """A training run begins or resumes; the run directory exists and holds `config.yaml` and `manifest.json`.

    config: everything about the run, every default filled in. run_dir: where a plugin may write files of its own.
    """


@hookspec
def rllava_step_end(step: int, metrics: Mapping[str, float]) -> None:
    """Step number `step` (from 1) is done; `metrics` is the line written to `metrics.jsonl`."""


@hookspec
def rllava_run_end(summary: Mapping[str, Any]) -> None:
    """The run ended; `summary` is what `summary.json` holds, its `status` completed, interrupted or failed."""
