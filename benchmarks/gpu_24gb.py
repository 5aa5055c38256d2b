"""GRPO on a GPU limited to 24 GiB: every weight of a 3B and of a 4B model trained, and a 7B model by low-rank adapters.

    python benchmarks/gpu_24gb.py [--cases LIST] [--steps 10] [--limit-gib 24] [--save] [--json FILE]
    python benchmarks/gpu_24gb.py --tiny      # the same from end to end on the CPU; measures nothing

Models have the shapes of published ones (`config.json` in `rllava-qwen2vl`), bfloat16, and random weights, which are
made on the GPU: nothing is downloaded, and no copy of them is on the host. A step is G = 8 answers of exactly 256
tokens (ends of a turn are forbidden) to one prompt with one picture of 448×448 pixels, 256 image tokens in Qwen2.5-VL
and 196 in Qwen3-VL. All else is `rllava train`: its loop with the evaluation and the image probe before the first and
after the last step. What it would write at the end is left out unless `--save` asks for it; see below.

The bars: all steps are done, at most 23 GiB of GPU memory reserved by torch's allocator at any time (it may not take
more than `--limit-gib`), at most 64 GiB resident on the host. Every case is a process of its own, so that one that
runs out of memory does not end the others.

Which levers, and why; GiB, of the GPU as `rllava plan` predicts them, of the host as counted. Nothing here was measured
on a GPU yet.

    case                 weights  update  image probe   masters  states  gradients  largest step  process  host
    qwen2.5-vl-3b           7.0     8.7      12.3         14.0    28.0      7.0         2.3          3      54
    qwen3-vl-4b             8.3    10.4      12.8         16.5     8.4      8.3        10.1          3      46
    qwen2.5-vl-7b-lora     15.6    17.7      16.3           -       -        -            -          3       3

- All checkpoint activations. What is kept then, the inputs of 36 layers for two rows of 1,300 tokens, takes 0.4 GiB;
  1.5 GiB are the gradient of the embedding, which is the language head as well, and that of one more chunk of logits,
  to be added to it. `offload_activations` could save those 0.4 GiB only, so it is not asked for. A step is one
  micro-batch (`micro_batch_tokens` has room for 16,384). The image probe checkpoints nothing.
- `optimizer_on_cpu`: gradients leave as they are made, so the GPU holds weights and activations. Float32 masters and
  AdamW's two states take 12 bytes a weight, gradients 2: 14 × 3.75 billion are 49 GiB, and fit. A step on one parameter
  at a time takes two float32 copies of its gradient, which counts for the embedding (311 and 389 million).
- 14 × 4.44 billion are 58 GiB; with 2.9 for the embedding and 3 for a process that uses CUDA they reach 64.
  `adamw_8bit` holds the states in 2 bytes and keeps the masters. A step of bitsandbytes' on the CPU takes 28 bytes for
  each weight of the parameter (measured), which is 10.1 for the embedding.
- `stochastic_rounding` in the place of masters (8 + 2 bytes a weight) would fit as well: 33 + 8 + 10 + 3. But it draws
  4.4 billion random numbers a step, by one thread (8 ns each, measured): half a minute.
- The 7B model: 15.5 GiB of weights, 0.6 of adapters of rank 16 with their gradients and states, in float32.

Cases beside (`--cases all`): `…-on-gpu` keep everything on the GPU, and never all gradients: `adamw_8bit`,
`step_in_backward`, `stochastic_rounding`. That is 4 bytes a weight and scales; the step on the embedding, which is
rounded whole, takes 26 bytes for each of its weights: 7.0 + 7.1 + 7.5 for 3B, which just fits, 8.3 + 8.4 + 9.4 for 4B,
which does not.

What is reported

- peak reserved, peak allocated, host: the largest of all phases (`--json`: of each). Host is the resident size of the
  process, loading included. `counting` (below) is no part of it.
- rollout, update, optimizer: medians of the steps after the first. The update has all from the reward to the end of the
  step; the optimizer's part of it comes after the backward pass (0 where it steps within).
- MFU: floating-point operations of matrix products, convolutions and attention, counted by torch, by the seconds of
  the update, by what this GPU does in a product of two bfloat16 matrices of 8192², measured before anything is loaded
  (or `--peak-tflops`). As done: the shared, recomputing update. As an unshared trainer would need: G times forward and
  backward of one whole sequence, computed once. Both are counted after the last step.
- `--save` writes the checkpoint that a run ends with (17 to 53 GB; TMPDIR says where), and reports the phase
  `checkpoint`. Without it, the run is stopped after its last step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
import workloads
import yaml
from metering import METER, synchronize
from random_shapes import write_shape
from vs_trl import machine, versions

from rllava_core.config import ResolvedConfig, load
from rllava_core.plugins import Registry, load_plugins
from rllava_core.specs import ENTRY_POINT_GROUP

GIB = 2**30
GROUP, NEW_TOKENS = 8, 256
TINY_NEW_TOKENS, TINY_STEPS = 24, 2
RESERVED_BAR, HOST_BAR = 23.0, 64.0
"""GiB."""

UNCOUNTED = ("counting",)
"""Phases that no run has."""

ON_THE_GPU = {"optimizer": "adamw_8bit", "step_in_backward": True, "stochastic_rounding": True}


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained.

    model: a published one, whose `config.json` gives the shape.
    train: options of `engine.train`, beside the checkpointing of activations.
    parts: `model.train`; all in full if empty.
    """

    model: str
    train: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)


CASES = {
    "qwen2.5-vl-3b": Case("Qwen/Qwen2.5-VL-3B-Instruct", {"optimizer_on_cpu": True}),
    "qwen3-vl-4b": Case("Qwen/Qwen3-VL-4B-Instruct", {"optimizer_on_cpu": True, "optimizer": "adamw_8bit"}),
    "qwen2.5-vl-7b-lora": Case(
        "Qwen/Qwen2.5-VL-7B-Instruct", parts={"vision": "frozen", "connector": "frozen", "language": "lora"}
    ),
    "qwen2.5-vl-3b-on-gpu": Case("Qwen/Qwen2.5-VL-3B-Instruct", ON_THE_GPU),
    "qwen3-vl-4b-on-gpu": Case("Qwen/Qwen3-VL-4B-Instruct", ON_THE_GPU),
}
DEFAULT_CASES = ("qwen2.5-vl-3b", "qwen3-vl-4b", "qwen2.5-vl-7b-lora")


def config_of(case: Case, model: Path, data: Path, steps: int, *, tiny: bool) -> dict[str, Any]:
    """The config of a run: defaults, but for what a case is about."""
    device = "cpu" if tiny else "cuda"
    training = {
        "steps": steps,
        "prompts_per_step": 1,
        "learning_rate": workloads.LEARNING_RATE,
        "eval_every": 0,
        "eval_episodes": 1,
        "save_every": 0,
        "sample_every": 0,
    }
    if case.train.get("step_in_backward"):
        training["max_grad_norm"] = None  # nothing can be clipped before all gradients are known
    return {
        "model": {
            "adapter": "random_qwen2vl",
            "from_scratch": str(model),
            "dtype": "bfloat16",
            "device": device,
            "train": dict(case.parts),
        },
        "algorithm": {"name": "grpo", "group_size": GROUP},
        "task": {
            "dataset": {
                "name": "jsonl",
                "path": str(data),
                "held_out_path": str(data.with_name("held_out.jsonl")),
                "answer": None,
            },
            "rewards": [{"name": "token_parity"}],
            "max_new_tokens": TINY_NEW_TOKENS if tiny else NEW_TOKENS,
        },
        "engine": {
            "train": {"name": "metered", "device": device, "checkpoint_activations": True, **case.train},
            "rollout": {"name": "metered"},
        },
        "training": training,
    }


def resolve(path: Path) -> tuple[ResolvedConfig, Registry]:
    """With the installed plugins and those of the benchmarks."""
    own = [EntryPoint(name, name, ENTRY_POINT_GROUP) for name in ("workloads", "random_shapes", "metering")]
    known = load_plugins([*entry_points(group=ENTRY_POINT_GROUP), *own], strict=True)
    return load(path, [], known), known


# One case, in a process of its own.


class OverError(Exception):
    """The last step is done, and no checkpoint is wanted."""


class Watch:
    """An observer of the loop that ends it after the last step, before it saves, unless it is to be saved.

    found: what was measured, kept up to date, for a later step may fail.
    """

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job = job
        self.found: dict[str, Any] = {"steps": []}

    def started(self, directory: Path, total_steps: int, resumed_at: int | None) -> None:
        assert METER.engine is not None
        METER.lap("other")
        self.found |= METER.engine.parameters()

    def evaluated(self, step: int, evaluation: object) -> None:
        pass

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        METER.lap("other")
        done = {
            "rollout": metrics["time/rollout"],
            "update": metrics["time/update"],
            "optimizer": METER.optimizer_seconds,
            "step": sum(metrics[f"time/{lap}"] for lap in ("rollout", "reward", "update", "sync")),
            "tokens": metrics["rollout/action_tokens"] * GROUP,
        }
        self.found["steps"].append(done)
        times = ", ".join(f"{name} {done[name]:.2f} s" for name in ("rollout", "update", "optimizer"))
        print(f"{self._job['case']}: step {step}: {times}", flush=True)
        if step < self._job["steps"]:
            return
        assert METER.engine is not None
        self.found["flops"] = METER.engine.flops()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        METER.lap("counting")
        if not self._job["save"]:
            raise OverError

    def stopping(self) -> None:
        pass

    def warned(self, message: str) -> None:
        print(message, file=sys.stderr)


def flops_per_second(device: str) -> float:
    """Of the product of two large bfloat16 matrices, at best."""
    size, repeats = (8192, 20) if device == "cuda" else (512, 3)
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        left @ right
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)


def run_case(job: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of `rllava train`, and what they took."""
    from rllava_core.cli.display import quiet_libraries
    from rllava_core.training.loop import train
    from rllava_core.training.run_directory import RunDirectory

    quiet_libraries()
    peak = job["peak_flops"] or flops_per_second(job["device"])
    if job["device"] == "cuda":
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        # Of torch's allocator; the context of the driver, about half a GiB, is not in it.
        torch.cuda.set_per_process_memory_fraction(min(1.0, job["limit_gib"] * GIB / whole))
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(job)
    failed = None
    resolved, registry = resolve(Path(job["config"]))
    try:
        train(resolved, registry, RunDirectory(Path(job["run"])), watch, resume=False)
    except OverError:
        pass
    except torch.OutOfMemoryError as error:
        failed = f"out of GPU memory after {len(watch.found['steps'])} steps: {str(error).split('. See')[0]}"
    METER.lap("checkpoint" if job["save"] and failed is None else "other")
    used = versions("rllava-core", "torch", "transformers", "accelerate", "bitsandbytes", "peft")
    return {
        **watch.found,
        "failed": failed,
        "peaks": METER.peaks,
        "peak_flops": peak,
        "config": resolved.run.model_dump(mode="json"),
        "versions": used,
        "machine": machine(),
    }


# All cases.


def in_a_process(job: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """What `run_case` finds in a process of its own, which may die."""
    given, answer = directory / "job.json", directory / "result.json"
    given.write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--worker", str(given), str(answer)]
    done = subprocess.run(command, check=False, env=environment)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found
    if done.returncode == -9:
        return {"steps": [], "failed": "killed: host memory did not suffice, unless somebody else did it"}
    return {"steps": [], "failed": f"exit code {done.returncode}; see the message above"}


def summarise(result: Mapping[str, Any]) -> dict[str, float]:
    """Medians of the steps after the first, and the largest peaks; GiB and seconds."""
    steps = result["steps"][1:] or result["steps"]
    peaks = [peak for phase, peak in result.get("peaks", {}).items() if phase not in UNCOUNTED]
    found = {
        f"{kind}_gib": max(peak[kind] for peak in peaks) / GIB
        for kind in ("reserved", "allocated", "host")
        if peaks and kind in peaks[0]
    }
    if not steps:
        return found
    found["steps"] = len(result["steps"])
    found |= {name: statistics.median(step[name] for step in steps) for name in ("rollout", "update", "optimizer")}
    found["tokens"] = statistics.median(step["tokens"] for step in steps)
    found["tokens_per_second"] = found["tokens"] / statistics.median(step["step"] for step in steps)
    for kind, flops in result.get("flops", {}).items():
        if flops is not None:
            found[f"flops_{kind}"] = flops
            found[f"mfu_{kind}"] = flops / found["update"] / result["peak_flops"]
    return found


def verdict(result: Mapping[str, Any], summary: Mapping[str, float], steps: int) -> str:
    """Whether the bars are met; where they are not, which."""
    if result["failed"] is not None:
        return "failed"
    if "reserved_gib" not in summary:
        return "not measured"
    missed = [
        what
        for what, fails in (
            ("steps", summary.get("steps", 0) < steps),
            ("GPU", summary["reserved_gib"] > RESERVED_BAR),
            ("host", summary["host_gib"] > HOST_BAR),
        )
        if fails
    ]
    return f"missed: {', '.join(missed)}" if missed else "met"


ROWS = (
    ("steps done", "steps", "{:.0f}", 1.0),
    ("peak reserved, GiB", "reserved_gib", "{:.2f}", 1.0),
    ("peak allocated, GiB", "allocated_gib", "{:.2f}", 1.0),
    ("peak host, GiB", "host_gib", "{:.2f}", 1.0),
    ("rollout, s", "rollout", "{:.2f}", 1.0),
    ("update, s", "update", "{:.2f}", 1.0),
    ("of it optimizer, s", "optimizer", "{:.2f}", 1.0),
    ("tokens a step", "tokens", "{:.0f}", 1.0),
    ("tokens/s", "tokens_per_second", "{:.1f}", 1.0),
    ("TFLOP done", "flops_done", "{:.4g}", 1e-12),
    ("TFLOP unshared", "flops_unshared", "{:.4g}", 1e-12),
    ("MFU, as done", "mfu_done", "{:.1%}", 1.0),
    ("MFU, as unshared", "mfu_unshared", "{:.1%}", 1.0),
)


def show(results: Mapping[str, Mapping[str, Any]], steps: int, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 24 + 20 * len(results))  # where it is no terminal, too
    summaries = {name: summarise(result) for name, result in results.items()}
    table = Table("", *(name.replace("-vl-", "-") for name in results), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    weights = (result.get("parameters") for result in results.values())
    table.add_row("weights, billions", *("-" if count is None else f"{count / 1e9:.3g}" for count in weights))
    trained = (result.get("trained") for result in results.values())
    table.add_row("trained, billions", *("-" if count is None else f"{count / 1e9:.3g}" for count in trained))
    for label, key, form, scale in ROWS:
        table.add_row(label, *(form.format(item[key] * scale) if key in item else "-" for item in summaries.values()))
    table.add_row("bars", *(verdict(results[name], summary, steps) for name, summary in summaries.items()))
    console.print(table)
    by_phase = Table("phase", *(name.replace("-vl-", "-") for name in results))
    for phase in dict.fromkeys(phase for result in results.values() for phase in result.get("peaks", {})):
        by_phase.add_row(phase, *(_peaks(result.get("peaks", {}).get(phase, {})) for result in results.values()))
    console.print(by_phase)
    console.print("peaks by phase in GiB: reserved / host; other: loading and the image probe; counting: not of a run")
    for name, result in results.items():
        if result["failed"] is not None:
            console.print(f"{name}: {result['failed']}", markup=False)


def _peaks(peak: Mapping[str, int]) -> str:
    """`reserved / host`, or what there is of them."""
    return " / ".join(f"{peak[kind] / GIB:.2f}" for kind in ("reserved", "host") if kind in peak) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(DEFAULT_CASES), help=f"or all: {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, help=f"default: 10; with --tiny {TINY_STEPS}")
    parser.add_argument("--limit-gib", type=float, default=24.0, help="that torch's allocator may take of the GPU")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU, dense bfloat16; default: measured")
    parser.add_argument("--save", action="store_true", help="let each run write its checkpoint, and measure that too")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU: whether all works; no measurement")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    parser.add_argument("--worker", nargs=2, metavar=("JOB", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        given, answer = map(Path, arguments.worker)
        answer.write_text(json.dumps(run_case(json.loads(given.read_text(encoding="utf-8")))), encoding="utf-8")
        return
    chosen = list(CASES) if arguments.cases == "all" else arguments.cases.split(",")
    unknown = [name for name in chosen if name not in CASES]
    if unknown:
        parser.error(f"--cases: {', '.join(unknown)} is none of {', '.join(CASES)}")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --tiny runs the same on the CPU, to see whether it works")
    steps = arguments.steps or (TINY_STEPS if arguments.tiny else 10)
    label = "tiny models on the CPU: NO MEASUREMENT" if arguments.tiny else f"limited to {arguments.limit_gib:g} GiB"
    results: dict[str, Any] = {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            write_shape(CASES[name].model, root / "model", tiny=arguments.tiny)
            data = workloads.write_data(workloads.BASE, root / "data", steps)
            config = config_of(CASES[name], root / "model", data, steps, tiny=arguments.tiny)
            (root / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
            job = {
                "case": name,
                "config": str(root / "config.yaml"),
                "run": str(root / "run"),
                "device": "cpu" if arguments.tiny else "cuda",
                "steps": steps,
                "save": arguments.save,
                "limit_gib": arguments.limit_gib,
                "peak_flops": None if arguments.peak_tflops is None else arguments.peak_tflops * 1e12,
            }
            results[name] = in_a_process(job, root)
        if arguments.json is not None:  # after every case, for the next may take the machine down
            written = {
                "label": label,
                "limit_gib": None if arguments.tiny else arguments.limit_gib,
                "summaries": {done: summarise(result) for done, result in results.items()},
                "bars": {done: verdict(result, summarise(result), steps) for done, result in results.items()},
                "cases": results,
            }
            arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    show(results, steps, f"GRPO, G = {GROUP}, one image of 448×448; {label}")


if __name__ == "__main__":
    main()
