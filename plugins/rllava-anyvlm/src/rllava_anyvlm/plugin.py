"""What this package provides; imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="Any image-text-to-text model of transformers, checked when it is loaded.")


@hookimpl
def rllava_models() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="anyvlm",
            target="rllava_anyvlm.adapter:AnyVLM",
            config="rllava_anyvlm.config:AnyVLMOptions",
            summary="Any `AutoModelForImageTextToText` whose positions count up; a probe refuses all others.",
            provides=frozenset({"heads"}),
        )
    ]
