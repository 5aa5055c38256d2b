"""`rllava plugins`: what is installed, what each plugin provides, and why one cannot be used."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import IO

import click

from rllava_core.cli.groups import LazyCommand, LazyGroup
from rllava_core.errors import PluginError
from rllava_core.plugins import Component, Plugin, Registry, load_plugins
from rllava_core.plugins.listing import components_of, listing, plugins_with
from rllava_core.plugins.loading import LIFECYCLE_HOOKS, raise_problems
from rllava_core.plugins.selection import Selection
from rllava_core.specs import KINDS, Kind

WIDTH_OF_A_FILE = 10_000
"""Columns for output that is not a terminal: nothing that another program reads is cut or wrapped."""

SLOW = 1.0
"""Seconds of loading that are worth a line; `rllava plugins check` is stricter, in a process of its own."""

STATUS_STYLES = {
    "ok": "green",
    "conflict": "yellow",
    "disabled": "dim",
    "incompatible": "yellow",
    "broken": "red",
    "unloaded": "dim",
}

COMMANDS: Mapping[str, LazyCommand] = {
    "show": LazyCommand("rllava_core.cli.plugins_show:show", "Show one plugin or component with its options."),
    "check": LazyCommand("rllava_core.cli.plugins_check:check", "Check that plugins keep the contract."),
}


@click.group(cls=LazyGroup, lazy_commands=COMMANDS, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--kind", type=click.Choice(KINDS), help="Only components of this kind.")
@click.option("--no-load", is_flag=True, help="Import nothing: go by the metadata of what is installed.")
@click.pass_context
def plugins(ctx: click.Context, as_json: bool, kind: Kind | None, no_load: bool) -> None:
    """List the installed plugins and their components; say why one cannot be used."""
    if ctx.invoked_subcommand is not None:
        if as_json or kind or no_load:
            raise click.UsageError(f"write the options of `rllava plugins {ctx.invoked_subcommand}` behind it")
        return
    if kind and no_load:
        raise click.UsageError("--kind needs the plugins loaded: what they provide is not in their metadata")
    output = _reserved_stdout() if as_json else None
    registry = load_plugins(strict=False, load=not no_load)
    if as_json:
        import json

        click.echo(json.dumps(listing(registry, kind), indent=2), file=output)
    else:
        _print_table(registry, kind)
    if Selection.from_environment().strict:
        raise_problems(registry)


def _reserved_stdout() -> IO[str]:
    """Standard output for this command alone: what plugins, or what they start, write to it goes to stderr."""
    if sys.__stdout__ is None or sys.stdout is not sys.__stdout__:  # replaced by somebody who has it to themselves
        return sys.stdout
    sys.stdout.flush()
    private = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return private


def _print_table(registry: Registry, kind: Kind | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("plugin", "distribution", "version", "hook API", "status", "provides"):
        table.add_column(heading, overflow="fold")
    shown = plugins_with(registry, kind)
    for plugin in shown:
        status = Text(plugin.status, style=STATUS_STYLES[plugin.status])
        # Text, not str: rich would read square brackets in a name as markup.
        cells = [Text(cell) for cell in (plugin.name, plugin.distribution, plugin.version, plugin.hook_api or "–")]
        provided = [label(component) for component in components_of(plugin, kind)]
        if kind is None and not set(LIFECYCLE_HOOKS).isdisjoint(plugin.hooks):
            provided.append("follows runs")
        table.add_row(*cells, status, Text("\n".join(provided)))
    Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE).print(table)
    for warning in registry.warnings:
        click.echo(warning)
    for plugin in shown:
        if plugin.status not in ("ok", "unloaded"):
            click.echo(f"{plugin.problem}. See: rllava plugins show {plugin.name}")
        if (plugin.load_seconds or 0) > SLOW:
            seconds = f"took {plugin.load_seconds:.1f} s to load"
            click.echo(
                f"plugin {plugin.name!r} of {plugin.distribution} {seconds}. See: rllava plugins check {plugin.name}"
            )


def label(component: Component) -> str:
    """`algorithm NAME`, for an engine with its roles."""
    roles = f" ({', '.join(sorted(component.roles))})" if component.roles else ""
    return f"{component.kind} {component.spec.name}{roles}"


def unknown(name: str, known: list[str]) -> PluginError:
    """The error for a name that is neither a plugin nor a distribution nor a component."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return PluginError(f"no plugin, distribution or component {name!r} is installed.{hint} See: rllava plugins")


def names_of(plugins: tuple[Plugin, ...]) -> list[str]:
    """What plugins can be called."""
    return sorted({plugin.name for plugin in plugins} | {plugin.distribution for plugin in plugins})
