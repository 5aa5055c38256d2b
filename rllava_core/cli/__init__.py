"""The command `rllava`. Each subcommand's module is imported when that subcommand is invoked, not before.

A user's mistake prints one message and no traceback, unless `--debug` is given. Exit codes: 0 done; 1 the run failed;
2 wrong usage or config; 130 interrupted.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from rllava_core.errors import RllavaError

INTERRUPTED = 130


@dataclass(frozen=True)
class LazyCommand:
    """Where a subcommand lives, and the line that the list of commands shows without importing it."""

    target: str
    help: str


COMMANDS: Mapping[str, LazyCommand] = {
    "train": LazyCommand("rllava_core.cli.train:train", "Train a model as a config says."),
    "eval": LazyCommand("rllava_core.cli.evaluate:evaluate", "Evaluate a config's model, or what a run has trained."),
    "plugins": LazyCommand("rllava_core.cli.plugins:plugins", "List the installed plugins and their components."),
}


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is invoked, and turns a RllavaError into a message and an exit code."""

    def __init__(self, *args: Any, lazy_commands: Mapping[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy_commands = lazy_commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all subcommands, in the order in which one uses them."""
        return [*self.lazy_commands, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the subcommand; None if there is none of this name."""
        if cmd_name not in self.lazy_commands:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.lazy_commands[cmd_name].target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands for `--help`."""
        rows = [(name, command.help) for name, command in self.lazy_commands.items()]
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; what a user has to read is printed on stderr and becomes the exit code."""
        try:
            return super().invoke(ctx)
        except RllavaError as error:
            if ctx.params.get("debug"):
                click.echo(traceback.format_exc(), err=True, nl=False)
            _show_error(str(error))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            _show_error("interrupted")
            ctx.exit(INTERRUPTED)


def _show_version(ctx: click.Context, param: click.Parameter, requested: bool) -> None:
    if requested:
        from rllava_core.plugins import core_version

        click.echo(f"rllava {core_version() or '(rllava-core is not installed as a distribution)'}")
        ctx.exit()


def _show_error(message: str) -> None:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)


@click.group(cls=LazyGroup, lazy_commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def rllava(debug: bool) -> None:
    """Train vision-language models by reinforcement learning."""


def main() -> None:
    """The console script: run the command line and exit."""
    rllava(prog_name="rllava")
