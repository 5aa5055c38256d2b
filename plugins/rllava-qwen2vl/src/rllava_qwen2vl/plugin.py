"""What this package provides; imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="The Qwen2-VL, Qwen2.5-VL and Qwen3-VL model families.")


@hookimpl
def rllava_models() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="qwen2vl",
            target="rllava_qwen2vl.adapter:Qwen2VL",
            config="rllava_qwen2vl.config:Qwen2VLOptions",
            summary="Qwen2-VL, Qwen2.5-VL, Qwen3-VL: dynamic resolution, M-RoPE; `from_scratch: tiny`: 0.2M weights.",
            provides=frozenset({"heads"}),
        )
    ]
