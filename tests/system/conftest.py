"""Fixtures for tests with the real plugins: pictures and questions about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

PLUGINS = ("rllava_qwen2vl", "rllava_grpo", "rllava_vqa")

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 60, 210)}

CONFIG = """\
model: {adapter: qwen2vl, from_scratch: tiny}
algorithm: {name: grpo, group_size: 4, entropy_coefficient: 0.01}
task:
  dataset: {name: jsonl, path: train.jsonl, held_out_path: test.jsonl, image: images, question: problem}
  prompt: "{question} Answer with one word."
  max_new_tokens: 3
  rewards: [{name: exact_match, weight: 0.9}, {name: answer_format, weight: 0.1}]
training: {steps: 3, prompts_per_step: 6, learning_rate: 1.0e-3, eval_every: 2, save_every: 2}
"""


@pytest.fixture(autouse=True)
def _real_plugins() -> None:
    for name in PLUGINS:
        pytest.importorskip(name, reason=f"{name.replace('_', '-')} is not installed")


def picture(colour: str, size: tuple[int, int], seed: int = 0) -> PIL.Image.Image:
    """A noisy patch of one colour, size as (width, height)."""
    noise = np.random.default_rng(seed).integers(-30, 30, (size[1], size[0], 3))
    return PIL.Image.fromarray((np.array(COLOURS[colour]) + noise).astype(np.uint8))


@pytest.fixture
def write_examples(tmp_path: Path) -> Callable[..., Path]:
    """`write_examples("train.jsonl", [(1, (40, 30)), …], choices=True)`: a line for each count and size of pictures."""

    def write(name: str, shapes: Sequence[tuple[int, tuple[int, int]]], *, choices: bool = False) -> Path:
        (tmp_path / "pictures").mkdir(exist_ok=True)
        lines = []
        for number, (count, size) in enumerate(shapes):
            colour = list(COLOURS)[number % 3]
            files = []
            for part in range(count):
                file = f"pictures/{Path(name).stem}-{number}-{part}.png"
                picture(colour, (size[0] + 16 * part, size[1]), seed=number).save(tmp_path / file)
                files.append(file)
            line: dict[str, Any] = {"images": files, "problem": f"Question {number}: which colour?", "answer": colour}
            if choices:
                line["options"] = sorted(COLOURS)[:: 1 if number % 2 else -1]
            lines.append(json.dumps(line))
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def picture_task(tmp_path: Path, write_examples: Callable[..., Path]) -> Path:
    """A config, `task.yaml`, of questions about one, two or three pictures of different sizes."""
    sizes = [(40, 30), (64, 64), (33, 57), (120, 24), (8, 8), (200, 150)]
    write_examples("train.jsonl", [(1 + number % 3, sizes[number % 6]) for number in range(12)], choices=True)
    write_examples("test.jsonl", [(1 + number % 3, sizes[number % 5]) for number in range(6)], choices=True)
    path = tmp_path / "task.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path
