"""A logger: one readable line a step, in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rllava_core import PluginInfo, hookimpl

_files: list[Path] = []


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="An example: writes a line a step into log.txt.")


@hookimpl
def rllava_run_start(run_dir: Path) -> None:
    _files[:] = [run_dir / "log.txt"]


@hookimpl
def rllava_step_end(step: int, metrics: Mapping[str, float]) -> None:
    with _files[0].open("a", encoding="utf-8") as file:
        file.write(f"step {step}: reward {metrics['reward/mean']:.3f}\n")
