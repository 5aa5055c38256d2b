"""From text to plain data: YAML files, and overrides from the command line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from rllava_core.config.problems import kind_of
from rllava_core.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError for a missing file, a syntax error, a repeated key or anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections (model, algorithm, task, training), found {kind_of(data)}")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[tuple[str, ...], str]:
    """Set `section.key=value` in place; values are YAML. Returns which override set which key.

    Raises ConfigError for an override that is not of that form or that passes through something without keys.
    """
    applied: dict[tuple[str, ...], str] = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        keys = tuple(key.split("."))
        if not separator or not all(keys):
            raise ConfigError(f"override {override!r}: expected section.key=value, such as training.steps=100")
        try:
            parsed = parse_yaml(value)
        except yaml.YAMLError as error:
            # A shell splits what holds spaces, and the rest of the value becomes an override of its own.
            hint = "; if it holds spaces, put the whole override in quotes" if value[:1] in ("[", "{") else ""
            problem = f"the value is not valid YAML: {_yaml_problem(error)}{hint}"
            raise ConfigError(f"override {override!r}: {problem}") from None
        for key_of_parent in _set(data, keys, parsed, override):
            applied.setdefault(key_of_parent, override)
        applied[keys] = override
    return applied


def parse_yaml(text: str) -> Any:
    """Plain YAML data: no tags that build objects, no key written twice. Raises yaml.YAMLError."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _StrictLoader(yaml.SafeLoader):
    """YAML without the silent loss of a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _set(data: dict[str, Any], keys: tuple[str, ...], value: Any, override: str) -> list[tuple[str, ...]]:
    """Set one value in place. Returns the keys of mappings that had to be made on the way."""
    made = []
    place: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdecimal() or int(key) >= len(place):
                where = ".".join(keys[:depth])
                raise ConfigError(
                    f"override {override!r}: {where} is a list of {len(place)}; {key!r} is no index of it"
                )
            index: Any = int(key)
        elif isinstance(place, dict):
            index = key
            below = place.get(key)
            if not last and (below is None or isinstance(below, str)):
                # A component written as a bare name gains options.
                place[key] = {} if below is None else {"name": below}
                made.append(keys[: depth + 1])
        else:
            where = ".".join(keys[:depth])
            raise ConfigError(f"override {override!r}: {where} is {place!r}, which has no keys")
        if last:
            place[index] = value
        else:
            place = place[index]
    return made
