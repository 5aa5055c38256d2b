"""What this package provides; imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="Training by several processes with DeepSpeed's ZeRO.")


@hookimpl
def rllava_engines() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="deepspeed",
            target="rllava_deepspeed.engine:DeepSpeedTrainEngine",
            config="rllava_deepspeed.config:DeepSpeedConfig",
            summary="Trains with ZeRO-2 or ZeRO-3: gradients and states, or weights too, divided by the processes.",
            provides=frozenset({"train"}),
        )
    ]
