"""The run directory: what is where, whose run it is, and how a run is resumed in it."""

from __future__ import annotations

import glob
import itertools
import json
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rllava_core.config import RunConfig, read_yaml
from rllava_core.errors import ConfigError, PluginError, TrainingError
from rllava_core.plugins import Registry
from rllava_core.specs import HOOK_API
from rllava_core.training.files import unfinished, write_text, writing

# What may differ when a run is resumed: none of it changes the steps that were already done.
_MAY_CHANGE = (
    *("steps", "eval_every", "eval_episodes", "save_every", "keep_checkpoints", "sample_every"),
    *("unseen_images", "trackers"),
)

_CHECKPOINT = re.compile(r"step-(\d{6,})")


def checkpoints_in(directory: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints by step, oldest first."""
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and (path / "config.json").is_file():
            found.append((int(match[1]), path))
    return sorted(found)


class RunDirectory:
    """Paths within a run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.manifest = path / "manifest.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.trajectories = path / "trajectories"
        self.checkpoints = path / "checkpoints"

    def check(self, config: RunConfig, *, resume: bool) -> Path | None:
        """Whether a run may begin or go on here; writes nothing. Returns the checkpoint to resume from, if any.

        Raises ConfigError if it already holds a run and `resume` is off, or if the run it holds has another config.
        """
        if self.config.exists():
            if not resume:
                raise ConfigError(
                    f"{self.path} already holds a run: add --resume to go on with it, or choose another --run-dir"
                )
            self._check_same_run(config)
        elif self.path.exists() and (not self.path.is_dir() or any(self._foreign())):
            raise ConfigError(f"{self.path} exists and holds no run: choose an empty or new --run-dir")
        found = checkpoints_in(self.checkpoints)
        return found[-1][1] if found else None

    def begin(self, config: RunConfig) -> None:
        """Make the directory that of this run. The config comes first: a directory that holds it holds a run."""
        with writing(f"run directory {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, config.to_yaml())
            self.checkpoints.mkdir(exist_ok=True)

    def check_plugins(self, registry: Registry) -> list[str]:
        """Compare the plugins with those that the run in this directory, if any, was made with.

        Returns a warning for each of another version, or disabled now. Raises PluginError for those that are missing.
        """
        warnings, missing = [], []
        for distribution, version_then in self._plugins_then().items():
            # A distribution may have several plugins; it was recorded because one of them could be used.
            plugins = [plugin for plugin in registry.plugins if plugin.distribution == distribution]
            usable = [plugin for plugin in plugins if plugin.usable]
            then = f"the run in {self.path} was made with {distribution} {version_then}"
            if usable and usable[0].version != version_then:
                warnings.append(f"{then}, installed is {usable[0].version}: it may not go on exactly as it would have")
            elif not usable and registry.is_disabled(distribution):
                warnings.append(f"{then}, which is disabled now")
            elif not usable:
                missing += [plugin.problem for plugin in plugins] or [f"{distribution} {version_then} is not installed"]
        if missing:
            raise PluginError(
                f"the run in {self.path} was made with plugins that cannot be used now: {'; '.join(missing)}. Install "
                "them again; or, if the run does not need one, name it in RLLAVA_DISABLE_PLUGINS"
            )
        return warnings

    def _plugins_then(self) -> dict[str, str]:
        """Distribution and version of the plugins in the manifest; none where there is no run yet."""
        try:
            recorded: dict[str, str] = json.loads(self.manifest.read_text(encoding="utf-8"))["plugins"]
            return dict(recorded)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{self.manifest} cannot be read ({type(error).__name__}: {error}), so nobody can tell which plugins "
                "the run was made with; remove it to go on with those installed"
            ) from error

    def write_manifest(self, registry: Registry, **facts: str | int) -> None:
        """Versions of everything that computes, the state of the code, and what else is known of how this run computes:
        the seed, the device, how batches are laid out."""
        manifest = {
            "core": version("rllava-core"),
            "hook_api": HOOK_API,
            "plugins": {plugin.distribution: plugin.version for plugin in registry.plugins if plugin.usable},
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "accelerate")},
            **facts,
            "git": _git_state(),
        }
        with writing(str(self.manifest)):
            write_text(self.manifest, json.dumps(manifest, indent=2) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """The outcome of the run."""
        with writing(str(self.summary)):
            write_text(self.summary, json.dumps(summary, indent=2) + "\n")

    def _foreign(self) -> Iterator[Path]:
        """What a run that was killed while it wrote its config has not left here."""
        return (path for path in self.path.iterdir() if path != unfinished(self.config))

    def _check_same_run(self, config: RunConfig) -> None:
        before, now = read_yaml(self.config), yaml.safe_load(config.to_yaml())
        for section in (before, now):
            for key in _MAY_CHANGE:
                section.get("training", {}).pop(key, None)
        differences = _differences(before, now, "")
        if differences:
            shown = "; ".join(differences[:5])
            raise ConfigError(
                f"{self.path} holds a run with another config ({shown}): resume it with the config it began with, "
                "or choose another --run-dir"
            )


@contextmanager
def numbered_run_directory(root: Path, stem: str, *, resume: bool) -> Iterator[Path]:
    """`root/stem-001`, `-002`, …: the first that is free, or with `resume` the last that holds a run.

    It is made at once, so that runs which begin at the same moment never share one, and removed if it is left empty.
    """
    with writing(f"run directory in {root}"):
        path = (_last_run(root, stem) if resume else None) or _claimed(root, stem)
    try:
        yield path
    finally:
        for empty in (path, root):
            with suppress(OSError):  # it is not
                empty.rmdir()


def _last_run(root: Path, stem: str) -> Path | None:
    runs = {}
    for path in root.glob(f"{glob.escape(stem)}-*"):
        number = path.name.removeprefix(f"{stem}-")
        if re.fullmatch(r"\d{3,}", number) and RunDirectory(path).config.exists():
            runs[int(number)] = path
    return runs[max(runs)] if runs else None


def _claimed(root: Path, stem: str) -> Path:
    for number in itertools.count(1):
        path = root / f"{stem}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if path.exists():
                continue
            raise  # root is a file
        return path
    raise AssertionError("unreachable")


def _differences(before: Any, now: Any, key: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = list(dict.fromkeys([*before, *now]))
        return [
            difference
            for name in names
            for difference in _differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if before == now else [f"{key} was {before!r}, is {now!r}"]


def _git_state() -> dict[str, Any] | None:
    """Commit of the code in the current directory, and whether it was changed; None outside a repository."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(changed.stdout.strip())}
