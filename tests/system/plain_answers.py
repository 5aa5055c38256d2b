"""Greedy answers to the first held-out digits, read with transformers alone. Prints JSON.

python plain_answers.py CHECKPOINT_WITH_CHOICES CHECKPOINT_WITH_TEXT COUNT
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModelForImageTextToText, AutoProcessor

SCANS = load_digits().images


def answers(checkpoint: str, count: int, choose: bool) -> list[str]:
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit?"}]}]
    prompt = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    digits = processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
    found = []
    for number in range(0, 5 * count, 5):
        scan = Image.fromarray(np.round(SCANS[number] * 255 / 16).astype(np.uint8)).convert("RGB")
        inputs = processor(text=[prompt], images=[scan], return_tensors="pt")
        with torch.inference_mode():
            if choose:
                found.append(str(int(model(**inputs).logits[0, -1, digits].argmax())))
            else:
                written = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
                found.append(processor.tokenizer.decode(written, skip_special_tokens=True))
    return found


if __name__ == "__main__":
    with_choices, with_text, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    result = {"choices": answers(with_choices, number, True), "text": answers(with_text, number, False)}
    result["rllava"] = [name for name in sys.modules if name.startswith("rllava")]
    sys.stdout.write(json.dumps(result))
