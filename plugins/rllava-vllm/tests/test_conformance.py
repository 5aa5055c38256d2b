"""The suite of engines on real vLLM, in both modes."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from rllava_core.config import TrainingSection
from rllava_core.errors import ConfigError, InvariantError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.trajectory import Trajectory, Turn
from rllava_core.policy.checks import check_recomputed
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Head, Policy
from rllava_core.policy.sampling import Request
from rllava_core.policy.trained import set_trained
from rllava_core.testing import EngineConformance
from rllava_core.testing.engines_base import ENDS, FORBIDDEN, recomputed
from rllava_core.testing.rollouts import Shown, picture, request
from rllava_vllm.arguments import CPU_BLOCK
from rllava_vllm.colocated import Colocated
from rllava_vllm.config import VLLMConfig
from rllava_vllm.prompts import prompt_of
from rllava_vllm.wire import encoded

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

    def test_weights_that_are_stale_are_found_by_the_gate(self) -> None:
        """And are vLLM's own: a step of the trainer changes nothing before `sync`."""
        policy = self.policy()
        engine = self.sampler(policy)
        requests = self.requests()
        before = self._trajectories(engine, requests)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.5)
        after = self._trajectories(engine, requests)
        for one, two in zip(before, after, strict=True):
            np.testing.assert_allclose(one.behaviour_logprobs, two.behaviour_logprobs, atol=1e-5)
        stale = recomputed(policy, after).logprobs
        with pytest.raises(InvariantError, match="conformance"):
            check_recomputed(after, stale, policy.adapter, TrainingSection(steps=1).max_logprob_gap)
        engine.sync(policy)
        fresh = self._trajectories(engine, requests)
        assert check_recomputed(fresh, recomputed(policy, fresh).logprobs, policy.adapter, 1e-4).largest <= 1e-4

    def test_adapters_are_merged_on_the_way(self) -> None:
        pytest.importorskip("peft", reason="peft is not installed")
        policy = self.policy()
        train = {"vision": "lora", "connector": "full", "language": "lora"}
        set_trained(policy.model, policy.adapter, ModelConfig(from_scratch="tiny-64", train=train))
        torch.manual_seed(3)
        for name, parameter in policy.model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        engine = self.sampler(policy)
        found = self._trajectories(engine, self.requests())
        gap = np.abs(recomputed(policy, found).logprobs.numpy() - np.concatenate([t.behaviour_logprobs for t in found]))
        assert gap.max() <= 1e-4

    @staticmethod
    def _trajectories(engine: Any, requests: Sequence[Request]) -> list[Trajectory]:
        """One of each answer; all drawn by one seed."""
        return [
            Trajectory(Example("conformance"), 0, group, (Turn(asked.context, action),), terminated=True)
            for group, (asked, actions) in enumerate(zip(requests, engine.generate(requests, 0), strict=True))
            for action in actions
        ]


class TestColocated(OnQwen):
    options = MappingProxyType(SMALL)

    def test_a_group_and_the_next_turn_read_what_they_share_once(self) -> None:
        """By vLLM's cache of prefixes, in whole blocks."""
        policy = self.policy()
        engine = self.sampler(policy)
        llm_engine = engine._host._llm.llm_engine
        cached: list[int] = []
        step = llm_engine.step

        def counting() -> Any:
            outputs = step()
            cached.extend(output.num_cached_tokens for output in outputs if output.finished)
            return outputs

        media = MediaStore(policy.adapter)
        shown = Shown((picture(64, 64, 1), picture(64, 64, 2), "what is here, and what is there?"), max_tokens=4)
        asked = request(policy.adapter, media, shown, 8)
        llm_engine.step = counting
        try:
            [actions] = engine.generate([asked], 0)
            later = request(policy.adapter, media, Shown(("and now?",), max_tokens=2), 1, (*asked.context, actions[0]))
            engine.generate([later], 0)
        finally:
            del llm_engine.step
        whole = len(asked.context[0].tokens) // CPU_BLOCK * CPU_BLOCK
        assert whole >= 128
        assert cached == [whole, whole]  # of the last of the group; of the next turn

    def test_vllm_is_given_what_its_own_processor_would_make(self) -> None:
        """The same pixels, laid out in the same way, in memory and over the wire."""
        from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import decode_mm_kwargs_item
        from vllm.multimodal import MULTIMODAL_REGISTRY
        from vllm.multimodal.inputs import MultiModalKwargsItems

        policy = self.policy()
        engine = self.sampler(policy)
        images = [picture(40, 56, 1), picture(64, 32, 2)]
        host = engine._host
        asked = request(policy.adapter, MediaStore(policy.adapter), Shown((*images, "?")))
        prompt = prompt_of(asked.context, policy.adapter, MediaStore(policy.adapter), "pixels")
        processor = MULTIMODAL_REGISTRY.create_processor(host._llm.model_config)
        made = policy.adapter.processor.image_processor(
            images=[image.to_pil() for image in images], return_tensors="pt"
        )
        inputs = BatchFeature(dict(made))
        fields = processor._get_mm_fields_config(inputs, {})
        expected = MultiModalKwargsItems.from_hf_inputs(inputs, fields)["image"]
        for picture_of, item in zip(prompt.pictures, expected, strict=True):
            for found in (host._item(picture_of), decode_mm_kwargs_item(encoded(picture_of, host._fields))):
                assert found.keys() == item.keys()
                for name, element in item.items():
                    assert type(found[name].field) is type(element.field)
                    assert found[name].field.keep_on_cpu == element.field.keep_on_cpu
                    assert torch.equal(found[name].data, element.data), name

    def test_the_global_random_states_are_left_alone(self) -> None:
        engine, requests, other = self.sampler(), self.requests(), self.policy(seed=4)
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        expected = torch.rand(3).tolist(), random.random(), float(np.random.rand())
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        engine.generate(requests, 1)
        engine.sync(other)
        assert (torch.rand(3).tolist(), random.random(), float(np.random.rand())) == expected

    def test_on_a_cpu_it_cannot_sleep_and_says_so(self) -> None:
        engine = self.sampler()
        engine.forget()
        assert engine._host._sleeps is False
        with pytest.raises(ConfigError, match="cannot sleep on a CPU"):
            Colocated(VLLMConfig(sleep="always"), self.policy())


class TestServer(OnQwen):
    options = MappingProxyType(
        {**SMALL, "mode": "server", "start": True, "url": f"http://127.0.0.1:{free_port()}", "message_mib": 1}
    )
