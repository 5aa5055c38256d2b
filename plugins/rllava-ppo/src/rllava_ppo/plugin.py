"""What this package provides; imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="Proximal policy optimization, with advantages of tokens, of turns, or of both.")


@hookimpl
def rllava_algorithms() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="ppo",
            target="rllava_ppo.algorithm:PPO",
            config="rllava_ppo.config:PPOConfig",
            summary="Proximal policy optimization (arXiv:1707.06347) with a critic and GAE (arXiv:1506.02438).",
            # Not `logprobs`: ratios are to log-probs that the trainer recomputes.
            needs=frozenset({"train", "rollout", "heads"}),
        )
    ]
