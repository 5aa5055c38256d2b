"""`rllava plugins`: what is installed, what each plugin provides, and why one cannot be used."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import click

from rllava_core.plugins import ENGINE_ROLES, Component, Plugin, Registry, core_version, load_plugins
from rllava_core.specs import HOOK_API

WIDTH_OF_A_FILE = 10_000
"""Columns for output that is not a terminal: nothing that another program reads is cut or wrapped."""

STATUS_STYLES = {"ok": "green", "incompatible": "yellow", "broken": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def plugins(as_json: bool) -> None:
    """List the installed plugins and their components; say why one cannot be used."""
    # What a plugin prints while it is imported must not end up in the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        registry = load_plugins()
    if as_json:
        click.echo(json.dumps(describe(registry), indent=2))
    else:
        _print_table(registry)
        for plugin in registry.plugins:
            if plugin.status != "ok":
                click.echo(plugin.problem)


def describe(registry: Registry) -> dict[str, Any]:
    """What `rllava plugins --json` prints; `schema` changes when a key changes its meaning or goes."""
    return {
        "schema": 1,
        "core_version": core_version(),
        "hook_api": HOOK_API,
        "plugins": [_describe_plugin(plugin) for plugin in registry.plugins],
    }


def _describe_plugin(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "entry_point": plugin.entry_point,
        "location": plugin.location,
        "status": plugin.status,
        "error": plugin.error,
        "summary": plugin.info.summary,
        "components": [_describe_component(component) for component in plugin.components],
    }


def _describe_component(component: Component) -> dict[str, Any]:
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


def _print_table(registry: Registry) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("plugin", "distribution", "version", "status", "provides"):
        table.add_column(heading, overflow="fold")
    for plugin in registry.plugins:
        status = Text(plugin.status, style=STATUS_STYLES[plugin.status])
        # Text, not str: rich would read square brackets in a name as markup.
        cells = [Text(cell) for cell in (plugin.name, plugin.distribution, plugin.version)]
        table.add_row(*cells, status, Text("\n".join(_provided(plugin))))
    Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE).print(table)


def _provided(plugin: Plugin) -> list[str]:
    lines = []
    for component in plugin.components:
        role = f" ({', '.join(sorted(component.spec.provides & ENGINE_ROLES))})" if component.kind == "engine" else ""
        lines.append(f"{component.kind} {component.spec.name}{role}")
    return sorted(lines)
