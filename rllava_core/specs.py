"""What a plugin says about itself: data, not objects, so that listing plugins imports nothing heavy."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

import pluggy

HOOK_API = "1.0"
"""Version of the hook specifications. `rllava-core` has the same major version, so a plugin's ordinary requirement
`rllava-core>=1,<2` says which contract it was written for, and can be checked before its module is imported."""

ENTRY_POINT_GROUP = "rllava"

Kind = Literal["model", "algorithm", "reward", "engine", "environment", "dataset"]
KINDS: tuple[Kind, ...] = get_args(Kind)

hookimpl = pluggy.HookimplMarker("rllava")
"""Marks a function of a plugin's module as the implementation of the hook of the same name."""

CAPABILITIES = frozenset({"train", "rollout", "logprobs", "action_values", "own_model", "heads", "choices", "dataset"})
"""What the core's own parts provide and need; plugins may agree on more among themselves."""

_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """One thing a plugin provides: a model adapter, an algorithm, a reward, an engine, an environment or a data set.

    name: what a config writes to choose it; lower case, digits, `_` and `-`.
    target: `module:attribute` of the class, imported when a run resolves it, never to list it. It is called with the
        validated config model (environments also with the task section).
    config: `module:attribute` of its pydantic model, in a module that imports neither torch nor transformers; None
        for a component without options.
    provides, needs: capabilities, matched before any weight is loaded: what an algorithm needs, the model, the
        engines and the environment together must provide.

    Capabilities that the core knows (`CAPABILITIES`): engines provide `train` or `rollout`; a rollout engine that
    returns the log-prob of each action it samples provides `logprobs`, one that can act by the values that heads give
    to choices provides `action_values`, and one that answers by a model of its own, so that it can be evaluated and not
    trained, provides `own_model`; a model whose policy can carry heads on its hidden states provides
    `heads`; an environment with a discrete action set, or a task with `choices`, provides `choices`; a task with a data
    set provides `dataset`.

    Raises ValueError for a name or a target of the wrong form.
    """

    name: str
    target: str
    config: str | None = None
    summary: str = ""
    provides: frozenset[str] = field(default=frozenset())
    needs: frozenset[str] = field(default=frozenset())

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"component name {self.name!r}: use lower-case letters, digits, '_' and '-'")
        for role in ("target", "config"):
            value = getattr(self, role)
            if value is None and role == "config":
                continue
            if not isinstance(value, str) or not _TARGET.fullmatch(value):
                raise ValueError(f"{role} {value!r} of component {self.name!r}: expected 'package.module:Class'")
        for role in ("provides", "needs"):
            value = getattr(self, role)
            items = frozenset() if isinstance(value, str) else frozenset(value)
            if isinstance(value, str) or not all(isinstance(item, str) for item in items):
                raise ValueError(f"{role} of component {self.name!r}: expected a set of strings, got {value!r}")
            object.__setattr__(self, role, items)
        if not isinstance(self.summary, str):
            raise ValueError(f"summary of component {self.name!r}: expected text, got {self.summary!r}")


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """What `rllava plugins` says of a plugin as a whole."""

    summary: str = ""
    homepage: str = ""

    def __post_init__(self) -> None:
        for role in ("summary", "homepage"):
            if not isinstance(getattr(self, role), str):
                raise ValueError(f"{role} of the plugin: expected text, got {getattr(self, role)!r}")
