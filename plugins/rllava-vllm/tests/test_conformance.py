"""The suite of engines on real vLLM, in both modes."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch

from rllava_core.policy.policy import Head, Policy
from rllava_core.testing import EngineConformance
from rllava_core.testing.engines_base import ENDS, FORBIDDEN

SMALL = {"cache_gib": 0.25, "max_sequences": 64}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.usefixtures("_vllm", "qwen")
class OnQwen(EngineConformance):
    """A vLLM takes ten seconds to start, and there can be one in a process: all checks share it, and `sync` gives it
    the policy of each."""

    component = "rllava-vllm/vllm"
    role = "rollout"
    shared: ClassVar[dict[type, Any]] = {}

    def policy(self, seed: int = 0, heads: Mapping[str, Head] | None = None) -> Policy:
        from rllava_qwen2vl.adapter import Qwen2VL
        from rllava_qwen2vl.config import Qwen2VLOptions

        adapter = Qwen2VL(Qwen2VLOptions(from_scratch="tiny-64"))
        torch.manual_seed(seed)
        model = adapter.load()
        adapter.end_of_turn = (*adapter.end_of_turn, *ENDS)
        adapter.forbidden_tokens = (*adapter.forbidden_tokens, *FORBIDDEN)
        return Policy(adapter, model, heads, temperature=2.0).eval()

    def create(self, setup: Any = None) -> Any:
        if type(self) not in self.shared:
            self.shared[type(self)] = super().create(setup)
        elif setup is not None:
            self.shared[type(self)].sync(setup.policy)
        return self.shared[type(self)]


class TestColocated(OnQwen):
    options = MappingProxyType(SMALL)


class TestServer(OnQwen):
    options = MappingProxyType(
        {**SMALL, "mode": "server", "start": True, "url": f"http://127.0.0.1:{free_port()}", "message_mib": 1}
    )
