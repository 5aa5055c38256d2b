"""The command `rllava`.

A user's mistake prints one message and no traceback, unless `--debug` is given. Exit codes: 0 done; 1 the run failed;
2 wrong usage or config; 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from typing import Any

import click

from rllava_core.cli.groups import LazyCommand, LazyGroup
from rllava_core.cli.heap import begin_with_whole_holes
from rllava_core.cli.launching import processes, rank
from rllava_core.errors import RllavaError

INTERRUPTED = 130


COMMANDS: Mapping[str, LazyCommand] = {
    "train": LazyCommand("rllava_core.cli.train:train", "Train a model as a config says."),
    "eval": LazyCommand("rllava_core.cli.evaluate:evaluate", "Evaluate a config's model, or what a run has trained."),
    "plan": LazyCommand("rllava_core.cli.plan:plan", "Predict the memory and time of a run, loading nothing."),
    "parity": LazyCommand("rllava_core.cli.parity:parity", "Compare log-probs with the model's own plain forward."),
    "plugins": LazyCommand("rllava_core.cli.plugins:plugins", "List, show and check the installed plugins."),
    "new-plugin": LazyCommand("rllava_core.cli.new_plugin:new_plugin", "Write the package of a new plugin."),
}


class RootGroup(LazyGroup):
    """The command itself: turns a RllavaError into a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; what a user has to read is printed on stderr and becomes the exit code."""
        try:
            return super().invoke(ctx)
        except RllavaError as error:
            if ctx.params.get("debug"):
                click.echo(traceback.format_exc(), err=True, nl=False)
            if rank() == 0 or not error.everywhere:
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
    whose = f"process {rank()}: " if processes() > 1 else ""
    click.echo(f"{whose}{click.style('error:', fg='red', bold=True)} {message}", err=True)


@click.group(cls=RootGroup, lazy_commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def rllava(debug: bool) -> None:
    """Train vision-language models by reinforcement learning."""


def main() -> None:
    """The console script: run the command line and exit."""
    begin_with_whole_holes(sys.argv[1:])
    rllava(prog_name="rllava")
