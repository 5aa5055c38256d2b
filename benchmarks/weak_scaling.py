"""Weak scaling on one machine: two processes of one thread each, with twice the prompts, against one of one thread.

    uv run python benchmarks/weak_scaling.py [--shape base|digits] [--repeats 5] [--parallel ddp|fsdp] [--json FILE]

Throughput is sampled and trained trajectories a second over the measured steps of a real run (`rllava train`, GRPO),
evaluations and start left out. The two take turns; medians of all rounds are compared.

base: a model of 14 million parameters, 4 prompts a process with images of 256 tokens, 8 answers of 32 tokens.
digits: the README's example, whose model of 0.27 million leaves half of a step to Python. What every process does of
all trajectories (gather, score, prepare) then counts most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "digits.yaml"
PROMPTS = {"digits": 32, "base": 4}
STEPS = {"digits": 12, "base": 5}
WARM_UP = 2
BAR = 1.7


def config_of(shape: str, steps: int, directory: Path) -> Path:
    """A config, and for a shape of `workloads` the model and the data beside it."""
    if shape == "digits":
        return EXAMPLE
    import workloads

    path = directory / "config.yaml"
    workloads.write_model(workloads.BASE, directory / "model")
    data = workloads.write_data(workloads.BASE, directory / "data", 2 * PROMPTS[shape] * steps)
    workloads.write_config(workloads.BASE, directory / "model", data, path, steps, shared=True)
    # `workloads` is a plugin; for runs in processes of their own it must be an installed one.
    installed = directory / "rllava_workloads-0.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: rllava-workloads\nVersion: 0.0\n", encoding="utf-8"
    )
    (installed / "entry_points.txt").write_text("[rllava]\nworkloads = workloads\n", encoding="utf-8")
    return path


def throughput(shape: str, config_path: Path, processes: int, parallel: str, steps: int, run: Path) -> float:
    """Trajectories a second."""
    prompts = PROMPTS[shape] * processes
    overrides = [
        f"training.prompts_per_step={prompts}",
        f"training.steps={WARM_UP + steps}",
        *("training.eval_every=0", "training.eval_episodes=8", "training.save_every=0", "training.sample_every=0"),
        *("engine.train.device=cpu", f"engine.train.parallel={parallel}"),
    ]
    command = [sys.executable, "-m", "rllava_core", "train", str(config_path), *overrides, "--run-dir", str(run)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(config_path.parent)]),
    }
    more = ["--num-processes", str(processes)] if processes > 1 else []
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{processes} processes failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    config = (run / "config.yaml").read_text(encoding="utf-8")
    group = next(int(line.split(":")[1]) for line in config.splitlines() if line.strip().startswith("group_size:"))
    laps = ("rollout", "reward", "update", "sync")
    seconds = [sum(line[f"time/{lap}"] for lap in laps) for line in lines if line["step"] > WARM_UP]
    return prompts * group / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(PROMPTS), default="base")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, help="measured steps of each run; default: by the shape")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    arguments = parser.parse_args()
    steps = arguments.steps or STEPS[arguments.shape]
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        config = config_of(arguments.shape, WARM_UP + steps, directory)
        for number in range(1, arguments.repeats + 1):
            for processes, values in found.items():
                run = directory / f"round-{number}-of-{processes}"
                values.append(throughput(arguments.shape, config, processes, arguments.parallel, steps, run))
                print(f"round {number}, {processes}: {values[-1]:.2f} trajectories/s", flush=True)
    ratios = [two / one for one, two in zip(found[1], found[2], strict=True)]
    medians = {processes: statistics.median(values) for processes, values in found.items()}
    print(f"medians: {medians[1]:.2f} and {medians[2]:.2f} trajectories/s: {medians[2] / medians[1]:.2f} times")
    print(f"round by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)} (bar: {BAR})")
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"shape": arguments.shape, "parallel": arguments.parallel, **found}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
