"""The policy on Qwen2-VL gives what transformers gives for each sequence alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rllava_core.config import TrainingSection
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.local_train import LocalTrainEngine
from rllava_core.engines.protocol import TrainSetup
from rllava_core.mdp.messages import Message
from rllava_core.mdp.trajectory import ContextSegment
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request, Sampler
from rllava_qwen2vl.adapter import Qwen2VL
from rllava_qwen2vl.config import Qwen2VLOptions

Gradients = Callable[[Policy, Tensor], Mapping[str, Tensor]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_mixed_batch_equals_its_trajectories_one_by_one(bench: Any, gradients: Gradients, temperature: float) -> None:
    """Log-probs, entropies and gradients: M-RoPE under batching, several images a prompt, new images in later turns."""
    policy = bench.policy(temperature, precise=True)
    trajectories = bench.trajectories(policy.adapter)
    alone = [bench.plain_decisions(policy, trajectory) for trajectory in trajectories]
    logprobs, entropies = (torch.cat([pair[part] for pair in alone]) for part in range(2))
    generator = torch.Generator().manual_seed(0)
    push, spread = torch.randn(2, len(logprobs), generator=generator, dtype=torch.float64)
    expected = gradients(policy, (push * logprobs + spread * entropies).sum())

    output = policy(bench.pack(policy, trajectories))

    # The model's vision tower turns queries and keys in float32, whatever its precision.
    torch.testing.assert_close(output.logprobs, logprobs, rtol=0, atol=1e-8)
    torch.testing.assert_close(output.entropies, entropies, rtol=0, atol=1e-8)
    found = gradients(policy, (push * output.logprobs + spread * output.entropies).sum())
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6 * max(1.0, float(gradient.abs().max())))


def test_a_mixed_batch_in_float32_equals_transformers(bench: Any) -> None:
    """With the model exactly as transformers makes it."""
    policy = bench.policy()
    trajectories = bench.trajectories(policy.adapter)

    with torch.no_grad():
        expected = torch.cat([bench.plain_decisions(policy, trajectory)[0] for trajectory in trajectories])
        found = policy(bench.pack(policy, trajectories)).logprobs

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_both_attention_implementations_agree(bench: Any) -> None:
    outputs = []
    for attention in ("sdpa", "eager"):
        policy = bench.policy(attention=attention)
        assert policy.model.config._attn_implementation == attention
        with torch.no_grad():
            outputs.append(policy(bench.pack(policy, bench.trajectories(policy.adapter))).logprobs)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


def test_the_side_of_the_padding_does_not_move_the_image_tokens(bench: Any) -> None:
    """Peers lose mm_token_type_ids to the tokenizer's padding side; here a longer neighbour changes nothing."""
    policy = bench.policy(precise=True)
    adapter = policy.adapter
    short = bench.episode(bench.prompt(adapter, Message.user(bench.picture(8, 8), "?")), bench.text(adapter, "7"))
    long = bench.episode(
        bench.prompt(adapter, Message.user("A much longer question about ", bench.picture(64, 64), "?")),
        bench.text(adapter, "and a long answer"),
    )
    for side in ("left", "right"):
        adapter.tokenizer.padding_side = side
        found = policy(bench.pack(policy, [short, long, short])).logprobs
        expected = torch.cat([bench.plain_decisions(policy, one)[0] for one in (short, long, short)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def requests_of(bench: Any, adapter: Any, max_tokens: int = 10, count: int = 1) -> list[Request]:
    """One for every kind of conversation."""
    return [
        Request((bench.prompt(adapter, *messages),), count, max_tokens, name)
        for name, messages in bench.conversations().items()
    ]


def generated(bench: Any, policy: Any, request: Request) -> list[int]:
    """Greedy decoding by transformers, of one prompt alone."""
    [prompt] = request.context
    assert isinstance(prompt, ContextSegment)
    tokens = torch.tensor([list(prompt.tokens)])
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs["mm_token_type_ids"] = (tokens == policy.adapter.image_token).int()
    if prompt.images:
        pictures = [image.to_pil() for image in prompt.images]
        inputs |= dict(policy.adapter.processor.image_processor(images=pictures, return_tensors="pt"))
    answer: list[int] = policy.model.generate(**inputs, max_new_tokens=request.max_tokens, do_sample=False)[0].tolist()
    return answer[tokens.shape[1] :]


def test_greedy_decoding_equals_that_of_transformers(bench: Any) -> None:
    """All prompts in one batch here, each alone there; some answers end early, in any of several end tokens."""
    policy = bench.policy()
    requests = requests_of(bench, policy.adapter)
    free = [generated(bench, policy, request) for request in requests]
    ends = [policy.adapter.end_of_turn[0], free[0][2], free[3][5]]
    policy.model.generation_config.eos_token_id = ends
    policy.adapter.end_of_turn = tuple(ends)
    expected = [generated(bench, policy, request) for request in requests]

    answers = Sampler(policy, MediaStore(policy.adapter)).sample(requests, None)

    assert [list(action.tokens) for [action] in answers] == expected
    assert [action.ended for [action] in answers] == [answer[-1] in ends for answer in expected]
    assert len({len(answer) for answer in expected}) > 2
    assert {action.ended for [action] in answers} == {True, False}


def test_a_sampled_image_placeholder_is_impossible_here_and_in_transformers_generate(bench: Any) -> None:
    """Peers crash in the next forward pass: an image token without an image."""
    policy = bench.policy()
    model = policy.model
    placeholders = [
        policy.adapter.tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
    ]
    head = nn.Linear(64, model.lm_head.weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[placeholders] = 100.0
    model.lm_head = head
    requests = requests_of(bench, policy.adapter, max_tokens=6, count=3)

    for seed in (0, None):
        answers = Sampler(policy, MediaStore(policy.adapter)).sample(requests, seed)
        assert not set(placeholders) & {token for group in answers for action in group for token in action.tokens}
    assert not set(placeholders) & set(generated(bench, policy, requests[1]))


def test_the_update_sees_the_pixels_and_positions_that_the_rollout_saw(bench: Any) -> None:
    """Peers report gaps of 0.2 to 0.3 nat between sampling and training on images."""
    policy = bench.policy(0.8)
    media = MediaStore(policy.adapter)
    requests = requests_of(bench, policy.adapter, count=3)
    policy.adapter.preprocessed.clear()

    answers = Sampler(policy, media).sample(requests, 0)
    trajectories = [
        bench.episode(*request.context, action, group=number)
        for number, (request, actions) in enumerate(zip(requests, answers, strict=True))
        for action in actions
    ]
    section = TrainingSection(steps=1, micro_batch_tokens=100)
    engine = LocalTrainEngine(LocalTrainConfig(device="cpu"), TrainSetup(policy, {}, media, section))
    recomputed = engine.evaluate(trajectories).logprobs.numpy()

    recorded = np.concatenate([trajectory.behaviour_logprobs for trajectory in trajectories])
    np.testing.assert_allclose(recomputed, recorded, rtol=0, atol=1e-5)
    with torch.no_grad():
        plain = torch.cat([bench.plain_decisions(policy, trajectory)[0] for trajectory in trajectories])
    np.testing.assert_allclose(recorded, plain.numpy(), rtol=0, atol=1e-5)
    # Every picture was preprocessed once for both.
    assert len(policy.adapter.preprocessed) == len(set(policy.adapter.preprocessed)) == 4


@pytest.mark.parametrize("tokens", [1, 150, 10**6])
def test_each_micro_batch_has_the_pixels_of_its_own_trajectories(bench: Any, tokens: int) -> None:
    """Peers slice pixel_values by sequence, although images are of different sizes and numbers."""
    policy = bench.policy()
    trajectories = bench.trajectories(policy.adapter)
    section = TrainingSection(steps=1, micro_batch_tokens=tokens)
    setup = TrainSetup(policy, {}, MediaStore(policy.adapter), section)

    found = LocalTrainEngine(LocalTrainConfig(device="cpu"), setup).evaluate(trajectories).logprobs

    with torch.no_grad():
        expected = torch.cat([bench.plain_decisions(policy, trajectory)[0] for trajectory in trajectories])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_conversation_of_several_turns_is_sampled_as_it_is_trained(bench: Any) -> None:
    """New pictures of other sizes after an answer that was cut at its limit."""
    policy = bench.policy()
    adapter = policy.adapter
    prompt = bench.prompt(adapter, Message.user("Look: ", bench.picture(64, 32, 1)))
    later = bench.observation(adapter, Message.user("And ", bench.picture(24, 56, 2), bench.picture(8, 8), "?"))
    first = bench.text(adapter, "a wa", ended=False)
    request = Request((prompt, first, later), 4, 6, "train.jsonl:12")

    [actions] = Sampler(policy, MediaStore(adapter)).sample([request], 1)

    for action in actions:
        with torch.no_grad():
            expected, _ = bench.plain_decisions(policy, bench.episode(prompt, first, later, action))
        np.testing.assert_allclose(action.logprobs, expected[len(first.tokens) :].numpy(), rtol=0, atol=1e-5)


def test_the_model_is_tiny_and_all_of_it_is_trained(bench: Any) -> None:
    policy = bench.policy()
    assert sum(parameter.numel() for parameter in policy.parameters()) < 500_000
    assert all(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_has_the_precision_asked_for(bench: Any, dtype: str) -> None:
    policy = bench.policy(dtype=dtype)
    assert {parameter.dtype for parameter in policy.parameters()} == {getattr(torch, dtype)}
    exact = bench.policy()
    trajectories = bench.trajectories(policy.adapter)

    with torch.no_grad():
        found = policy(bench.pack(policy, trajectories)).logprobs
        expected = exact(bench.pack(exact, trajectories)).logprobs

    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.05


def test_a_family_that_passes_images_on_by_itself_is_given_no_encoded_ones() -> None:
    """It would be shown nothing, and nobody would say so: transformers takes arguments that it does not know."""

    class ByItself(Qwen2VL):
        def hidden_states(self, model: Any, **inputs: Any) -> Tensor:
            return super().hidden_states(model, **inputs)

    options = Qwen2VLOptions(from_scratch="tiny")
    model = Qwen2VL(options).load()

    assert Qwen2VL(options).encodes_images(model) == ("mm_encoder_outputs" in signature(model.model.forward).parameters)
    assert not ByItself(options).encodes_images(model)
