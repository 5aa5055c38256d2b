"""Make a folder of PNG files and a JSONL file beside it, as you would have of your own data.

    uv run python examples/folder_of_images.py shapes/
    uv run rllava train examples/jsonl.yaml task.dataset.path=shapes/train.jsonl

Each example shows one or two pictures, of different sizes, and asks how many squares there are in all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

EXAMPLES = 600


def main(directory: Path) -> None:
    """Write `train.jsonl` and `images/`."""
    generator = np.random.default_rng(0)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(EXAMPLES):
        names, total = [], 0
        for part in range(int(generator.integers(1, 3))):
            squares = int(generator.integers(0, 3))
            name = f"images/{number:04d}-{part}.png"
            _draw(generator, squares).save(directory / name)
            names.append(name)
            total += squares
        lines.append(json.dumps({"image": names, "question": "How many squares?", "answer": str(total)}))
    (directory / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{EXAMPLES} examples in {directory / 'train.jsonl'}")


def _draw(generator: np.random.Generator, squares: int) -> Image.Image:
    width, height = (int(side) for side in generator.choice([32, 40, 48], 2))
    picture = Image.new("RGB", (width, height), "white")
    corners = [(4, 4), (width - 14, 4), (4, height - 14), (width - 14, height - 14)]
    for place in generator.permutation(4)[:squares]:
        x, y = corners[place]
        ImageDraw.Draw(picture).rectangle(
            [x, y, x + 9, y + 9], fill=tuple(int(c) for c in generator.integers(0, 160, 3))
        )
    return picture


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "shapes"))
