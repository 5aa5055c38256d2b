"""The policy on SmolVLM and Idefics3 gives what transformers gives for each sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rllava_core.mdp.trajectory import ContextSegment
from rllava_core.policy.media import MediaStore
from rllava_core.policy.sampling import Request, Sampler
from rllava_core.testing.rollouts import Script, Shown, pack, play


def scripts(bench: Any) -> list[Script]:
    """Free text and choices, none and several images of several numbers of tiles, new ones in later turns."""
    square, wide, tall = bench.picture(16, 16), bench.picture(64, 32, 1), bench.picture(32, 64, 2)
    return [
        (Shown((square, "Which?"), max_tokens=5),),
        (Shown(("Two and two?",), max_tokens=7),),
        (Shown(("Is ", wide, " like ", square, " or ", tall, "?"), ("yes", "no", "a bit")),),
        (Shown((tall, wide), max_tokens=3), Shown(("And ", square, "?"), ("up", "down")), Shown((wide, "So?"))),
    ]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("preset", ["tiny", "tiny-idefics3"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_mixed_batch_equals_transformers_on_each_sequence(
    bench: Any, preset: str, split: bool, temperature: float
) -> None:
    policy = bench.policy(temperature, from_scratch=preset, split_images=split)
    trajectories = play(policy, scripts(bench), 2, 0)
    with torch.no_grad():
        found = policy(pack(policy, trajectories)).logprobs

    expected = torch.cat([bench.plain_logprobs(policy, trajectory) for trajectory in trajectories])

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["tiny", "tiny-idefics3"])
def test_a_batch_equals_that_of_the_real_processor(bench: Any, preset: str) -> None:
    """transformers pads short texts and missing tiles; here nothing is padded but the text."""
    policy = bench.policy(from_scratch=preset, split_images=True)
    adapter, model = policy.adapter, policy.model
    chosen = [bench.conversations()[name] for name in ("an image alone", "images around the text", "text alone")]
    inputs = bench.processed(adapter.processor, *chosen)
    assert inputs["pixel_values"].shape[:2] == (3, 3 + 3 + 5)

    with torch.no_grad():
        together = model(**inputs).logits
        for row, messages in enumerate(chosen):
            tokens, features = bench.rendered(adapter, messages)
            alone = model(input_ids=torch.tensor([tokens]), **(adapter.collate(features) if features else {})).logits[0]
            torch.testing.assert_close(together[row][inputs["attention_mask"][row].bool()], alone, rtol=0, atol=1e-4)


def test_greedy_decoding_equals_that_of_transformers(bench: Any) -> None:
    policy = bench.policy(split_images=True)
    adapter: Any = policy.adapter
    requests, expected = [], []
    for name, messages in bench.conversations().items():
        tokens, features = bench.rendered(adapter, messages)
        images = tuple(part.image for one in messages for part in one.parts if hasattr(part, "image"))
        requests.append(Request((ContextSegment(tuple(tokens), images),), 1, 10, name))
        inputs = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}
        if features:
            pictures = [[image.to_pil() for image in images]]
            inputs |= dict(adapter.processor.image_processor(images=pictures, return_tensors="pt"))
        answer = policy.model.generate(**inputs, max_new_tokens=10, do_sample=False)[0].tolist()
        expected.append(answer[len(tokens) :])

    answers = Sampler(policy, MediaStore(adapter)).sample(requests, None)

    assert [list(action.tokens) for [action] in answers] == expected
    assert len({tuple(answer) for answer in expected}) > 1


def test_every_weight_belongs_to_its_part(bench: Any) -> None:
    policy = bench.policy()
    parts = {name: policy.adapter.part_of(name) for name, _ in policy.model.named_parameters()}
    assert {name for name, part in parts.items() if part == "connector"} == {
        "model.connector.modality_projection.proj.weight"
    }
    assert all(part == "vision" for name, part in parts.items() if "vision_model" in name)
    assert all(part == "language" for name, part in parts.items() if "text_model" in name or "lm_head" in name)
    assert set(parts.values()) == {"vision", "connector", "language"}
