"""`rllava eval`: greedy answers on what was held out, for a config's model or for what a run has trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rllava_core.cli.importing import importing

if TYPE_CHECKING:
    from rllava_core.training.evaluation import Evaluation


@click.command()
@click.argument("target", metavar="CONFIG|RUN_DIR", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option(
    "--checkpoint", type=int, metavar="STEP", help="Of a run: the checkpoint of this step; default: the last."
)
@click.option("--swap-images", is_flag=True, help="Ask each question with another example's images: are they seen?")
@click.option("--random", "at_random", is_flag=True, help="Draw every choice at random: what is the level of chance?")
@click.option(
    "--save-episodes",
    is_flag=True,
    help="Draw each episode as a strip of its frames, actions and rewards: RUN_DIR/eval/episodes, or ./episodes.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write every answer as a line of JSON; default for a run: RUN_DIR/eval/answers.jsonl.",
)
def evaluate(
    target: Path,
    overrides: tuple[str, ...],
    checkpoint: int | None,
    swap_images: bool,
    at_random: bool,
    save_episodes: bool,
    output: Path | None,
) -> None:
    """Evaluate a CONFIG's model, or what the run in RUN_DIR has trained, on held-out episodes."""
    from rllava_core.config import load
    from rllava_core.errors import ConfigError
    from rllava_core.plugins import load_plugins

    is_run = target.is_dir()
    if is_run and not (target / "config.yaml").is_file():
        raise ConfigError(f"{target} is no run directory: it holds no config.yaml")
    if checkpoint is not None and not is_run:
        raise ConfigError("--checkpoint needs a run directory, not a config")
    registry = load_plugins()
    for warning in registry.warnings:
        click.echo(f"warning: {warning}", err=True)
    with importing():
        resolved = load(target / "config.yaml" if is_run else target, overrides, registry, learning=False)
    weights = _checkpoint(target, checkpoint) if is_run else None

    with importing():
        from rllava_core.cli.display import quiet_libraries
        from rllava_core.policy.behaviour import Behaviour
        from rllava_core.training.build import build_players
        from rllava_core.training.checkpoint import restore_heads
        from rllava_core.training.evaluation import evaluate as run

    quiet_libraries()
    training = resolved.run.training
    with build_players(resolved, weights) as players:
        chunk = training.prompts_per_step * players.algorithm.group_size
        if weights is not None and players.policy is not None and players.policy.heads:
            restore_heads(weights, players.policy, acting=True)
        hosted = players.policy is None
        # A model that was never trained here acts by what it says, however the algorithm would act by one that was.
        behaviour = Behaviour() if hosted else players.algorithm.behaviour()
        result = run(
            players.task,
            players.episodes,
            behaviour,
            training.eval_episodes,
            training.seed,
            chunk,
            swap_images=swap_images,
            at_random=at_random,
        )
    kind = ("-swapped-images" if swap_images else "") + ("-random" if at_random else "")
    if output is None and is_run:
        output = target / "eval" / f"answers{kind}.jsonl"
    if output is not None:
        _write_answers(output, result)
    how = ("at random" if at_random else "greedy") + (", images swapped" if swap_images else "")
    who = f"engine {resolved.run.engine.rollout.name}" if hosted else str(weights or target)
    _show(result, who, how, output)
    if save_episodes:
        from rllava_core.training.strips import write_strips

        directory = target / "eval" / f"episodes{kind}" if is_run else Path(f"episodes{kind}")
        write_strips(directory, result.trajectories, result.successes)
        click.echo(f"Every episode is drawn in {directory}")


def _checkpoint(run: Path, step: int | None) -> Path:
    from rllava_core.errors import ConfigError
    from rllava_core.training.run_directory import checkpoints_in

    found = dict(checkpoints_in(run / "checkpoints"))
    if not found:
        raise ConfigError(f"{run} holds no checkpoint yet")
    if step is not None and step not in found:
        raise ConfigError(f"{run} holds no checkpoint of step {step}; it holds {', '.join(map(str, found))}")
    return found[step if step is not None else max(found)]


def _write_answers(path: Path, result: Evaluation) -> None:
    from rllava_core.training.files import write_text, writing

    lines = [
        json.dumps(
            {
                "name": trajectory.name,
                "answer": trajectory.answer,
                "right_answer": trajectory.example.answer if trajectory.example else None,
                "success": success,
                "return": trajectory.episode_return,
                "turns": len(trajectory.turns),
                "actions": [action.text for action in trajectory.actions],
                "truncation": trajectory.truncation,
                **{f"reward/{name}": value for name, value in trajectory.scores.items()},
            },
            ensure_ascii=False,
        )
        for trajectory, success in zip(result.trajectories, result.successes, strict=True)
    ]
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(lines) + "\n")


def _show(result: Evaluation, weights: str, how: str, output: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True, markup=False)
    table = Table(title=f"{result.episodes} held-out episodes, {how}")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_row("success rate", f"{result.success_rate:.4f}")
    table.add_row("return", f"{result.return_mean:.4f}")
    table.add_row("turns", f"{result.turns_mean:.2f}")
    table.add_row("ms a turn, policy", f"{1000 * result.policy_seconds:.2f}")
    table.add_row("ms a turn, environment", f"{1000 * result.environment_seconds:.2f}")
    for name, value in result.scores.items():
        table.add_row(f"reward {name}", f"{value:.4f}")
    if result.unparsable_share > 0:
        table.add_row("share of turns not understood", f"{result.unparsable_share:.4f}")
    for name, value in result.reports.items():
        table.add_row(name.replace("/", " ").replace("_", " "), f"{value:.10g}")
    console.print(f"Weights: {weights}")
    console.print(table)
    if output is not None:
        console.print(f"Every answer is in {output}")
