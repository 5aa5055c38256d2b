"""What trajectories share is computed once, and the gradients are those of each computed whole: for every family, over
several turns with images of several sizes, with full weights and with low-rank adapters.

In float64, of which transformers' norms and rotations leave float32; tests/policy has a model without those, and holds
it to 1e-10.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rllava_core.plugins import load_plugins
from rllava_core.policy.batch import PolicyBatch
from rllava_core.policy.policy import Policy
from rllava_core.policy.trained import set_trained
from rllava_core.testing.rollouts import Shown, pack, picture, play

FAMILIES = [
    ("qwen2vl", "tiny"),
    ("qwen2vl", "tiny-qwen2.5"),
    ("qwen2vl", "tiny-qwen3"),
    ("qwen2vl", "tiny-qwen3-moe"),
    ("llava", "tiny"),
    ("llava", "tiny-next"),
    ("llava", "tiny-onevision"),
    ("smolvlm", "tiny"),
    ("anyvlm", "tiny"),
]
FROZEN = {"vision": "frozen", "connector": "lora", "language": "lora"}

SCRIPTS = [
    (Shown((picture(32, 32), "Which?"), max_tokens=9),),
    (Shown(("Two and two?",), ("three", "four", "5")),),
    (
        Shown(("Find ", picture(32, 48, 1), " in ", picture(32, 32, 2)), max_tokens=6),
        Shown((picture(48, 32, 3), "And now?"), ("left", "right", "on")),
        Shown(("So?",), max_tokens=5),
    ),
]


def gradients(policy: Policy, batch: PolicyBatch) -> dict[str, Tensor]:
    dtype = policy.model.dtype

    def precise(media: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: item.to(dtype) if item.is_floating_point() else item for name, item in media.items()}

    batch = replace(batch, prefix_media=precise(batch.prefix_media), tree_media=precise(batch.tree_media))
    policy.zero_grad()
    output = policy(batch)
    count = len(output.logprobs)
    push, spread = torch.randn(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (push * output.logprobs + spread * output.entropies).sum().backward()
    return {name: item.grad.clone() for name, item in policy.named_parameters() if item.grad is not None}


@pytest.mark.parametrize(
    ("component", "preset", "train"),
    [(*family, {}) for family in FAMILIES] + [(*family, FROZEN) for family in FAMILIES[::3]],
)
def test_shared_gradients_equal_those_of_each_trajectory_alone(
    component: str, preset: str, train: dict[str, str]
) -> None:
    if train:
        pytest.importorskip("peft", reason="peft is not installed")
    pytest.importorskip(f"rllava_{component}", reason=f"rllava-{component} is not installed")
    found: Any = load_plugins().find("model", component)
    adapter = found.load_target()(found.load_config().model_validate({"from_scratch": preset, "train": train}))
    torch.manual_seed(0)
    model = adapter.load()
    set_trained(model, adapter, adapter.config)
    for name, item in model.named_parameters():
        if ".lora_B" in name:  # zero at first, which would hide the gradients of A
            torch.nn.init.normal_(item, std=0.05)
    policy = Policy(adapter, model).eval()
    trajectories = play(policy, SCRIPTS, 4)
    experts = preset == "tiny-qwen3-moe"  # for which torch has no kernel in float64
    policy.to(torch.float32 if experts else torch.float64)

    alone = gradients(policy, pack(policy, trajectories, packed=True, shared=False))
    shared = {
        "with a cache": gradients(policy, pack(policy, trajectories)),
        "packed": gradients(policy, pack(policy, trajectories, packed=True)),
    }
    policy.recompute(True)
    shared["computed again"] = gradients(policy, pack(policy, trajectories, packed=True))

    assert sum(bool(gradient.any()) for gradient in alone.values()) > 0.9 * len(alone)
    for way, found in shared.items():
        assert found.keys() == alone.keys()
        for name, gradient in alone.items():
            scale = max(1.0, float(gradient.abs().max()))
            gap = float((found[name] - gradient).abs().max())
            assert gap <= (1e-5 if experts else 1e-6) * scale, (way, name, gap / scale)
