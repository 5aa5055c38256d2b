"""Write docs/config.md from the config models, so that the page cannot differ from the code.

uv run python docs/make_config.py
"""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rllava_core.config import EngineSection, ModelSection, RewardSection, TaskSection, TrainingSection
from rllava_core.engines.config import LocalRolloutConfig, LocalTrainConfig
from rllava_core.policy.config import ModelConfig

INTRODUCTION = """# Every key of a config

Written by `docs/make_config.py` from the code. A config has the sections `model`, `algorithm`, `task`, `engine` and
`training`; unknown keys are refused. A component is chosen by name, and its own options stand beside the name:
`algorithm: {name: NAME, option: value}`. `rllava plugins` lists the components; their options are in the README of
their package. Any key can be set on the command line: `training.steps=100`, `task.rewards.0.weight=0.5`.
"""

SECTIONS: list[tuple[str, type[BaseModel], str]] = [
    ("model", ModelSection, "The model family. Everything beside `adapter` belongs to it."),
    ("model (options that every adapter has)", ModelConfig, ""),
    ("task", TaskSection, ""),
    ("task.rewards (each entry)", RewardSection, "The reward's own options stand beside these."),
    ("engine", EngineSection, ""),
    ("engine.train: local", LocalTrainConfig, ""),
    ("engine.rollout: local", LocalRolloutConfig, ""),
    ("training", TrainingSection, ""),
]


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, model, note in SECTIONS:
        lines = [
            f"## {title}",
            "",
            *([note, ""] if note else []),
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        for name, field in model.model_fields.items():
            default = "required" if field.default is PydanticUndefined else f"`{_plain(field.default)}`"
            lines.append(f"| `{name}` | {_type(field.annotation)} | {default} | {_cell(field.description or '')} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return str(getattr(value, "name", value))
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list of " + _type(get_args(annotation)[0])
    if annotation is type(None):
        return "null"
    return str(annotation.__name__).removesuffix("Section").lower()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (Path(__file__).parent / "config.md").write_text(page(), encoding="utf-8")
