"""`rllava parity`: the log-prob of every token computed in three ways, side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import click

from rllava_core.cli.importing import importing

if TYPE_CHECKING:
    from rllava_core.training.parity import Parity


@click.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--examples", type=click.IntRange(min=1), default=4, show_default=True, help="Held-out episodes to play.")
@click.option("--tolerance", type=float, help="Largest gap, in nats; default: 1e-4 in float32, more in half precision.")
@click.option("--worst", type=click.IntRange(min=1), default=8, show_default=True, help="How many tokens to list.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Every token as a line of JSON.")
def parity(
    config: Path, overrides: tuple[str, ...], examples: int, tolerance: float | None, worst: int, output: Path | None
) -> None:
    """Compare log-probs as they are sampled, recomputed for training, and given by the model's own plain forward with
    the family's own processor; greedy answers with `generate`. Exit code 1 if they differ."""
    from rllava_core.config import load
    from rllava_core.plugins import load_plugins

    registry = load_plugins()
    for warning in registry.warnings:
        click.echo(f"warning: {warning}", err=True)
    with importing():
        resolved = load(config, overrides, registry)

    with importing():
        from rllava_core.cli.display import quiet_libraries
        from rllava_core.training.build import build_parts
        from rllava_core.training.evaluation import held_out
        from rllava_core.training.parity import measure, tolerance_of

    quiet_libraries()
    with build_parts(resolved, learning=False) as parts:
        if tolerance is None:
            tolerance = tolerance_of(parts, resolved.run.training.temperature)
        seed = resolved.run.training.seed
        result = measure(parts, held_out(parts.task, examples, seed), seed, tolerance)
    if output is not None:
        from rllava_core.training.files import write_text, writing

        with writing(str(output)):
            lines = (json.dumps(asdict(decision), ensure_ascii=False) for decision in result.decisions)
            write_text(output, "\n".join(lines) + "\n")
    _show(result, worst)
    if result.problems:
        raise click.exceptions.Exit(1)


def _show(result: Parity, worst: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table(title=f"{len(result.decisions)} decisions, gaps in nats")
    for column in ("", "mean", "largest"):
        table.add_column(column, justify="right" if column else "left")
    for name, gaps in (
        ("sampled, recomputed", result.gaps(lambda item: item.sampled, lambda item: item.recomputed)),
        ("recomputed, plain", result.gaps(lambda item: item.recomputed, lambda item: item.plain)),
        ("sampled, plain", result.gaps(lambda item: item.sampled, lambda item: item.plain)),
    ):
        table.add_row(name, *((f"{mean(gaps):.1e}", f"{max(gaps):.1e}") if gaps else ("not known", "not known")))
    console.print(table)
    for what, found in (
        ("prompts are what the family's processor makes of them", [item.same_tokens for item in result.prompts]),
        ("greedy answers are those of `generate`", [item.same_answer for item in result.prompts]),
    ):
        known = [item for item in found if item is not None]
        console.print(f"{sum(known)} of {len(known)} {what}" if known else f"Not known: how many {what}")
    rows = Table(title="Where they differ most")
    for column in ("episode", "turn", "token"):
        rows.add_column(column)
    for column in ("sampled", "recomputed", "plain", "gap"):
        rows.add_column(column, justify="right")
    for item in sorted(result.decisions, key=lambda item: -item.gap)[:worst]:
        plain = "" if item.plain is None else f"{item.plain:.6f}"
        where = f"{item.turn}.{item.place}"
        rows.add_row(
            item.episode,
            where,
            repr(item.text),
            f"{item.sampled:.6f}",
            f"{item.recomputed:.6f}",
            plain,
            f"{item.gap:.1e}",
        )
    console.print(rows)
    problems = result.problems
    console.print("\n".join(f"Differs: {problem}" for problem in problems) or f"Equal, to {result.tolerance:g} nats")
