"""Read the held-out digits with a trained checkpoint and plain transformers: nothing of rllava is imported.

    uv run python examples/plain_transformers.py runs/digits-001

Prints the success rate, and how many answers are the ones that `rllava eval RUN_DIR` wrote to RUN_DIR/eval/.
A run with `choices` is read by the most probable choice; one without writes its answer with `generate`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModelForImageTextToText, AutoProcessor

QUESTION = "Which digit?"


def main(run: Path) -> None:
    """Compare the newest checkpoint's answers with the run's evaluation."""
    checkpoint = max((run / "checkpoints").glob("step-*"))
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    has_choices = yaml.safe_load((run / "config.yaml").read_text())["task"]["choices"] is not None
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    digits = load_digits()
    answers = {}
    for number in range(0, len(digits.images), 5):
        pixels = np.round(digits.images[number] * 255 / 16).astype(np.uint8)
        inputs = processor(text=[prompt], images=[Image.fromarray(pixels).convert("RGB")], return_tensors="pt")
        with torch.inference_mode():
            read = _choose if has_choices else _write
            answers[f"digits:{number}"] = read(model, processor, inputs)
    right = [answers[name] == str(digits.target[int(name.partition(":")[2])]) for name in answers]
    print(f"plain transformers: {np.mean(right):.4f} of {len(right)} held-out scans")
    evaluated = run / "eval" / "answers.jsonl"
    if evaluated.exists():
        ours = {line["name"]: line["answer"] for line in map(json.loads, evaluated.read_text().splitlines())}
        same = sum(answers[name] == ours[name] for name in answers)
        print(f"the same answer as `rllava eval` on {same} of {len(ours)}")


def _choose(model, processor, inputs) -> str:
    logits = model(**inputs).logits[0, -1]
    tokens = processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
    return str(int(logits[tokens].argmax()))


def _write(model, processor, inputs) -> str:
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return processor.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
