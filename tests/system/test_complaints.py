"""What users of every trainer of vision-language models complain of most: one test each, for every family.

Each fault is made on purpose where it can be, and must be refused or have no way in.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rllava_core.errors import InvariantError, ModelError
from rllava_core.mdp.messages import Message
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.batch import BatchBuilder
from rllava_core.policy.checks import check_length
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.testing.rollouts import Script, Shown, conversation_scripts, pack, picture, play
from rllava_core.training.seeds import seed_everything
from rllava_core.training.sight import UNSEEN, probe

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2vl": ("Qwen2VL", "Qwen2VLOptions", {"from_scratch": "tiny"}),
    "qwen3vl": ("Qwen2VL", "Qwen2VLOptions", {"from_scratch": "tiny-qwen3"}),
    "llava": ("Llava", "LlavaOptions", {"from_scratch": "tiny"}),
    "llava_next": ("Llava", "LlavaOptions", {"from_scratch": "tiny-next"}),
    "smolvlm": ("SmolVLM", "SmolVLMOptions", {"from_scratch": "tiny", "split_images": True}),
}
PACKAGES = {"Qwen2VL": "rllava_qwen2vl", "Llava": "rllava_llava", "SmolVLM": "rllava_smolvlm"}


@pytest.fixture(params=FAMILIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    """The tiny model of a family, random weights."""
    adapter, options, values = FAMILIES[request.param]
    package = PACKAGES[adapter]
    pytest.importorskip(package, reason=f"{package.replace('_', '-')} is not installed")
    config = getattr(importlib.import_module(f"{package}.config"), options)(**values)
    made = getattr(importlib.import_module(f"{package}.adapter"), adapter)(config)
    seed_everything(3)
    return Policy(made, made.load()).eval()


def scripts() -> list[Script]:
    """Prompts with one image, none and several, of other sizes each."""
    return [
        (Shown((picture(16, 16), "Colour?")),),
        (Shown(("Two and two?",), max_tokens=3),),
        (Shown(("Is ", picture(16, 40, 1), " like ", picture(24, 16, 2), picture(32, 32, 3), "?"), max_tokens=9),),
        *conversation_scripts(),
    ]


def alone(policy: Policy, trajectories: list[Trajectory]) -> Tensor:
    with torch.no_grad():
        return torch.cat([policy(pack(policy, [trajectory])).logprobs for trajectory in trajectories])


def test_image_tokens_that_do_not_match_the_features(policy: Policy) -> None:
    """One placeholder lost or gained, or an image lost, is an error that names the example, before any forward."""
    [trajectory] = play(policy, [(Shown((picture(16, 16), "Colour?")),)])
    segment = trajectory.turns[0].observation
    token = policy.adapter.image_token
    place = segment.tokens.index(token)
    lost = (*segment.tokens[:place], *segment.tokens[place + 1 :])
    gained = (*segment.tokens[:place], token, *segment.tokens[place:])
    for wrong in (
        replace(segment, tokens=lost),
        replace(segment, tokens=gained),
        replace(segment, images=()),
        replace(segment, images=(*segment.images, picture(16, 16, 1))),
    ):
        with pytest.raises(InvariantError, match="example 7"):
            BatchBuilder(policy.adapter, MediaStore(policy.adapter)).add_context((wrong,), "example 7")


def test_a_sampled_placeholder_token(policy: Policy) -> None:
    """It has probability zero, however much the model wants it, and an episode that holds one is not trained on."""
    adapter = policy.adapter
    with torch.no_grad():
        adapter.lm_head(policy.model).weight[adapter.image_token] *= 1000.0
    played = play(policy, [(Shown((picture(16, 16), "Colour?"), max_tokens=30),)], group_size=8)
    sampled = {token for trajectory in played for action in trajectory.actions for token in action.tokens}
    assert not sampled & set(adapter.forbidden_tokens)
    states = torch.randn(4, policy.model.config.get_text_config().hidden_size)
    assert (policy.next_token_logprobs(states)[:, list(adapter.forbidden_tokens)] == -torch.inf).all()
    turn = played[0].turns[0]
    tokens = (adapter.image_token, *turn.action.tokens[1:])
    smuggled = replace(played[0], turns=(replace(turn, action=replace(turn.action, tokens=tokens)),))
    with pytest.raises(InvariantError, match=str(adapter.image_token)):
        pack(policy, [smuggled])


def test_wrong_slices_of_pixel_values(policy: Policy) -> None:
    """In every micro-batch, in any order, each sequence is computed from its own images."""
    played = play(policy, scripts(), group_size=2)
    order = torch.randperm(len(played), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [played[number] for number in order]
    expected = alone(policy, shuffled)
    for size in (1, 3, len(shuffled)):
        with torch.no_grad():
            found = [
                policy(pack(policy, shuffled[start : start + size])).logprobs for start in range(0, len(shuffled), size)
            ]
        torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-4)


def test_several_images_in_a_prompt(policy: Policy) -> None:
    """As the family's own processor and the model's own forward have it; and every image counts, in its place."""
    adapter: Any = policy.adapter
    first, second = picture(16, 40, 1), picture(24, 16, 2)

    def logits(*parts: Any) -> Tensor:
        tokens = adapter.own_tokens([Message.user(*parts)])
        images = [part for part in parts if not isinstance(part, str)]
        features = [adapter.preprocess(image) for image in images]
        assert tokens == adapter.render([Message.user(*parts)], features)
        with torch.no_grad():
            return policy.model(**adapter.own_inputs(tokens, images)).logits[0, -1]

    [trajectory] = play(policy, [(Shown(("From ", first, " to ", second, "?"), tuple("01")),)])
    plain = logits("From ", first, " to ", second, "?")
    ids = [adapter.encode(choice)[-1] for choice in "01"]
    if all(len(adapter.encode(choice)) == 1 for choice in "01"):
        own = torch.log_softmax(plain[ids], dim=0)[trajectory.actions[0].choice]
        assert float(trajectory.behaviour_logprobs[0]) == pytest.approx(float(own), abs=1e-4)
    for other in (
        logits("From ", second, " to ", first, "?"),
        logits("From ", first, " to ", picture(24, 16, 9), "?"),
        logits("From ", picture(16, 40, 9), " to ", second, "?"),
    ):
        assert (other - plain).abs().max() > 1e-3


def test_the_side_of_the_padding(policy: Policy) -> None:
    """A short sequence beside a long one is what it is alone, while sampling and while training."""
    short = (Shown((picture(16, 16), "?"), max_tokens=4),)
    long = (Shown((picture(32, 32, 1), "a question that is so long that the other is padded"), max_tokens=9),)
    greedy = [play(policy, [script], seed=None)[0] for script in (short, long)]
    together = play(policy, [short, long], seed=None)
    assert [item.actions[0].tokens for item in together] == [item.actions[0].tokens for item in greedy]
    with torch.no_grad():
        found = policy(pack(policy, together)).logprobs
    torch.testing.assert_close(found, alone(policy, together), rtol=0, atol=1e-4)


def test_truncation_through_an_image(policy: Policy) -> None:
    """Nothing is ever cut: a prompt that is too long is refused, and the message says how long it is."""
    [trajectory] = play(policy, [(Shown((picture(32, 32), "Colour?")),)])
    length = len(trajectory.turns[0].observation.tokens)
    policy.adapter.context_length = length - 1
    with pytest.raises(ModelError, match=rf"{length} tokens, the model's context is {length - 1}"):
        check_length(length, policy.adapter, "example 7")
    with pytest.raises(ModelError, match=f"context is {length - 1}"):
        play(policy, [(Shown((picture(32, 32), "Colour?")),)])
    with pytest.raises(ModelError, match=f"context is {length - 1}"):
        pack(policy, [trajectory])


def test_a_trainer_that_never_saw_the_image(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers depend on images, and gradients reach what sees them; where not, every evaluation says so."""
    played = play(policy, scripts())
    seen = probe(policy, MediaStore(policy.adapter), played)
    assert seen["image/influence"] > 1e-3
    assert seen["image/gradient_vision"] > 0
    assert seen["image/gradient_connector"] > 0

    collate = policy.adapter.collate

    def blind(features: Any) -> dict[str, Tensor]:
        media = collate(features)
        return {**media, "pixel_values": torch.full_like(media["pixel_values"], 0.5)}

    monkeypatch.setattr(policy.adapter, "collate", blind)

    assert probe(policy, MediaStore(policy.adapter), played)["image/influence"] <= UNSEEN


def test_a_picture_in_a_later_turn_is_seen_there_and_not_before(policy: Policy) -> None:
    """The trainer sees what the rollout saw, turn by turn."""
    played = play(policy, conversation_scripts())
    expected = torch.from_numpy(np.concatenate([trajectory.behaviour_logprobs for trajectory in played]))
    with torch.no_grad():
        found = policy(pack(policy, played)).logprobs
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    trajectory = played[0]
    shown = trajectory.turns[1].observation
    other: dict[int, Any] = {id(shown): replace(shown, images=(picture(*shown.images[0].pixels.shape[:2], 77),))}
    changed = replace(
        trajectory,
        turns=tuple(
            replace(turn, context=tuple(other.get(id(item), item) for item in turn.context))
            for turn in trajectory.turns
        ),
    )
    with torch.no_grad():
        before, after = (policy(pack(policy, [item])).logprobs for item in (trajectory, changed))
    first = trajectory.actions[0].decisions
    torch.testing.assert_close(after[:first], before[:first], rtol=0, atol=1e-5)
    assert (after[first:] - before[first:]).abs().max() > 1e-4
