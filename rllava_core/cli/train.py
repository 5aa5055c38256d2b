"""`rllava train`: read the config, run the loop, show how it goes."""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rllava_core.cli.importing import importing
from rllava_core.cli.launching import launch, processes, rank

if TYPE_CHECKING:
    from rllava_core.config import ResolvedConfig
    from rllava_core.plugins import Registry
    from rllava_core.training.run_directory import RunDirectory

RUNS = Path("runs")


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where to write; default: a new directory in runs/.")
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir, or with the newest one of this config.")
@click.option(
    "--num-processes",
    type=click.IntRange(min=1),
    default=1,
    help="Processes on this machine that share the work, one a GPU; see engine.train.parallel.",
)
def train(config: Path, overrides: tuple[str, ...], run_dir: Path | None, resume: bool, num_processes: int) -> None:
    """Train a model as CONFIG says.

    Any key of the config can be set on the command line: training.steps=100 algorithm.group_size=16
    """
    from rllava_core.config import load
    from rllava_core.plugins import load_plugins

    registry = load_plugins()
    with importing():
        resolved = load(config, overrides, registry)
    launched = processes()
    if launched > 1 and (num_processes > 1 or run_dir is None):
        from rllava_core.errors import ConfigError

        raise ConfigError(
            "a launcher has started this command several times: give it --run-dir, which all of them share, and no "
            "--num-processes"
        )

    from rllava_core.training.run_directory import RunDirectory, numbered_run_directory

    chosen = nullcontext(run_dir) if run_dir else numbered_run_directory(RUNS, config.stem, resume=resume)
    with chosen as path:
        directory = RunDirectory(path)
        directory.check(resolved.run, resume=resume)  # the loop does so too, but for that much is imported
        arguments = ["train", str(config), *overrides, "--run-dir", str(path)]
        if num_processes > 1:
            launch(
                num_processes,
                [*arguments, *(["--resume"] if resume else [])],
                cpu=getattr(resolved.train_engine.config, "device", None) == "cpu",
            )
            summary = json.loads(directory.summary.read_text(encoding="utf-8"))
        else:
            several = ["--num-processes", str(launched)] if launched > 1 else []
            again = shlex.join(["rllava", *arguments, "--resume", *several])
            summary = _trained(resolved, registry, directory, again, resume=resume)
    if rank() > 0:
        return
    # A launcher would take it for a failure, and end the other processes.
    if summary["status"] == "interrupted" and launched == 1:
        from rllava_core.cli import INTERRUPTED

        raise SystemExit(INTERRUPTED)


def _trained(
    resolved: ResolvedConfig, registry: Registry, directory: RunDirectory, resume_command: str, *, resume: bool
) -> dict[str, Any]:
    """Train in this process. Returns the run's summary."""
    with importing():
        from rllava_core.cli.display import Display, Silence, quiet_libraries
        from rllava_core.training.loop import train as run

    quiet_libraries()
    if rank() > 0:
        return run(resolved, registry, directory, Silence(), resume=resume)
    with Display(resume_command=resume_command) as display:
        summary = run(resolved, registry, directory, display, resume=resume)
    display.finished(summary)
    return summary
