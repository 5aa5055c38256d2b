"""Write docs/reference.md from the code: every hook, every kind with its protocol and checks, every record.

uv run python docs/make_reference.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

import rllava_core.testing as kit
from rllava_core import hookspecs
from rllava_core.algorithms import maths, policy_gradient, protocol
from rllava_core.algorithms.config import PolicyGradientConfig
from rllava_core.config.describing import keys_of
from rllava_core.engines import protocol as engines
from rllava_core.mdp import environment, examples, images, messages, rewards, trajectory
from rllava_core.plugins import KIND_HOOKS, listing, selection
from rllava_core.policy import adapter, policy
from rllava_core.policy.config import ModelConfig
from rllava_core.policy.sampling import Request
from rllava_core.specs import KINDS, ComponentSpec, Kind, PluginInfo
from rllava_core.testing.conformance import Conformance, checks_of
from rllava_core.testing.deep import SUITES

INTRODUCTION = """# Reference for plugin authors

Written by `docs/make_reference.py` from the code; [plugins.md](plugins.md) is the tutorial, [config.md](config.md)
lists the keys of a config.
"""

PROTOCOLS: dict[Kind, list[type]] = {
    "model": [adapter.ModelAdapter, adapter.EncodesImages, adapter.OwnProcessor],
    "algorithm": [protocol.Algorithm, policy_gradient.PolicyGradient],
    "reward": [rewards.Reward],
    "engine": [engines.TrainEngine, engines.RolloutEngine],
    "environment": [environment.Environment],
    "dataset": [examples.Dataset],
}

CONFIGS: dict[Kind, type[BaseModel]] = {"model": ModelConfig, "algorithm": PolicyGradientConfig}
"""What configs of a kind are derived from, where that is more than `rllava_core.config.Options`."""

RECORDS: list[type] = [
    ComponentSpec,
    PluginInfo,
    examples.Example,
    images.Image,
    images.ImageFile,
    messages.Message,
    messages.TextPart,
    messages.ImagePart,
    messages.Observation,
    messages.Action,
    messages.Transition,
    trajectory.Trajectory,
    trajectory.ContextSegment,
    trajectory.ActionSegment,
    policy_gradient.Rollouts,
    protocol.Batch,
    protocol.Loss,
    protocol.PolicyAccess,
    policy.PolicyOutput,
    Request,
    engines.TrainSetup,
    engines.RolloutSetup,
]


NAMES = re.compile(r"^([a-z_]+(?:, [a-z_]+)*): ", re.MULTILINE)
"""The beginning of a line of a docstring that says what a name means."""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Hooks\n", _text(hookspecs), *_functions(_hooks(), level=3)]
    parts.append("## Kinds\n")
    for kind in KINDS:
        parts += _kind(kind)
    parts.append("## Records\n")
    for record in RECORDS:
        parts += _class(record)
    parts.append("## Mathematics of policy gradients\n")
    parts.append("In `rllava_core.algorithms.maths`.\n")
    parts += _functions(_own_functions(maths), level=3)
    parts.append("## The environment variables\n")
    parts.append(f"```\n{inspect.getdoc(selection)}\n```")
    parts.append("## `rllava plugins --json`\n")
    parts.append(_text(listing))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _kind(kind: Kind) -> Iterator[str]:
    suite: type[Conformance] = getattr(kit, SUITES[kind])
    yield f"### {kind}\n"
    yield f"Hook `{KIND_HOOKS[kind]}`; suite `rllava_core.testing.{SUITES[kind]}`."
    base = CONFIGS.get(kind)
    if base is None:
        yield "Its config is derived from `rllava_core.config.Options`, which refuses unknown keys."
    else:
        more = " (of another rule: from `rllava_core.config.Options`)" if kind == "algorithm" else ""
        yield f"Its config is derived from `{base.__module__}.{base.__name__}`{more}, which has these keys:\n"
        rows = [f"| `{key.name}` | {key.type} | `{key.default}` | {key.meaning} |" for key in keys_of(base)]
        yield "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])
    for protocol_class in PROTOCOLS[kind]:
        yield from _class(protocol_class, level=4)
    yield f"#### `{SUITES[kind]}`\n"
    yield _text(suite)
    yield "Its checks:\n"
    common = set(checks_of(Conformance))
    own = [name for name in checks_of(suite) if name not in common]
    yield "\n".join(f"- {_sentence(name)}{_when_slow(suite, name)}" for name in own)
    if kind == KINDS[0]:
        yield "And, of every kind:\n"
        yield "\n".join(f"- {_sentence(name)}" for name in checks_of(Conformance))


def _class(described: type, level: int = 3) -> Iterator[str]:
    yield f"{'#' * level} `{described.__name__}`\n"
    yield f"`{described.__module__}.{described.__name__}`"
    yield _text(described)
    if dataclasses.is_dataclass(described):
        lines = []
        for field in dataclasses.fields(described):
            has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            lines.append(f"{field.name}: {field.type}{' (has a default)' if has_default else ''}")
        yield "\n".join(["```", *lines, "```"])
    yield from _functions(_methods(described), level=level + 1, owner=described.__name__)


def _methods(described: type) -> list[Any]:
    found = []
    for name, member in vars(described).items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        function = function.fget if isinstance(function, property) else function
        function = function.func if isinstance(function, cached_property) else function
        public = not name.startswith("_") or name == "__call__"
        if public and inspect.isfunction(function) and (function.__doc__ or name == "__call__"):
            found.append(function)
    return found


def _functions(functions: Iterable[Any], level: int, owner: str = "") -> Iterator[str]:
    for function in functions:
        # Annotations are strings, and are shown as they are written.
        signature = re.sub(r"(: |-> )(['\"])(.*?)\2", r"\1\3", str(inspect.signature(function)))
        name = f"{owner}.{function.__name__}" if owner else function.__name__
        yield f"{'#' * level} `{name}`\n"
        yield f"```python\n{function.__name__}{signature}\n```\n"
        if function.__doc__:
            yield _text(function)


def _hooks() -> list[Any]:
    return [hook for name, hook in vars(hookspecs).items() if name.startswith("rllava_")]


def _own_functions(module: ModuleType) -> list[Any]:
    found = [item for name, item in vars(module).items() if inspect.isfunction(item) and not name.startswith("_")]
    return [item for item in found if item.__module__ == module.__name__]


def _text(described: Any) -> str:
    """A docstring as Markdown: what it says of each name becomes an item of a list."""
    paragraphs = (inspect.getdoc(described) or "").split("\n\n")
    for number, paragraph in enumerate(paragraphs):
        if NAMES.match(paragraph):
            paragraphs[number] = NAMES.sub(lambda found: f"- `{found[1]}`: ".replace(", ", "`, `"), paragraph)
    return "\n\n".join(paragraphs)


def _sentence(check: str) -> str:
    return check.removeprefix("test_").replace("_", " ")


def _when_slow(suite: type[Conformance], check: str) -> str:
    return (
        " (takes seconds: not in `rllava plugins check --deep`)"
        if getattr(getattr(suite, check), "slow", False)
        else ""
    )


if __name__ == "__main__":
    text = re.sub(r"\n{3,}", "\n\n", page())
    (Path(__file__).parent / "reference.md").write_text(text, encoding="utf-8")
