"""One GRPO step of rllava, shared and unshared, beside one of TRL: the same model files, prompts, images, group, answer
lengths, optimizer (fused AdamW) and learning rate.

    python benchmarks/vs_trl.py --shape small|mid|long|multiturn [--trl-python PATH] [--repeats 3] [--json FILE]

TRL is run by an interpreter of its own, so that its newest release is measured, whatever it requires:

    uv venv trl-env --python 3.11 && uv pip install --python trl-env/bin/python trl torch torchvision pillow
    python benchmarks/vs_trl.py --shape mid --trl-python trl-env/bin/python

What is compared (`--only`, a list with commas):

- `ours`: `rllava train` as its config is by default; the steps are those of the real loop.
  Its process begins as that of the command does (`rllava_core.cli.heap`).
- `unshared`: the same with `engine.train.prefix_sharing: false`: every sequence of a group is computed whole.
- `trl`: TRL's `GRPOTrainer` with its defaults, which checkpoint activations, run forward passes in bfloat16 and put 8
  sequences in a micro-batch; gradients are accumulated until the step has all its sequences.
- `trl-best`: what TRL's documentation recommends for speed where memory allows: no gradient checkpointing ("~20% slower
  training", `GRPOConfig`), one micro-batch for the whole step, so that one forward pass holds all, no KL term (`beta=0`
  is the default), and on a CPU float32, as ours.
  Left out, for they cannot be had here: vLLM (on a GPU it is TRL's fastest rollout), transformers' continuous batching
  (takes no images), Liger's and the hub's kernels (Triton, so a GPU). On a CPU, TRL scores every position with the
  language head and not the answers' alone (`add_fused_lm_head`: only Triton's kernels take rows of any number).

Every measurement is a process of its own: `--warm-up` steps, then `--steps` measured ones. The frameworks take turns,
`--repeats` rounds of them; the table shows medians over all measured steps.

- rollout: from the beginning of a step to the first call of the reward. Images are preprocessed within; reading their
  files is in it for ours, and for TRL before the step begins.
- update: from the end of the reward to the end of the step: forward and backward passes, clipping, optimizer.
- peak: the largest resident size of the process from the first step to the end of the last (on a GPU also: of what
  torch allocated there); above baseline: less what was resident when everything was loaded, just before the first step.
- threads: torch's own choice, as many as cores, suits an idle machine. On a busy one its threads wait for each other at
  every operation; `--threads 1` then disturbs the comparison least.
- tokens: sampled, as counted in what came back. No framework may draw a token that ends an answer early: of ours by an
  adapter that forbids it (`workloads.Endless`), of TRL by `suppress_tokens`.

This file imports only the standard library at its top, for it is also what TRL's interpreter runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

FRAMEWORKS = ("ours", "unshared", "trl", "trl-best")
SHAPE_NAMES = ("small", "mid", "long", "multiturn")
NO_TRL = "TRL is left out: name an interpreter that has it by --trl-python (how to make one: --help)"
NO_TRL_TURNS = (
    "TRL: not possible. Its turns go on where the model writes a tool call, which one of random weights does not, and "
    "a `rollout_func` may return no images"
)


class Memory:
    """Of this process, and of its GPU if there is one.

    baseline: resident bytes when everything was loaded.
    """

    def __init__(self) -> None:
        self.baseline = 0

    def begin(self) -> None:
        """Everything is loaded: from here on peaks are measured."""
        import torch

        gc.collect()
        self.baseline = _status("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak of loading
        except OSError:
            print("the peak of memory includes loading: it cannot be reset here", file=sys.stderr)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def report(self) -> dict[str, float]:
        """Bytes."""
        import torch

        found = {"baseline_bytes": self.baseline, "peak_bytes": _status("VmHWM")}
        if torch.cuda.is_available():
            found["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
            found["gpu_reserved_bytes"] = torch.cuda.max_memory_reserved()
        return found


def _status(name: str) -> int:
    """Bytes, from Linux's account of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {name} in /proc/self/status: memory is measured on Linux only")


def machine() -> dict[str, Any]:
    """What was measured on; nothing that identifies it."""
    import torch

    found: dict[str, Any] = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions(*distributions: str) -> dict[str, str]:
    return {name: version(name) for name in distributions}


def run_ours(job: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of `rllava train`."""
    from workloads import resolve

    from rllava_core.cli.display import quiet_libraries
    from rllava_core.training.loop import train
    from rllava_core.training.run_directory import RunDirectory

    quiet_libraries()
    memory = Memory()
    steps: list[dict[str, float]] = []
    measured: dict[str, float] = {}

    class Watch:
        """An observer of the loop."""

        def started(self, directory: Path, total_steps: int, resumed_at: int | None) -> None:
            memory.begin()

        def evaluated(self, step: int, evaluation: object) -> None:
            pass

        def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
            measured.update(memory.report())  # before anything is saved
            steps.append(
                {
                    "rollout": metrics["time/rollout"],
                    "reward": metrics["time/reward"],
                    "update": metrics["time/update"],
                    "step": sum(metrics[f"time/{lap}"] for lap in ("rollout", "reward", "update", "sync")),
                    "tokens": metrics["rollout/action_tokens"] * job["sequences"],
                }
            )

        def stopping(self) -> None:
            pass

        def warned(self, message: str) -> None:
            print(message, file=sys.stderr)

    resolved, registry = resolve(Path(job["config"]))
    train(resolved, registry, RunDirectory(Path(job["run"])), Watch(), resume=False)
    used = versions("rllava-core", "torch", "transformers", "accelerate")
    return {"steps": steps, **measured, "versions": used, "machine": machine()}


def run_trl(job: Mapping[str, Any]) -> dict[str, Any]:
    """Steps of TRL's GRPOTrainer, on the same files. Only its documented interface is used: a reward function and a
    callback tell when the rollout ends and the update begins."""
    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    memory = Memory()
    steps: list[dict[str, float]] = []
    marks: dict[str, float] = {}
    data = Path(job["data"])
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    examples = [
        {
            "prompt": [{"role": "user", "content": line["question"]}],
            "image": str(data.parent / line["image"]),
        }
        for line in lines
    ]
    dataset = datasets.Dataset.from_list(examples).cast_column("image", datasets.Image())

    def token_parity(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        marks["sampled"] = time.perf_counter()
        marks["tokens"] = sum(map(len, completion_ids))
        found = [float(sum(tokens) % 2 == 0) for tokens in completion_ids]
        marks["scored"] = time.perf_counter()
        return found

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            memory.begin()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks["began"] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended = time.perf_counter()
            steps.append(
                {
                    "rollout": marks["sampled"] - marks["began"],
                    "reward": marks["scored"] - marks["sampled"],
                    "update": ended - marks["scored"],
                    "step": ended - marks["began"],
                    "tokens": marks["tokens"],
                }
            )

    config = GRPOConfig(
        output_dir=job["run"],
        max_steps=job["steps"],
        num_generations=job["group"],
        max_completion_length=job["new_tokens"],
        generation_kwargs={"suppress_tokens": job["never_sampled"]},
        learning_rate=job["learning_rate"],
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),  # without it, the defaults refuse to start where there is no GPU
        **job["settings"],
    )
    trainer = GRPOTrainer(
        model=job["model"], reward_funcs=token_parity, args=config, train_dataset=dataset, callbacks=[Watch()]
    )
    trainer.train()
    used = versions("trl", "torch", "transformers", "accelerate")
    return {"steps": steps, **memory.report(), "versions": used, "machine": machine()}


WORKERS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "ours": run_ours,
    "unshared": run_ours,
    "trl": run_trl,
    "trl-best": run_trl,
}


def trl_settings(framework: str, sequences: int, cuda: bool) -> dict[str, Any]:
    """What the two settings of TRL differ in; see the docstring of this file."""
    if framework == "trl":
        return {"per_device_train_batch_size": 8, "gradient_accumulation_steps": sequences // 8}
    best = {"per_device_train_batch_size": sequences, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    return best if cuda else {**best, "bf16": False}


def measure(framework: str, job: Mapping[str, Any], interpreter: str, directory: Path) -> dict[str, Any]:
    """Run one job in a process of its own."""
    from rllava_core.cli.heap import TUNABLES  # not installed where TRL's workers are

    given, answer = directory / "job.json", directory / "result.json"
    given.write_text(json.dumps(job), encoding="utf-8")
    command = [interpreter, __file__, "--worker", framework, str(given), str(answer)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if WORKERS[framework] is not run_trl:
        environment["GLIBC_TUNABLES"] = TUNABLES  # as `rllava train` begins
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{framework} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return result


def jobs(shape_name: str, frameworks: Sequence[str], steps: int, root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job of each framework, and what to report of the shape."""
    import torch
    import workloads

    from rllava_core.cli.display import quiet_libraries

    quiet_libraries()
    shape = workloads.SHAPES[shape_name]
    counts = workloads.write_model(shape, root / "model")
    data = workloads.write_data(shape, root / "data", steps) if shape.turns == 1 else None
    sequences = shape.prompts * shape.group
    common = {
        "model": str(root / "model"),
        "data": None if data is None else str(data),
        "steps": steps,
        "group": shape.group,
        "sequences": sequences,
        "new_tokens": shape.new_tokens,
        "learning_rate": workloads.LEARNING_RATE,
        "never_sampled": workloads.never_sampled(root / "model"),
    }
    found: dict[str, Any] = {}
    for framework in frameworks:
        if framework.startswith("trl"):
            found[framework] = {**common, "settings": trl_settings(framework, sequences, torch.cuda.is_available())}
        else:
            config = root / f"{framework}.yaml"
            workloads.write_config(shape, root / "model", data, config, steps, shared=framework == "ours")
            found[framework] = {**common, "config": str(config)}
    return found, {"name": shape_name, **workloads.describe(shape), **counts}


def summarise(results: Sequence[Mapping[str, Any]], warm_up: int) -> dict[str, float]:
    """Medians over the measured steps of all rounds."""
    steps = [step for result in results for step in result["steps"][warm_up:]]
    found = {name: statistics.median(step[name] for step in steps) for name in ("rollout", "update", "step", "tokens")}
    found["tokens_per_second"] = found["tokens"] / found["step"]
    found["peak_bytes"] = statistics.median(result["peak_bytes"] for result in results)
    found["above_bytes"] = statistics.median(result["peak_bytes"] - result["baseline_bytes"] for result in results)
    if "gpu_peak_bytes" in results[0]:
        found["gpu_peak_bytes"] = statistics.median(result["gpu_peak_bytes"] for result in results)
    return found


def show(summaries: Mapping[str, Mapping[str, float]], notes: Sequence[str]) -> None:
    """Two tables: what was measured, and how many times as much the others take as ours."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(100, Console().width))  # no column is cut where the output is no terminal
    on_gpu = any("gpu_peak_bytes" in summary for summary in summaries.values())
    table = Table(title="medians of a step")
    for column in ("", "rollout, s", "update, s", "step, s", "tokens", "tokens/s", "peak, GB", "above baseline, GB"):
        table.add_column(column, justify="right" if column else "left")
    if on_gpu:
        table.add_column("GPU peak, GB", justify="right")
    for name, summary in summaries.items():
        row = [f"{summary[key]:.2f}" for key in ("rollout", "update", "step")]
        row += [f"{summary['tokens']:.0f}", f"{summary['tokens_per_second']:.1f}"]
        keys = ("peak_bytes", "above_bytes", *(("gpu_peak_bytes",) if on_gpu else ()))
        table.add_row(name, *row, *(f"{summary[key] / 1e9:.2f}" for key in keys))
    console.print(table)
    if "ours" in summaries and len(summaries) > 1:
        table = Table(title="times as much as ours")
        keys = {"rollout": "rollout", "update": "update", "step": "step", "peak": "peak_bytes", "above": "above_bytes"}
        keys |= {"GPU peak": "gpu_peak_bytes"} if on_gpu else {}
        for column in ("", *keys):
            table.add_column(column, justify="right" if column else "left")
        for name, summary in summaries.items():
            if name != "ours":
                table.add_row(name, *(f"{summary[key] / summaries['ours'][key]:.2f}" for key in keys.values()))
        console.print(table)
    for note in notes:
        console.print(note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPE_NAMES, default="mid")
    parser.add_argument("--only", default=",".join(FRAMEWORKS), help="what to measure, with commas between")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--warm-up", type=int, default=1, help="steps of each process before those that are measured")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of each process")
    parser.add_argument("--threads", type=int, help="of torch (OMP_NUM_THREADS); default: as many as cores")
    parser.add_argument("--trl-python", help="interpreter of an environment that has TRL")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    parser.add_argument("--worker", nargs=3, metavar=("FRAMEWORK", "JOB", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        framework, job, answer = arguments.worker
        result = WORKERS[framework](json.loads(Path(job).read_text(encoding="utf-8")))
        Path(answer).write_text(json.dumps(result), encoding="utf-8")
        return
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the processes that measure
    chosen = arguments.only.split(",")
    unknown = [name for name in chosen if name not in FRAMEWORKS]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(FRAMEWORKS)}")
    notes = []
    if any(name.startswith("trl") for name in chosen):
        if arguments.shape == "multiturn":
            notes.append(NO_TRL_TURNS)
        elif arguments.trl_python is None:
            notes.append(NO_TRL)
        if notes:
            chosen = [name for name in chosen if not name.startswith("trl")]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        prepared, shape = jobs(arguments.shape, chosen, arguments.warm_up + arguments.steps, root)
        for round_number in range(arguments.repeats):
            for name, job in prepared.items():
                directory = root / f"{name}-{round_number}"
                directory.mkdir()
                interpreter = arguments.trl_python if name.startswith("trl") else sys.executable
                load = os.getloadavg()[0]
                result = measure(name, {**job, "run": str(directory / "run")}, interpreter, directory)
                results[name].append({**result, "load_before": load})
                taken = " ".join(f"{step['rollout']:.2f}+{step['update']:.2f}" for step in result["steps"])
                print(f"round {round_number + 1}, {name}: rollout+update {taken} s, load {load:.1f}", flush=True)
            summaries = {name: summarise(found, arguments.warm_up) for name, found in results.items()}
            if arguments.json is not None:  # after every round, for the last may be far away
                written = {
                    "shape": shape,
                    "warm_up": arguments.warm_up,
                    "notes": notes,
                    "settings": {name: job["settings"] for name, job in prepared.items() if "settings" in job},
                    "medians": summaries,
                    "runs": results,
                }
                arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    show(summaries, notes)


if __name__ == "__main__":
    main()
