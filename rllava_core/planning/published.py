"""Where the shapes of published models are. Imports no torch, so that a mistyped name is known at once."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from rllava_core.errors import ModelError
from rllava_core.plugins import Component, Registry

_ENDINGS = ("-instruct", "-hf")
"""What people leave away of a model's name."""


def published(config: type | None) -> dict[str, Path]:
    """Hub ids of the models whose shapes come with an adapter, and the folder that holds each one's `config.json`."""
    folder: Path | None = getattr(config, "shapes", None)
    if folder is None:
        return {}
    return {
        f"{file.parent.parent.name}/{file.parent.name}": file.parent for file in sorted(folder.glob("*/*/config.json"))
    }


def find_published(name: str, known: Mapping[str, Path]) -> Path:
    """The folder of a published model, by its hub id or the name that people call it.

    Raises ModelError that lists the names there are.
    """
    return known[_matching(name, known)]


def find_model(name: str, registry: Registry) -> tuple[Component, str]:
    """The adapter that has the shape of a published model, and the model's hub id. Raises ModelError."""
    owners: dict[str, Component] = {}
    for component in registry.components("model"):
        for hub_id in published(component.load_config()):
            owners.setdefault(hub_id, component)
    found = _matching(name, owners)
    return owners[found], found


def _matching(name: str, known: Mapping[str, object]) -> str:
    wanted = _short(name)
    found = [hub_id for hub_id in known if wanted in (_short(hub_id), _short(hub_id).rpartition("/")[2])]
    if found:
        return found[0]
    bare = {_short(hub_id).rpartition("/")[2]: hub_id for hub_id in known}
    hint = "".join(f" Did you mean {bare[close]}?" for close in get_close_matches(wanted.rpartition("/")[2], bare, n=1))
    listed = ", ".join(known) or "none"
    raise ModelError(
        f"model {name!r} is no directory, and no published model whose shape is known (known: {listed}).{hint}"
    )


def _short(name: str) -> str:
    short = name.lower()
    for ending in _ENDINGS:
        short = short.removesuffix(ending)
    return short
