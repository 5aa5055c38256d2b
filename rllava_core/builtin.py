"""What the core itself brings, registered through the same hooks as anyone's plugin."""

from __future__ import annotations

from rllava_core.specs import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    """Summary of the core's own plugin."""
    return PluginInfo(summary="The core's own components: local engines, the one-step environment, no model.")


@hookimpl
def rllava_engines() -> list[ComponentSpec]:
    """The local engines: this process, with accelerate for more than one."""
    return [
        ComponentSpec(
            name="local",
            target="rllava_core.engines.local_train:LocalTrainEngine",
            config="rllava_core.engines.config:LocalTrainConfig",
            summary="Updates the policy in this process, on the CPU or a GPU.",
            provides=frozenset({"train"}),
        ),
        ComponentSpec(
            name="local",
            target="rllava_core.engines.local_rollout:LocalRolloutEngine",
            config="rllava_core.engines.config:LocalRolloutConfig",
            summary="Samples from the policy in this process, with the weights that are being trained.",
            provides=frozenset({"rollout", "logprobs", "action_values"}),
        ),
    ]


@hookimpl
def rllava_models() -> list[ComponentSpec]:
    """The absence of a model."""
    return [
        ComponentSpec(
            name="hosted",
            target="rllava_core.policy.hosted:Hosted",
            summary="No model here: the rollout engine answers by one of its own, from messages. For `rllava eval`.",
            needs=frozenset({"own_model"}),
        )
    ]


@hookimpl
def rllava_environments() -> list[ComponentSpec]:
    """The environment of tasks that are one question and one answer."""
    return [
        ComponentSpec(
            name="single_turn",
            target="rllava_core.mdp.single_turn:SingleTurn",
            summary="One observation, one action: asks an example's prompt with its images and ends.",
            needs=frozenset({"dataset"}),
        )
    ]
