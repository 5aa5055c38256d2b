"""`rllava plan`: what a run will need of memory and time, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rllava_core.cli.importing import importing
from rllava_core.errors import ConfigError

if TYPE_CHECKING:
    from rllava_core.planning.fitting import Fit
    from rllava_core.planning.phases import Phase
    from rllava_core.planning.planner import Plan
    from rllava_core.planning.request import Request

UNITS = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}
PREDICTED = "GPU figures are predictions, not yet measured on a GPU; those of host memory are measured on the CPU."


@click.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--model", help="A published model by its name or hub id, in place of the config's.")
@click.option("--fit", metavar="SIZE", help="Search the fastest setting that fits a card of this size, such as 24GB.")
@click.option("--host-memory", metavar="SIZE", help="With --fit: of the host beside the card; default: enough.")
@click.option("--image", default="448x448", show_default=True, help="Width and height of an image in pixels, or none.")
@click.option("--images", type=click.IntRange(min=1), default=1, show_default=True, help="How many a turn shows.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), help="Tokens of a turn's text; default: 64.")
@click.option("--answer-tokens", type=click.IntRange(min=2), help="Tokens of an answer; default: task.max_new_tokens.")
@click.option("--turns", type=click.IntRange(min=1), default=1, show_default=True, help="Turns of an episode.")
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="That share a step; one is planned."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where the model will be; default: as the engine.")
@click.option("--tflops", type=float, default=165.0, show_default=True, help="The card's, dense bfloat16.")
@click.option("--bandwidth", type=float, default=1000.0, show_default=True, help="Of the card's memory, in GB/s.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(config: Path | None, overrides: tuple[str, ...], as_json: bool, fit: str | None, **options: Any) -> None:
    """Predict the peak memory of a run, part by part, and roughly the time of a step, from its model's config alone.

    Images, prompts and answers are not read: say how large they are.
    """
    if config is None and options["model"] is None:
        raise ConfigError("plan needs a config, or --model with the name of a published model")
    budget = None if fit is None else parse_size(fit, "--fit")
    told = options["host_memory"]
    host = None if told is None else parse_size(told, "--host-memory")
    if host is not None and budget is None:
        raise ConfigError("--host-memory limits what --fit may choose: add --fit with the size of the card")
    sizes = _sizes(options)
    with importing():
        request = _request(config, overrides, options, sizes)

        from rllava_core.cli.display import quiet_libraries
        from rllava_core.planning.fitting import fitted
        from rllava_core.planning.planner import Planner
        from rllava_core.planning.timing import Machine
        from rllava_core.training.garbage import long_lived_left_alone

    quiet_libraries()
    on_card = request.device == "cuda"
    if host is not None and not on_card:
        raise ConfigError("--host-memory is of the host beside a card, and the model is on the CPU: --fit is its size")
    if budget is not None and not request.has_levers:
        raise ConfigError("--fit searches options of the engine `local`, and engine.train is another: leave it out")
    machine = Machine.card(options["tflops"], options["bandwidth"]) if on_card else Machine.this_cpu()
    with long_lived_left_alone():
        planner = Planner(request, machine)
        found = None if budget is None else fitted(planner, request, budget, host)
        chosen = planner.plan() if found is None else found.plan
    if as_json:
        click.echo(json.dumps(_as_json(chosen, found), indent=2))
    else:
        _show(chosen, found, request)


def parse_size(text: str, what: str) -> int:
    """Bytes of `24GB`, `24GiB`, `500M`; powers of 1024, as cards are sold. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?\s*", text.upper())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"{what} {text!r}: expected a size such as 24GB or 512MB")
    return int(float(match[1]) * 2 ** UNITS[match[2]] if match[2] else float(match[1]))


def _sizes(options: dict[str, Any]) -> dict[str, Any]:
    image = options["image"]
    match = re.fullmatch(r"(\d+)x(\d+)", image)
    if image != "none" and (match is None or 0 in map(int, match.groups())):
        raise ConfigError(f"--image {image!r}: expected width and height in pixels, such as 448x448, or none")
    sizes: dict[str, Any] = {
        "image": None if match is None else (int(match[1]), int(match[2])),
        "images": 0 if match is None else options["images"],
        "prompt_tokens": options["prompt_tokens"] or 64,
        "turns": options["turns"],
    }
    if options["answer_tokens"] is not None:
        sizes["answer_tokens"] = options["answer_tokens"]
    return sizes


def _request(
    config: Path | None, overrides: tuple[str, ...], options: dict[str, Any], sizes: dict[str, Any]
) -> Request:
    from dataclasses import replace

    from rllava_core.planning.published import find_model
    from rllava_core.plugins import load_plugins

    registry = load_plugins()
    for warning in registry.warnings:
        click.echo(f"warning: {warning}", err=True)
    named = options["model"]
    component, path = find_model(named, registry) if named is not None else (None, "")
    if config is not None:
        from rllava_core.config import load

        chosen: tuple[str, ...] = ()
        if component is not None:
            chosen = (f"model.adapter={component.qualified_name}", "model.from_scratch=null", f"model.path={path}")
        resolved = load(config, (*chosen, *overrides), registry)

        from rllava_core.planning.request import request_of_config

        request = request_of_config(resolved, sizes)
    else:
        if overrides:
            raise ConfigError(f"override {overrides[0]!r}: there is no config to override")
        from rllava_core.planning.request import request_of_model

        assert component is not None
        request = request_of_model(component, path, sizes)
    request = replace(request, processes=options["processes"])
    return request if options["device"] is None else replace(request, device=options["device"])


def _as_json(plan: Plan, fit: Fit | None) -> dict[str, Any]:
    from dataclasses import asdict

    found: dict[str, Any] = {
        "model": plan.model,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "device": plan.device,
        "levers": asdict(plan.levers),
        "prompt_tokens": plan.prompt_tokens,
        "image_tokens": plan.image_tokens,
        "micro_batches": plan.micro_batches,
        "processes": plan.processes,
        "device_peak_bytes": plan.device_peak.device_total,
        "host_peak_bytes": plan.host_peak.host_total,
        "phases": [
            {
                "name": phase.name,
                "device": dict(phase.device),
                "device_total": phase.device_total,
                "host": dict(phase.host),
                "host_total": phase.host_total,
            }
            for phase in plan.phases
        ],
        "seconds": {**asdict(plan.seconds), "step": plan.seconds.total},
        "measured": {"host": "on the CPU", "device": "not yet measured on a GPU"},
    }
    if fit is not None:
        found["fit"] = {
            "budget_bytes": fit.budget,
            "host_bytes": fit.host,
            "fits": fit.fits,
            "overrides": list(fit.overrides),
            "smallest_card_gb": fit.card,
        }
    return found


def _show(plan: Plan, fit: Fit | None, request: Request) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    workload = request.workload
    share = f"{plan.trained / plan.parameters:.0%}" if plan.trained < plan.parameters else "all"
    console.print(f"{plan.model}: {plan.parameters / 1e9:.2f} billion weights, {share} trained")
    turns = f", {workload.turns} turns" if workload.turns > 1 else ""
    console.print(
        f"{workload.prompts} prompts of {plan.prompt_tokens} tokens ({plan.image_tokens} of images) x "
        f"{workload.group_size} answers of {workload.answer_tokens} tokens{turns}; micro-batches a step: "
        f"{plan.micro_batches}"
    )
    if plan.processes > 1:
        how = f"which divide {', '.join(sorted(request.divided))}" if request.divided else "each with all weights"
        console.print(
            f"One of {plan.processes} processes, {how}; what they send each other takes time that is not counted"
        )
    sides = {"GPU": "device", "host": "host"} if plan.device == "cuda" else {"host": "host"}
    table = Table(title="Memory at the worst moment of each phase, in GiB")
    table.add_column("")
    for title in sides:
        table.add_column(title, justify="right")
    worst = {side: max(plan.phases, key=lambda phase: sum(_side(phase, side).values())) for side in sides.values()}
    for phase in plan.phases:
        marks = (f"{_gib(sum(_side(phase, side).values()))}{' *' if phase is worst[side] else '  '}" for side in worst)
        table.add_row(phase.name, *marks)
    console.print(table)
    for title, side in sides.items():
        parts = Table(title=f"Of which, {title}, {worst[side].name}")
        parts.add_column("")
        parts.add_column("GiB", justify="right")
        for part, size in sorted(_side(worst[side], side).items(), key=lambda item: -item[1]):
            parts.add_row(part, _gib(size))
        console.print(parts)
    seconds = plan.seconds
    console.print(
        f"A step takes roughly {seconds.total:.1f} s: rollout {seconds.rollout:.1f}, update {seconds.update:.1f}, "
        f"optimizer {seconds.optimizer:.1f}"
    )
    if plan.device == "cuda":
        console.print(PREDICTED)
    if fit is not None:
        _show_fit(console, fit)


def _show_fit(console: Any, fit: Fit) -> None:
    size = f"{fit.budget / 2**30:g} GiB"
    if fit.host is not None:
        size += f", and {fit.host / 2**30:g} GiB of host memory,"
    if fit.fits:
        changed = " ".join(fit.overrides)
        console.print(f"Fits {size} with:  {changed}" if changed else f"Fits {size} as it is.")
    else:
        card = f"the smallest card that would hold it has {fit.card} GB" if fit.card else "no card would hold it"
        console.print(f"Does not fit {size} with any setting; {card}, with:  {' '.join(fit.overrides)}")


def _side(phase: Phase, side: str) -> dict[str, int]:
    return dict(phase.device if side == "device" else phase.host)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
