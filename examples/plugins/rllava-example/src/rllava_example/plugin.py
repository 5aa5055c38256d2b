"""What this package provides, as data. Every rllava command imports this module, so it imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="An example: CISPO, and a reward against repetition.")


@hookimpl
def rllava_algorithms() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="cispo",
            target="rllava_example.algorithm:CISPO",
            config="rllava_example.config:CISPOConfig",
            summary="Clipped importance weights, a gradient for every decision (arXiv:2506.13585).",
            needs=frozenset({"train", "rollout", "logprobs"}),
        )
    ]


@hookimpl
def rllava_rewards() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="distinct_words",
            target="rllava_example.reward:DistinctWords",
            summary="The share of an answer's words that are no repetition.",
        )
    ]
