"""Weak scaling on one machine: two processes of one thread each, with twice the prompts, against one of one thread.

    uv run python benchmarks/weak_scaling.py [--repeats 5] [--parallel ddp|fsdp] [--steps 12] [--json FILE]

Throughput is sampled and trained trajectories a second over the measured steps of a real run (`rllava train` on the
scans of digits, GRPO), evaluations and start left out. The two take turns; medians of all rounds are compared.
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

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits.yaml"
PROMPTS, WARM_UP = 32, 3
BAR = 1.7


def throughput(processes: int, parallel: str, steps: int, directory: Path) -> float:
    """Trajectories a second."""
    overrides = [
        f"training.prompts_per_step={PROMPTS * processes}",
        f"training.steps={WARM_UP + steps}",
        *("training.eval_every=0", "training.eval_episodes=8", "training.save_every=0", "training.sample_every=0"),
        *("engine.train.device=cpu", f"engine.train.parallel={parallel}"),
    ]
    run = directory / f"of-{processes}"
    command = [sys.executable, "-m", "rllava_core", "train", str(EXAMPLE), *overrides, "--run-dir", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    more = ["--num-processes", str(processes)] if processes > 1 else []
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{processes} processes failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    config = (run / "config.yaml").read_text(encoding="utf-8")
    group = next(int(line.split(":")[1]) for line in config.splitlines() if line.strip().startswith("group_size:"))
    laps = ("rollout", "reward", "update", "sync")
    seconds = [sum(line[f"time/{lap}"] for lap in laps) for line in lines if line["step"] > WARM_UP]
    return PROMPTS * processes * group / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each run")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    arguments = parser.parse_args()
    found: dict[int, list[float]] = {1: [], 2: []}
    for round_number in range(arguments.repeats):
        for processes, values in found.items():
            with tempfile.TemporaryDirectory() as temporary:
                values.append(throughput(processes, arguments.parallel, arguments.steps, Path(temporary)))
            print(f"round {round_number + 1}, {processes}: {values[-1]:.0f} trajectories/s", flush=True)
    ratios = [two / one for one, two in zip(found[1], found[2], strict=True)]
    medians = {processes: statistics.median(values) for processes, values in found.items()}
    print(f"medians: {medians[1]:.0f} and {medians[2]:.0f} trajectories/s: {medians[2] / medians[1]:.2f} times")
    print(f"round by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)} (bar: {BAR})")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"parallel": arguments.parallel, **found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
