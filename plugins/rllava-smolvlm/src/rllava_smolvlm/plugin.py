"""What this package provides; imports nothing heavy."""

from __future__ import annotations

from rllava_core import ComponentSpec, PluginInfo, hookimpl


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="The SmolVLM and Idefics3 model families.")


@hookimpl
def rllava_models() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="smolvlm",
            target="rllava_smolvlm.adapter:SmolVLM",
            config="rllava_smolvlm.config:SmolVLMOptions",
            summary="SmolVLM and Idefics3: images in tiles; `from_scratch: tiny` builds 0.2M random weights.",
            provides=frozenset({"heads"}),
        )
    ]
