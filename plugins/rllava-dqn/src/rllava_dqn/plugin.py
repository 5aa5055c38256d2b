"""What this package provides; imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="Deep Q-learning with its usual improvements, from a replay of whole contexts.")


@hookimpl
def rllava_algorithms() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="dqn",
            target="rllava_dqn.algorithm:DQN",
            config="rllava_dqn.config:DQNConfig",
            summary="Deep Q-learning (doi:10.1038/nature14236); double, dueling, n-step, prioritised replay.",
            needs=frozenset({"train", "rollout", "heads", "choices", "action_values"}),
        )
    ]
