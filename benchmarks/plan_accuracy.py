"""How close `rllava plan` comes to what runs take: the peak of resident memory on the CPU, predicted and measured.

    uv run python benchmarks/plan_accuracy.py [--only NAME] [--json FILE]

Each run is `rllava train` in a process of its own, for two steps, on a checkpoint of random weights that is saved for
it: the real architecture of a family at some hundred MB. Measured is the largest resident size less that of the process
when it had imported everything and loaded nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rllava_core.cli.heap import TUNABLES

PREDICTED_WITHIN = 0.1

TRAIN = """
import importlib, resource, sys
for name in {modules!r}:
    importlib.import_module(name)
baseline = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
from rllava_core.cli import rllava
rllava(["train", *sys.argv[1:]], standalone_mode=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("MEASURED", peak - baseline)
"""


@dataclass(frozen=True)
class Case:
    """One run.

    preset: the tiny model that is scaled up; text, vision: what of its config is changed.
    image: width and height; prompt: words of the question.
    """

    adapter: str
    kind: str
    preset: str
    text: dict[str, Any]
    vision: dict[str, Any]
    image: tuple[int, int]
    answer_tokens: int
    prompts: int
    algorithm: str
    model: str = ""
    train: str = ""
    training: str = "micro_batch_tokens: 16384"
    question: str = "What is it?"


TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
QWEN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}}
EYES = {"hidden_size": 384, "num_heads": 6, "depth": 6}

CASES = {
    "qwen2.5 full": Case(
        *("qwen2vl", "Qwen2VL", "tiny-qwen2.5"),
        {**TEXT, **QWEN, "num_key_value_heads": 4, "vocab_size": 32000, "num_hidden_layers": 12},
        {**EYES, "intermediate_size": 1024, "out_hidden_size": 512},
        *((64, 64), 24, 2),
        "{name: grpo, group_size: 4}",
    ),
    "qwen2.5 mixed precision": Case(
        *("qwen2vl", "Qwen2VL", "tiny-qwen2.5"),
        {**TEXT, **QWEN, "num_key_value_heads": 4, "vocab_size": 32000, "num_hidden_layers": 12},
        {**EYES, "intermediate_size": 1024, "out_hidden_size": 512},
        *((64, 64), 24, 16),
        "{name: grpo, group_size: 4}",
        train="mixed_precision: bf16",
    ),
    "qwen3 large vocabulary": Case(
        *("qwen2vl", "Qwen2VL", "tiny-qwen3"),
        {**TEXT, **QWEN, "head_dim": 64, "num_key_value_heads": 4, "vocab_size": 152000},
        {**EYES, "intermediate_size": 1024, "out_hidden_size": 512},
        *((64, 64), 24, 2),
        "{name: grpo, group_size: 4, entropy_coefficient: 0.01}",
    ),
    "qwen2 long": Case(
        *("qwen2vl", "Qwen2VL", "tiny"),
        {**TEXT, **QWEN, "num_key_value_heads": 2, "vocab_size": 8000, "num_hidden_layers": 12},
        {"hidden_size": 512, "embed_dim": 384, "num_heads": 6, "depth": 6},
        *((64, 64), 16, 2),
        "{name: grpo, group_size: 8}",
        question="What is it? " * 60,
        training="micro_batch_tokens: 1024",
    ),
    "qwen2 three micro-batches": Case(
        *("qwen2vl", "Qwen2VL", "tiny"),
        {**TEXT, **QWEN, "num_key_value_heads": 2, "vocab_size": 8000, "num_hidden_layers": 12},
        {"hidden_size": 512, "embed_dim": 384, "num_heads": 6, "depth": 6},
        *((64, 64), 16, 5),
        "{name: grpo, group_size: 8}",
        question="What is it? " * 60,
        training="micro_batch_tokens: 1900",
    ),
    "qwen3 8 bits on the CPU": Case(
        *("qwen2vl", "Qwen2VL", "tiny-qwen3"),
        {**TEXT, **QWEN, "head_dim": 64, "num_key_value_heads": 4, "vocab_size": 152000},
        {**EYES, "intermediate_size": 1024, "out_hidden_size": 512},
        *((64, 64), 24, 2),
        "{name: grpo, group_size: 4, entropy_coefficient: 0.01}",
        train="optimizer: adamw_8bit, optimizer_on_cpu: true",
    ),
    "llava LoRA, reference": Case(
        *("llava", "Llava", "tiny"),
        {**TEXT, "num_key_value_heads": 8, "vocab_size": 32064, "num_hidden_layers": 16},
        {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 8},
        *((64, 64), 24, 2),
        "{name: grpo, group_size: 4, kl_coefficient: 0.01}",
        model="train: {vision: frozen, connector: full, language: lora}, lora: {rank: 16}",
        question="What is it? " * 30,
    ),
    "smolvlm tiles, reference": Case(
        *("smolvlm", "SmolVLM", "tiny"),
        {**TEXT, "num_key_value_heads": 4, "vocab_size": 49280},
        {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 6},
        *((128, 128), 16, 2),
        "{name: grpo, group_size: 4, kl_coefficient: 0.01}",
        model="split_images: true",
    ),
    "llava critic": Case(
        *("llava", "Llava", "tiny-next"),
        {**TEXT, "num_key_value_heads": 8, "vocab_size": 16000},
        {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 6},
        *((64, 64), 16, 4),
        "{name: ppo, critic: separate, minibatches: 2, epochs: 1}",
    ),
}


def prepare(case: Case, folder: Path) -> Path:
    """Write the checkpoint, the pictures and the config of a case. Returns the config's path."""
    import importlib

    import numpy as np
    import PIL.Image
    import torch

    package = f"rllava_{case.adapter}"
    options = getattr(importlib.import_module(f"{package}.config"), f"{case.kind}Options")(from_scratch=case.preset)
    adapter = getattr(importlib.import_module(f"{package}.adapter"), case.kind)(options)
    with torch.device("meta"):
        config = adapter.load().config
    text, vision = config.get_text_config(), config.vision_config
    if hasattr(text, "layer_types") and "num_hidden_layers" in case.text:
        text.layer_types = ["full_attention"] * case.text["num_hidden_layers"]
    for part, changes in ((text, case.text), (vision, case.vision)):
        for name, value in changes.items():
            setattr(part, name, value)
    if hasattr(vision, "fullatt_block_indexes"):
        vision.fullatt_block_indexes = [vision.depth - 1]
    if hasattr(text, "head_dim") and "head_dim" not in case.text:
        text.head_dim = text.hidden_size // text.num_attention_heads
    if hasattr(text, "max_position_embeddings"):
        text.max_position_embeddings = 8192
    model = type(adapter.load())(config)
    adapter.save(model, folder / "model")
    noise = np.random.default_rng(0)
    for split, count in (("train", 2 * case.prompts), ("test", 2)):
        lines = []
        for number in range(count):
            name = f"{split}-{number}.png"
            PIL.Image.fromarray(noise.integers(0, 255, (*case.image[::-1], 3), dtype=np.uint8)).save(folder / name)
            lines.append(json.dumps({"image": name, "question": case.question, "answer": "a"}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    written = folder / "config.yaml"
    written.write_text(
        f"""\
model: {{adapter: {case.adapter}, path: {folder / "model"}{", " + case.model if case.model else ""}}}
algorithm: {case.algorithm}
task:
  dataset: {{name: jsonl, path: {folder / "train.jsonl"}, held_out_path: {folder / "test.jsonl"}}}
  prompt: "{{question}}"
  max_new_tokens: {case.answer_tokens}
  rewards: [{{name: exact_match}}]
engine: {{train: {{name: local, device: cpu{", " + case.train if case.train else ""}}}}}
training: {{steps: 2, prompts_per_step: {case.prompts}, eval_episodes: 2, {case.training}}}
""",
        encoding="utf-8",
    )
    return written


def prompt_tokens(case: Case, config: Path) -> int:
    """Tokens of the question with its template, which the tokenizer of bytes makes of it."""
    import numpy as np

    from rllava_core.config import load
    from rllava_core.mdp.images import Image
    from rllava_core.mdp.messages import Message
    from rllava_core.plugins import load_plugins

    adapter = load(config, [], load_plugins()).model.create()
    picture = Image.from_array(np.zeros((*case.image[::-1], 3), dtype=np.uint8))
    rendered = adapter.render([Message.user(picture, case.question)], [adapter.preprocess(picture)])
    return len(rendered) - rendered.count(adapter.image_token)


def predict(case: Case, config: Path) -> dict[str, Any]:
    width, height = case.image
    words = str(prompt_tokens(case, config))
    command = [sys.executable, "-c", "from rllava_core.cli import main; main()", "plan", str(config), "--json"]
    command += ["--image", f"{width}x{height}", "--prompt-tokens", words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(case: Case, config: Path) -> int:
    modules = [
        *("torchvision", "peft", "rllava_core.training.loop", "rllava_core.engines.local_train"),
        *("rllava_core.engines.local_rollout", "rllava_grpo.algorithm", "rllava_ppo.algorithm"),
        *(f"rllava_{case.adapter}.adapter", "rllava_vqa.rewards", "rllava_vqa.datasets.jsonl"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.format(modules=modules), str(config), "--run-dir", str(config.parent / "run")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GLIBC_TUNABLES": TUNABLES},  # as `rllava train` begins
    )
    if done.returncode != 0:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return int(done.stdout.rpartition("MEASURED ")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one case")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    rows = []
    print(f"{'':26} {'predicted':>10} {'measured':>10} {'ratio':>6}  worst phase", flush=True)
    for name in [arguments.only] if arguments.only else CASES:
        with tempfile.TemporaryDirectory() as folder:
            config = prepare(CASES[name], Path(folder))
            plan = predict(CASES[name], config)
            measured = measure(CASES[name], config)
        predicted = plan["host_peak_bytes"]
        ratio = predicted / measured
        worst = max(plan["phases"], key=lambda phase: phase["host_total"])["name"]
        rows.append({"case": name, "predicted": predicted, "measured": measured, "ratio": ratio, "worst": worst})
        flag = "" if abs(ratio - 1) <= PREDICTED_WITHIN else "  MISSED"
        print(
            f"{name:26} {predicted / 2**20:>6.0f} MiB {measured / 2**20:>6.0f} MiB {ratio:>6.3f}  {worst}{flag}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
