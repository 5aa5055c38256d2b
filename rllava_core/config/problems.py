"""What is wrong with a config, in words: where, which key, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError


@dataclass(frozen=True)
class Source:
    """Where values came from, for messages."""

    path: str
    overrides: Mapping[tuple[str, ...], str]

    def of(self, key: tuple[str, ...]) -> str:
        """The override that set a key, or part of it, and otherwise the file."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.overrides:
                return f"override {self.overrides[key[:length]]!r}"
        below = [override for other, override in self.overrides.items() if other[: len(key)] == key]
        return f"{self.path} with override {below[-1]!r}" if below else self.path


def describe(
    error: ValidationError,
    model: type[BaseModel],
    prefix: tuple[str, ...],
    source: Source,
    owner: str = "",
    section: type[BaseModel] | None = None,
) -> str:
    """One line a problem: where, key, what is wrong and what would be right.

    owner, section: for a component's options, whose they are and the section that holds them beside its own keys.
    """
    lines = []
    for problem in error.errors():
        location = tuple(str(part) for part in problem["loc"])
        key = (*prefix, *location)
        name = ".".join(key) or "(top level)"
        where = source.of(key)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, location[:-1])
            if section is not None and len(location) == 1:
                known = sorted({*known, *section.model_fields})
            message = f"unknown key{owner}{did_you_mean(location[-1], known)} (known: {', '.join(known) or 'none'})"
        elif problem["type"] == "missing":
            message = f"required key{owner} is missing"
        elif problem["type"] in _EXPECTED:
            message = f"expected {_EXPECTED[problem['type']]}, found {kind_of(problem['input'])}"
            if problem["type"] == "string_type" and isinstance(problem["input"], dict):
                message += "; put text that begins with a brace in quotes"
        else:
            message = f"{problem['msg'].removeprefix('Value error, ')}"
            if not isinstance(problem["input"], (dict, BaseModel)):
                message += f" (got {_shown(problem['input'])})"
        lines.append(f"{where}: {name}: {message}")
    return "\n".join(lines)


# Pydantic's words for these name Python's types, which are not YAML's.
_EXPECTED = {
    "model_type": "keys and values",
    "dict_type": "keys and values",
    "tuple_type": "a list",
    "list_type": "a list",
    "string_type": "text",
}


def kind_of(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "keys and values"
    return "a list" if isinstance(value, list) else _shown(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:99] + "…"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'steps'?`, or nothing where no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        nested = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return sorted(model.model_fields)
