"""Find the installed plugins, load them one at a time, keep a bad one from harming the rest, look components up.

A plugin is an entry point of the group `rllava`. It ends as one of

- ok: its components can be looked up and its lifecycle hooks are called;
- conflict: the same, but a name of its is another plugin's too, and has to be written as `distribution/name`;
- disabled: the environment says not to load it;
- incompatible: its distribution requires another version of `rllava-core`; its module is not imported;
- broken: its module, or one of its hooks, does not work; `Plugin.error` says why.

Nothing depends on the order in which plugins were installed or are found.
"""

from rllava_core.plugins.discovery import core_version
from rllava_core.plugins.loading import KIND_HOOKS, load_plugins
from rllava_core.plugins.records import ENGINE_ROLES, Component, Plugin, Status
from rllava_core.plugins.registry import Implementation, Registry

__all__ = [
    "ENGINE_ROLES",
    "KIND_HOOKS",
    "Component",
    "Implementation",
    "Plugin",
    "Registry",
    "Status",
    "core_version",
    "load_plugins",
]
