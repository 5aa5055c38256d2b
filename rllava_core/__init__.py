"""rllava: reinforcement learning of vision-language models, a core of hook specifications."""

from rllava_core.specs import HOOK_API, ComponentSpec, PluginInfo, hookimpl

__all__ = ["HOOK_API", "ComponentSpec", "PluginInfo", "hookimpl"]
