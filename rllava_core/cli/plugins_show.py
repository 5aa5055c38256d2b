"""`rllava plugins show NAME`: a plugin, a distribution or a component, with its options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata

import click

from rllava_core.cli.plugins import WIDTH_OF_A_FILE, label, names_of, unknown
from rllava_core.errors import PluginError
from rllava_core.plugins import Component, Plugin, Registry, load_plugins
from rllava_core.plugins.listing import components_of
from rllava_core.plugins.selection import is_called
from rllava_core.specs import Kind

TRACEBACK_LINES = 12

WHERE_IN_A_CONFIG: dict[Kind, str] = {
    "model": "model: {{adapter: {name}}}",
    "algorithm": "algorithm: {{name: {name}}}",
    "reward": "task: {{rewards: [{{name: {name}}}]}}",
    "environment": "task: {{environment: {name}}}",
    "dataset": "task: {{dataset: {{name: {name}}}}}",
    "engine": "engine: {{{role}: {name}}}",
}


@click.command()
@click.argument("name")
def show(name: str) -> None:
    """Show a plugin, a distribution, a component, or DISTRIBUTION/COMPONENT: what it is, needs, provides and takes."""
    registry = load_plugins(strict=False)
    plugins, components = _named(registry, name)
    if not plugins and not components:
        known = {component.spec.name for component in registry.components()}
        known |= {component.qualified_name for component in registry.components()}
        raise unknown(name, [*names_of(registry.plugins), *sorted(known)])
    parts = [
        *(_plugin(plugin) for plugin in plugins),
        *(_component(component, registry) for component in components),
    ]
    for number, lines in enumerate(parts):
        if number:
            click.echo()
        for line in lines:
            click.echo(line)


def _named(registry: Registry, name: str) -> tuple[list[Plugin], list[Component]]:
    """The plugins that a name means, and the components; those of a plugin that is shown too are named by it."""
    distribution, _, bare = name.rpartition("/")
    plugins = [plugin for plugin in registry.plugins if not distribution and is_called(plugin, name)]
    components = [
        component
        for component in registry.components()
        if component.spec.name == bare and (not distribution or is_called(_owner(component, registry), distribution))
    ]
    return plugins, components


def _owner(component: Component, registry: Registry) -> Plugin:
    [owner] = [plugin for plugin in registry.plugins if component in plugin.components]
    return owner


def _plugin(plugin: Plugin) -> Iterator[str]:
    yield click.style(f"plugin {plugin.name}", bold=True)
    if plugin.info.summary:
        yield f"  {plugin.info.summary}"
    yield f"  status        {plugin.status}"
    yield f"  distribution  {plugin.distribution} {plugin.version}{' (editable)' if plugin.editable else ''}"
    yield f"  location      {plugin.location}"
    yield f"  entry point   {plugin.entry_point}"
    yield f"  hook API      {plugin.hook_api or 'unsaid: it requires no rllava-core'}"
    if plugin.hooks:
        yield f"  hooks         {', '.join(plugin.hooks)}"
    if plugin.load_seconds is not None:
        yield f"  loaded in     {plugin.load_seconds * 1000:.0f} ms"
    for number, component in enumerate(components_of(plugin, None)):
        yield f"  {'' if number else 'provides':<12}  {label(component)}: {component.spec.summary}".rstrip(": ")
    for link in _links(plugin):
        yield f"  link          {link}"
    for other in plugin.shadowed:
        yield f"  not imported  {other}"
    if plugin.error:
        yield f"  cause         {plugin.error}"
    if plugin.traceback:
        yield ""
        yield from (f"    {line}" for line in plugin.traceback.rstrip().splitlines()[-TRACEBACK_LINES:])


def _component(component: Component, registry: Registry) -> Iterator[str]:
    spec, plugin = component.spec, _owner(component, registry)
    yield click.style(label(component), bold=True)
    if spec.summary:
        yield f"  {spec.summary}"
    yield f"  from      {component.distribution} {component.version}, plugin {component.plugin!r}"
    yield f"  target    {spec.target}"
    yield f"  needs     {', '.join(sorted(spec.needs)) or 'nothing'}"
    yield f"  provides  {', '.join(sorted(spec.provides)) or 'nothing further'}"
    for link in _links(plugin):
        yield f"  link      {link}"
    name = component.qualified_name if plugin.status == "conflict" else spec.name
    for role in sorted(component.roles) or [""]:
        yield f"  config    {WHERE_IN_A_CONFIG[component.kind].format(name=name, role=role)}"
    yield ""
    yield from _options(component)


def _options(component: Component) -> Iterator[str]:
    try:
        model = component.load_config()
    except PluginError as error:
        yield f"  its options cannot be shown: {error}"
        return
    if model is None:
        yield "  It has no options."
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rllava_core.config.describing import keys_of

    if not hasattr(model, "model_fields"):
        yield f"  its options cannot be shown: its config {component.spec.config!r} is no pydantic model"
        return
    table = Table()
    for heading in ("option", "type", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    for key in keys_of(model):
        default = "required" if key.default is None else key.default
        table.add_row(*(Text(cell) for cell in (key.name, key.type.replace("`", ""), default, key.meaning)))
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    with console.capture() as captured:
        console.print(table)
    yield captured.get().rstrip("\n")


def _links(plugin: Plugin) -> list[str]:
    """The homepage that the plugin names, and the addresses in its distribution's metadata."""
    links = [plugin.info.homepage] if plugin.info.homepage else []
    try:
        fields = metadata.metadata(plugin.distribution)
    except metadata.PackageNotFoundError:
        return links
    for entry in fields.get_all("Project-URL") or ():
        title, _, address = entry.partition(",")
        links.append(f"{address.strip()} ({title.strip()})")
    return links + [address for address in fields.get_all("Home-page") or () if address not in links]
