"""Checkpoints: a standard transformers checkpoint, and beside it, in `resume/`, what going on exactly needs.

Randomness is a function of (seed, step) and the place in the data of the step, so neither needs to be stored: the step
number holds both. A checkpoint is written under another name, flushed, and renamed, so that it is there whole or not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rllava_core.engines.world import together
from rllava_core.errors import ConfigError, RllavaError, TrainingError
from rllava_core.policy.policy import Policy
from rllava_core.policy.trained import save_model
from rllava_core.training.build import Parts
from rllava_core.training.files import flush, writing
from rllava_core.training.run_directory import checkpoints_in
from rllava_core.training.storage import load_tree, save_tree


@dataclass
class Progress:
    """Where a run stands.

    step: how many steps are done.
    evaluations: first, last and best evaluation so far, as `summary.json` holds them.
    wall_seconds: spent so far, earlier sessions included.
    failures: what became of environments in workers that failed, and how often.
    """

    step: int = 0
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    wall_seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)


def save(directory: Path, parts: Parts, progress: Progress) -> Path:
    """Write `directory/step-NNNNNN`, which the first of several processes does when all have given it their parts.

    Raises TrainingError, in all of them, leaving earlier checkpoints as they were.
    """
    target = directory / f"step-{progress.step:06d}"
    state = {
        "trainer": parts.trainer.state_dict(),
        "algorithm": parts.algorithm.state_dict(),
        "episodes": parts.episodes.state_dict(),
    }
    world = parts.trainer.world
    together(world, lambda: _write(target, state, parts, progress) if world.rank == 0 else None)
    return target


def _write(target: Path, state: dict[str, Any], parts: Parts, progress: Progress) -> None:
    directory = target.parent
    temporary = directory / f".writing-{target.name}"
    try:
        with writing(f"checkpoint {target}"):
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "resume").mkdir(parents=True)
            save_model(parts.policy.model, temporary, parts.adapter)
            save_tree(parts.policy.extra_state(), temporary / "resume" / "policy")
            save_tree(state, temporary / "resume" / "state")
            (temporary / "resume" / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
            for path in [*temporary.rglob("*"), temporary]:
                flush(path)
            if target.exists():  # a damaged one, from before which the run was resumed
                _remove(target)
            temporary.rename(target)
            flush(directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def restore(checkpoint: Path, parts: Parts) -> Progress:
    """Everything but the model's weights, which are loaded with the model. Raises TrainingError for a damaged one."""
    restore_heads(checkpoint, parts.policy)
    with _reading(checkpoint):
        state = load_tree(checkpoint / "resume" / "state")
        parts.trainer.load_state_dict(state["trainer"])
        parts.algorithm.load_state_dict(state["algorithm"])
        parts.episodes.load_state_dict(state["episodes"])
        # An engine with weights of its own has those from before what was restored: adapters are merged on the way.
        parts.sampler.sync(parts.trainer.policy)
        return Progress(**json.loads((checkpoint / "resume" / "progress.json").read_text(encoding="utf-8")))


def restore_heads(checkpoint: Path, policy: Policy, *, acting: bool = False) -> None:
    """The heads, by which a policy may act, and their trunk.

    acting: the policy has only those heads of its algorithm that it may act by.

    Raises ConfigError for those of another algorithm, TrainingError for a damaged checkpoint.
    """
    with _reading(checkpoint):
        state = load_tree(checkpoint / "resume" / "policy")
        found = {name: tuple(weights.shape) for name, weights in state["heads"].items()}
        expected = {name: tuple(weights.shape) for name, weights in policy.extra_state()["heads"].items()}
        if acting:
            state["heads"] = {name: weights for name, weights in state["heads"].items() if name in expected}
            found = {name: shape for name, shape in found.items() if name in expected} or found
        if found != expected:
            raise ConfigError(
                f"checkpoint {checkpoint} has the heads {found or 'of no algorithm'}, and the algorithm has "
                f"{expected or 'none'}; it can be used by the algorithm that it was trained by"
            )
        policy.load_extra_state(state)


@contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except RllavaError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TrainingError(
            f"checkpoint {checkpoint} cannot be resumed from ({' '.join(f'{type(error).__name__}: {error}'.split())}); "
            "remove it to resume from the one before"
        ) from error


def prune(directory: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best, and whatever a killed run left half-written."""
    with writing(f"checkpoints {directory}"):
        for _, path in [item for item in checkpoints_in(directory)[:-keep] if item[0] != best_step]:
            _remove(path)
    for leftover in directory.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(path: Path) -> None:
    """Renamed first, so that a kill in the middle leaves nothing that looks like a checkpoint."""
    doomed = path.with_name(f".writing-old-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
