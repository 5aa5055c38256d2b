"""The keys of a config model in words: type, default and meaning, for `rllava plugins show` and the docs."""

from __future__ import annotations

from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


@dataclass(frozen=True)
class Key:
    """One key of a config.

    type: its values, as one would say it.
    default: as YAML would write it; None where the key is required.
    """

    name: str
    type: str
    default: str | None
    meaning: str


def keys_of(model: type[BaseModel]) -> list[Key]:
    """Every key of a config model, in the order in which they are defined."""
    return [
        Key(
            name,
            _type(field.annotation),
            None if field.is_required() else _plain(field.get_default(call_default_factory=True)),
            field.description or "",
        )
        for name, field in model.model_fields.items()
    ]


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return str(getattr(value, "name", value))
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_plain, value))}]"
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
    if get_origin(annotation) in (tuple, list, set, frozenset):
        return "list of " + (_type(get_args(annotation)[0]) if get_args(annotation) else "anything")
    if get_origin(annotation) is dict:
        return "keys and values"
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "anything"
    return str(getattr(annotation, "__name__", annotation)).removesuffix("Section").lower()
