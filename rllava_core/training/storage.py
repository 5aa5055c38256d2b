"""State on disk: trees of tensors and plain values as safetensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rllava_core.errors import TrainingError

_TENSOR = "__tensor__"
_KEYS = "__items__"


SHARD_BYTES = 2**30
"""Tensors written to one file, and so copied at once: the states of an optimizer may fill most of the memory."""


def save_tree(tree: Any, path: Path) -> None:
    """Write nested dicts, lists and tuples of tensors and JSON values as `path`.json and `path`.safetensors, where
    there is much of them followed by `path`-1.safetensors and so on.

    Raises TrainingError that names the place of any other value.
    """
    tensors: dict[str, Tensor] = {}
    plain = _detach(tree, (), tensors)
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    path.with_suffix(".json").write_text(json.dumps({"tree": plain, "files": len(shards)}), encoding="utf-8")
    for number, names in enumerate(shards):
        # Copies: safetensors refuses tensors that share memory.
        save_file({name: tensors[name].cpu().clone().contiguous() for name in names}, _shard(path, number))


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote; tensors on the CPU; tuples come back as lists."""
    written = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for number in range(written["files"]):
        tensors |= load_file(_shard(path, number))
    return _attach(written["tree"], tensors)


def _shard(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}-{number}.safetensors" if number else f"{path.name}.safetensors")


def _detach(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # Numbered, since {"a.b": …} and {"a": {"b": …}} have the same path.
        name = ".".join([str(len(tensors)), *path])
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        # As pairs, since JSON would turn the integer keys of optimizer states into strings.
        return {_KEYS: [[key, _detach(item, (*path, str(key)), tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_detach(item, (*path, str(index)), tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TrainingError(
        f"{'.'.join(path) or 'the state'} is a {type(value).__name__}; what is saved must be made of tensors, numbers, "
        "strings, lists, and dicts with keys of strings or integers"
    )


def _attach(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _attach(item, tensors) for key, item in value[_KEYS]}
    if isinstance(value, list):
        return [_attach(item, tensors) for item in value]
    return value
