"""What this package provides; imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="The LLaVA model families, and models composed of a vision tower and a language model.")


@hookimpl
def rllava_models() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="llava",
            target="rllava_llava.adapter:Llava",
            config="rllava_llava.config:LlavaOptions",
            summary="LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision; `compose` joins a vision tower and a language model.",
            provides=frozenset({"heads"}),
        )
    ]
