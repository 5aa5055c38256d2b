"""What this package tells rllava: its environment, as data. Imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="Gymnasium environments, seen through their rendered frames.")


@hookimpl
def rllava_environments() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="gymnasium",
            target="rllava_gymnasium.environment:Gymnasium",
            config="rllava_gymnasium.config:GymnasiumConfig",
            summary="any Gymnasium environment that renders rgb_array and has discrete actions",
            provides=frozenset({"choices"}),
        )
    ]
