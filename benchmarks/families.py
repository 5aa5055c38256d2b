"""Every model family, from scratch and tiny: is it computed as its own library computes it, and does it learn to read?

For each preset of each installed adapter: the largest gap of `rllava parity` (nats, float32, pictures of several sizes
and counts), and `examples/digits.yaml` with the `model` section alone changed: held-out success after the last step,
and seconds. Chance is 0.10.

    python benchmarks/families.py [--seed 0] [--only NAME]... [--steps 500]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.yaml"

FAMILIES = {
    "Qwen2-VL": "{adapter: qwen2vl, from_scratch: tiny}",
    "Qwen2.5-VL": "{adapter: qwen2vl, from_scratch: tiny-qwen2.5}",
    "Qwen3-VL": "{adapter: qwen2vl, from_scratch: tiny-qwen3}",
    "Qwen3-VL-MoE": "{adapter: qwen2vl, from_scratch: tiny-qwen3-moe}",
    "LLaVA-1.5": "{adapter: llava, from_scratch: tiny}",
    "LLaVA-NeXT": "{adapter: llava, from_scratch: tiny-next}",
    "LLaVA-OneVision": "{adapter: llava, from_scratch: tiny-onevision}",
    "SmolVLM": "{adapter: smolvlm, from_scratch: tiny}",
    "Idefics3": "{adapter: smolvlm, from_scratch: tiny-idefics3}",
    "InternVL (any)": "{adapter: anyvlm, from_scratch: tiny}",
}


def rllava(*arguments: str) -> str:
    """What a command prints; it must succeed."""
    command = [sys.executable, "-c", "from rllava_core.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def measure(model: str, seed: int, steps: int, directory: Path) -> tuple[float, float, float]:
    """Largest gap in nats, held-out success, seconds."""
    tokens = directory / "tokens.jsonl"
    rllava("parity", str(EXAMPLE), f"model={model}", f"training.seed={seed}", "--output", str(tokens))
    gaps = []
    for line in tokens.read_text(encoding="utf-8").splitlines():
        values = [json.loads(line)[name] for name in ("sampled", "recomputed", "plain")]
        gaps.append(max(values) - min(values))
    run = directory / "run"
    options = [f"model={model}", f"training.seed={seed}", f"training.steps={steps}", "training.save_every=0"]
    rllava("train", str(EXAMPLE), *options, "--run-dir", str(run))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return max(gaps), summary["eval"]["last"]["success_rate"], summary["wall_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", action="append", choices=list(FAMILIES), metavar="NAME")
    arguments = parser.parse_args()
    print("| family | `model` | largest gap, nats | digits | seconds |")
    print("|---|---|---|---|---|")
    for name in arguments.only or FAMILIES:
        model = FAMILIES[name]
        with tempfile.TemporaryDirectory() as directory:
            gap, success, seconds = measure(model, arguments.seed, arguments.steps, Path(directory))
        shown = re.sub(r"[{}]", "", model)
        print(f"| {name} | `{shown}` | {gap:.1e} | {success:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
