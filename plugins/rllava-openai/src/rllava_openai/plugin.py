"""What this package tells rllava: its engine and its reward, as data. Imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="OpenAI-compatible endpoints: evaluate hosted models, and let one judge answers.")


@hookimpl
def rllava_engines() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="openai",
            target="rllava_openai.engine:OpenAIEngine",
            config="rllava_openai.config:EngineConfig",
            summary="answers by the model behind an OpenAI-compatible endpoint; for `rllava eval`, never to train",
            provides=frozenset({"rollout", "own_model"}),
        )
    ]


@hookimpl
def rllava_rewards() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="judge",
            target="rllava_openai.judge:Judge",
            config="rllava_openai.config:JudgeConfig",
            summary="0 to 1, as a hosted model scores the answer by a rubric, with the images before it",
        )
    ]
