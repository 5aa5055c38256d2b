"""A small model that vLLM can load, and what needs a real vLLM."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rllava_core.policy.policy import Policy

PRESET = "tiny-64"
"""vLLM's attention on a CPU takes heads of 32 and more."""


@pytest.fixture(scope="session")
def _vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: bash plugins/rllava-vllm/environment.sh DIR makes an environment with it")


@pytest.fixture
def qwen() -> Any:
    """The adapter and its options."""
    return pytest.importorskip("rllava_qwen2vl.adapter", reason="rllava-qwen2vl is not installed")


@pytest.fixture
def make_policy(qwen: Any) -> Callable[..., Policy]:
    from rllava_qwen2vl.config import Qwen2VLOptions

    def make(seed: int = 0, temperature: float = 1.0, **more: Any) -> Policy:
        adapter = qwen.Qwen2VL(Qwen2VLOptions(from_scratch=PRESET, **more))
        torch.manual_seed(seed)
        return Policy(adapter, adapter.load(), None, temperature).eval()

    return make
