"""The keys of a config model in words: type, default and meaning, for `rllava plugins show` and the docs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from rllava_core.config.sections import Options


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
    """Every key of a config model, in the order in which they are defined; options within options as `name.key`."""
    keys = []
    for name, field in model.model_fields.items():
        options = _options(field.annotation)
        if field.annotation is not options:
            default = None if field.is_required() else _plain(field.get_default(call_default_factory=True))
            keys.append(Key(name, _type(field.annotation), default, field.description or ""))
        if options is not None:
            keys += [replace(key, name=f"{name}.{key.name}") for key in keys_of(options)]
    return keys


def _options(annotation: Any) -> type[BaseModel] | None:
    """The model of options within options, which may also be absent; a component, chosen by name, is none."""
    for part in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
        if isinstance(part, type) and issubclass(part, Options) and "name" not in part.model_fields:
            return part
    return None


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
    if _options(annotation) is not None:
        return "options"
    return str(getattr(annotation, "__name__", annotation)).removesuffix("Section").lower()
