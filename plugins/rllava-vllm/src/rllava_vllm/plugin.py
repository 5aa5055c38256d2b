"""What this package provides; imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="Rollouts by vLLM, in this process or from a server.")


@hookimpl
def rllava_engines() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="vllm",
            target="rllava_vllm.engine:VLLMRolloutEngine",
            config="rllava_vllm.config:VLLMConfig",
            summary="Samples by vLLM, in this process and on its GPU or from a server, which is given the new weights.",
            provides=frozenset({"rollout", "logprobs"}),
        )
    ]
