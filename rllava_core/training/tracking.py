"""Metrics: one JSON object a step in `metrics.jsonl`, and in TensorBoard or W&B through accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from rllava_core.errors import ConfigError
from rllava_core.training.files import write_text, writing

Metrics = Mapping[str, float]


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"training.trackers: {name!r} is not installed; pip install 'rllava-core[{name}]'")


class MetricsLog:
    """`metrics.jsonl`, which after a resume holds the steps before the checkpoint and no later ones.

    All keys but those beginning with `time/` are the same in every run of the same config on the same machine.
    """

    def __init__(self, path: Path, keep_until: int) -> None:
        """keep_until: lines of later steps, which a resumed run will write again, are dropped; -1: all lines."""
        self._path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= keep_until]
        with writing(str(path)):
            write_text(path, "".join(line + "\n" for line in kept))

    def write(self, step: int, metrics: Metrics) -> None:
        """Append one step."""
        with writing(str(self._path)), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class Trackers:
    """TensorBoard and W&B, where the config asks for them."""

    def __init__(self, names: Sequence[str], directory: Path, config: Mapping[str, Any]) -> None:
        self._trackers: list[GeneralTracker] = []
        for name in names:
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            location = (
                {"logging_dir": directory} if tracker_class.requires_logging_directory else {"dir": str(directory)}
            )
            tracker = tracker_class("rllava" if name == "wandb" else directory.name, **location)
            tracker.start()
            tracker.store_init_configuration(_flat(config))
            self._trackers.append(tracker)

    def write(self, step: int, metrics: Metrics) -> None:
        for tracker in self._trackers:
            tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _lines(path: Path) -> list[str]:
    """Complete lines; a kill may have left half of the last."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)
        except ValueError:
            break
        lines.append(line)
    return lines


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
    return flat
