"""`rllava train`: read the config, run the loop, show how it goes."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path

import click

RUNS = Path("runs")


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where to write; default: a new directory in runs/.")
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir, or with the newest one of this config.")
def train(config: Path, overrides: tuple[str, ...], run_dir: Path | None, resume: bool) -> None:
    """Train a model as CONFIG says.

    Any key of the config can be set on the command line: training.steps=100 algorithm.group_size=16
    """
    from rllava_core.config import load
    from rllava_core.plugins import load_plugins

    registry = load_plugins()
    resolved = load(config, overrides, registry)

    from rllava_core.cli.display import Display, quiet_libraries
    from rllava_core.training.loop import train as run
    from rllava_core.training.run_directory import RunDirectory, numbered_run_directory

    quiet_libraries()
    chosen = nullcontext(run_dir) if run_dir else numbered_run_directory(RUNS, config.stem, resume=resume)
    with chosen as path:
        command = shlex.join(["rllava", "train", str(config), *overrides, "--run-dir", str(path), "--resume"])
        with Display(resume_command=command) as display:
            summary = run(resolved, registry, RunDirectory(path), display, resume=resume)
    display.finished(summary)
    if summary["status"] == "interrupted":
        from rllava_core.cli import INTERRUPTED

        raise SystemExit(INTERRUPTED)
