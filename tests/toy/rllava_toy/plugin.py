"""What the toy provides."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="For the core's own tests.")


@hookimpl
def rllava_models() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="toy",
            summary="A model of a few thousand parameters.",
            target="rllava_core.testing.tiny:TinyAdapter",
            config="rllava_core.policy.config:ModelConfig",
            provides=frozenset({"heads"}),
        )
    ]


@hookimpl
def rllava_algorithms() -> list[ComponentSpec]:
    config = "rllava_toy.config:ToyGradientConfig"
    return [
        ComponentSpec(
            name="toy_gradient",
            summary="REINFORCE with a running baseline.",
            target="rllava_toy.algorithm:ToyGradient",
            config=config,
        ),
        ComponentSpec(
            name="toy_critic",
            summary="An actor-critic.",
            target="rllava_toy.algorithm:ToyCritic",
            config=config,
            needs=frozenset({"heads"}),
        ),
        ComponentSpec(
            name="toy_imitation",
            summary="Supervised learning.",
            target="rllava_toy.algorithm:ToyImitation",
            config=config,
        ),
        ComponentSpec(
            name="toy_discrete",
            summary="REINFORCE for discrete actions.",
            target="rllava_toy.algorithm:ToyGradient",
            config=config,
            needs=frozenset({"choices"}),
        ),
    ]


@hookimpl
def rllava_datasets() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="colours",
            summary="Patches of one colour.",
            target="rllava_toy.task:Colours",
            config="rllava_toy.config:ColoursConfig",
        )
    ]


@hookimpl
def rllava_rewards() -> list[ComponentSpec]:
    return [
        ComponentSpec(name="match", summary="1 if the answer is right.", target="rllava_toy.task:Match"),
        ComponentSpec(
            name="broken",
            summary="Misbehaves on demand.",
            target="rllava_toy.task:Broken",
            config="rllava_toy.config:BrokenConfig",
        ),
    ]


@hookimpl
def rllava_environments() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="brightness",
            summary="Dark or bright?",
            target="rllava_toy.task:Brightness",
            provides=frozenset({"choices"}),
        ),
        ComponentSpec(
            name="misbehaving",
            summary="Several turns, and one in which it misbehaves.",
            target="rllava_toy.misbehaving:Misbehaving",
            config="rllava_toy.config:MisbehavingConfig",
            provides=frozenset({"choices"}),
        ),
    ]


@hookimpl
def rllava_engines() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="oracle",
            summary="Looks at the picture itself.",
            target="rllava_toy.engine:Oracle",
            provides=frozenset({"rollout", "own_model"}),
        )
    ]
