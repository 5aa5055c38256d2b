"""The policy on a LLaVA gives what transformers gives for each sequence alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Message
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Trajectory, conversation
from rllava_core.policy.batch import BatchBuilder
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy

PRESETS = ("tiny", "tiny-next", "tiny-onevision")


@pytest.mark.parametrize("preset", PRESETS)
def test_hidden_states_of_a_batch_are_those_of_transformers_alone(bench: Any, preset: str) -> None:
    """Given the inputs that the family's own processor makes."""
    torch.manual_seed(0)
    adapter = bench.adapter(preset)
    model = adapter.load().eval()
    conversations = list(bench.conversations().values())
    rows = []
    for messages in conversations:
        features = [adapter.preprocess(image) for image in bench.images(messages)]
        rows.append((adapter.render(messages, features), features))
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([[*row, *[adapter.pad_token] * (longest - len(row))] for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])

    with torch.no_grad():
        states = adapter.hidden_states(
            model,
            tokens=tokens,
            attention_mask=mask,
            positions=torch.arange(longest).expand(1, len(rows), -1),
            media=adapter.collate([item for _, features in rows for item in features]),
            cache=DynamicCache(config=model.config),
        )
        for number, messages in enumerate(conversations):
            expected = model(**bench.processed(adapter, messages), use_cache=False).logits[0]
            found = adapter.lm_head(model)(states[number, : len(rows[number][0])])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_log_probs_of_an_episode_of_two_turns_are_those_of_the_whole_sequence(bench: Any, preset: str) -> None:
    torch.manual_seed(0)
    adapter = bench.adapter(preset)
    policy = Policy(adapter, adapter.load()).eval()
    first, second = Message.user(bench.picture(64, 32), "Which?"), Message.user("And ", bench.picture(8, 40, 1), "?")
    answers = [(*adapter.encode(text), adapter.end_of_turn[0]) for text in ("a wall", "7")]
    shown = []
    for messages, continues in (([first], False), ([second], True)):
        images = tuple(bench.images(messages))
        features = [adapter.preprocess(image) for image in images]
        shown.append(ContextSegment(adapter.render(messages, features, continues=continues), images))
    actions = [ActionSegment(tokens, np.full(len(tokens), -1, np.float32), "", True) for tokens in answers]
    segments = (shown[0], actions[0], shown[1], actions[1])
    trajectory = Trajectory(Example("train.jsonl:1"), 0, 0, conversation(segments), terminated=True)
    builder = BatchBuilder(adapter, MediaStore(adapter))
    builder.add_trajectory(trajectory)

    # The same conversation, rendered at once by the family's own processor; the answers are in it.
    told = Message("assistant", Message.user("a wall").parts)
    inputs = bench.processed(adapter, [first, told, second])
    whole = [*inputs["input_ids"][0].tolist(), *answers[1]]
    inputs["input_ids"] = torch.tensor([whole])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    with torch.no_grad():
        found = policy(builder.build()).logprobs
        table = torch.log_softmax(
            policy.model(**inputs, use_cache=False).logits[0].masked_fill(policy.forbidden, -torch.inf), dim=-1
        )

    places = [len(shown[0].tokens) + k for k in range(len(answers[0]))]
    places += [len(whole) - len(answers[1]) + k for k in range(len(answers[1]))]
    expected = torch.stack([table[place - 1, whole[place]] for place in places])
    assert whole == [token for segment in segments for token in segment.tokens]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_weight_belongs_to_a_part(bench: Any, preset: str) -> None:
    adapter = bench.adapter(preset)
    parts = {name: adapter.part_of(name) for name, _ in adapter.load().named_parameters()}
    for name, part in parts.items():
        expected = "vision" if "vision_tower" in name else "connector" if "projector" in name else "language"
        assert part == ("connector" if "newline" in name else expected), name
    assert set(parts.values()) == {"vision", "connector", "language"}
    assert ("model.image_newline" in parts) == (preset != "tiny")
