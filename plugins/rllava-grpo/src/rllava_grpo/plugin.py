"""What this package provides; imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="Group relative policy optimization and its published variants.")


@hookimpl
def rllava_algorithms() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="grpo",
            target="rllava_grpo.algorithm:GRPO",
            config="rllava_grpo.config:GRPOConfig",
            summary="Group relative policy optimization (arXiv:2402.03300); DAPO and Dr. GRPO as options.",
            needs=frozenset({"train", "rollout", "logprobs"}),
        )
    ]
