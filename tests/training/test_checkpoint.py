"""Checkpoints: there whole or not at all, the right ones kept, everything restored."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rllava_core.errors import ConfigError, TrainingError
from rllava_core.mdp.environment import Start
from rllava_core.policy.policy import Policy
from rllava_core.training import checkpoint
from rllava_core.training.build import Parts
from rllava_core.training.checkpoint import Progress, prune, restore, save
from rllava_core.training.run_directory import checkpoints_in

Build = Callable[..., Parts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For checkpoints alone."""
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


CRITIC = ("algorithm=toy_critic",)


def learn(parts: Parts, steps: int = 2) -> None:
    """Change weights, heads, optimizer and the algorithm's own state."""
    examples = parts.task.examples("train")
    assert examples is not None
    for step in range(steps):
        played = parts.episodes.play([Start(example, 0) for example in examples[:4]], 2, seed=step)
        rewarded = [replace(trajectory, score=float(number)) for number, trajectory in enumerate(played)]
        for batch in parts.algorithm.prepare(rewarded, parts.trainer):
            parts.trainer.step(batch, parts.algorithm.loss, 1e-2)


def everything(parts: Parts) -> dict[str, torch.Tensor]:
    """Weights, heads, optimizer and algorithm as flat tensors."""
    flat: dict[str, torch.Tensor] = dict(parts.policy.state_dict())
    for number, state in parts.trainer.state_dict()["update"]["optimizer"]["state"].items():
        flat |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return flat | {f"algorithm.{name}": torch.as_tensor(v) for name, v in parts.algorithm.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("overrides", [(), CRITIC])
def test_everything_is_restored_bit_for_bit(build_toy: Build, folder: Path, overrides: tuple[str, ...]) -> None:
    parts = build_toy(*overrides)
    learn(parts)
    progress = Progress(step=12, evaluations={"best": {"success_rate": 0.5, "step": 10}}, wall_seconds=3.25)

    path = save(folder, parts, progress)
    fresh = build_toy(*overrides, checkpoint=path)
    assert not same(everything(fresh), everything(parts))
    restored = restore(path, fresh)

    assert path == folder / "step-000012"
    assert restored == progress
    assert same(everything(fresh), everything(parts))
    # Equal states could still hide a difference in what the next step does.
    learn(parts, 1)
    learn(fresh, 1)
    assert same(everything(fresh), everything(parts))


def test_a_checkpoint_is_one_that_transformers_reads_and_holds_no_pickle(build_toy: Build, folder: Path) -> None:
    parts = build_toy(*CRITIC)
    path = save(folder, parts, Progress(step=1))

    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    assert files == [
        "config.json",
        "model.safetensors",
        "resume/policy.json",
        "resume/policy.safetensors",
        "resume/progress.json",
        "resume/state.json",
        "resume/state.safetensors",
    ]
    weights = load_file(path / "model.safetensors")
    assert set(weights) == set(parts.policy.model.state_dict())


def test_checkpoints_are_listed_oldest_first_and_only_whole_ones(build_toy: Build, folder: Path) -> None:
    parts = build_toy()
    for step in (1_000_000, 20, 3):
        save(folder, parts, Progress(step=step))
    shutil.copytree(folder / "step-000020", folder / ".writing-step-000021")
    shutil.copytree(folder / "step-000020", folder / "step-22")
    (folder / "step-000023").mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")

    assert [step for step, _ in checkpoints_in(folder)] == [3, 20, 1_000_000]
    assert checkpoints_in(folder / "missing") == []


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (2, None, [40, 50]),
        (2, 20, [20, 40, 50]),
        (2, 50, [40, 50]),
        (1, 10, [10, 50]),
        (9, 10, [10, 20, 30, 40, 50]),
        (2, 0, [40, 50]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(folder: Path, keep: int, best: int | None, kept: list[int]) -> None:
    for step in (10, 20, 30, 40, 50):
        path = folder / f"step-{step:06d}"
        path.mkdir()
        (path / "config.json").write_text("{}", encoding="utf-8")
    (folder / ".writing-step-000060" / "resume").mkdir(parents=True)
    (folder / "mine").mkdir()

    prune(folder, keep, best)

    assert [step for step, _ in checkpoints_in(folder)] == kept
    assert sorted(path.name for path in folder.iterdir()) == ["mine", *(f"step-{step:06d}" for step in kept)]


def test_what_a_killed_run_left_does_not_get_into_the_new_checkpoint(build_toy: Build, folder: Path) -> None:
    leftover = folder / ".writing-step-000002"
    leftover.mkdir()
    (leftover / "adapter_config.json").write_text("half of an old one", encoding="utf-8")

    path = save(folder, build_toy(), Progress(step=2))

    assert not (path / "adapter_config.json").exists()
    assert list(folder.iterdir()) == [path]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(build_toy: Build, folder: Path) -> None:
    damaged = folder / "step-000002"
    damaged.mkdir()
    (damaged / "model.safetensors").write_bytes(b"half")

    path = save(folder, build_toy(), Progress(step=2))

    assert restore(path, build_toy(checkpoint=path)).step == 2
    assert list(folder.iterdir()) == [path]


FULL = OSError(28, "No space left on device")

WRITERS: dict[str, tuple[object, str, Exception]] = {
    "the tokenizer": (Policy, "model", Exception("No space left on device (os error 28)")),  # what tokenizers raise
    "the weights": (Policy, "model", SafetensorError("I/O error: No space left on device (os error 28)")),
    "the state": (checkpoint, "save_tree", FULL),
    "the progress": (Path, "write_text", FULL),
    "the disk itself": (checkpoint, "flush", FULL),
    "the name": (Path, "rename", FULL),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_is_one_clear_error_and_leaves_earlier_checkpoints_alone(
    build_toy: Build, folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    parts = build_toy()
    earlier = save(folder, parts, Progress(step=1))
    before = {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()}
    owner, name, error = WRITERS[what]

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if owner is Policy:
            patch.setattr(parts.adapter, "save", fail)
        else:
            patch.setattr(owner, name, fail)
        with pytest.raises(TrainingError) as caught:
            save(folder, parts, Progress(step=2))

    assert str(caught.value).startswith(f"checkpoint {folder / 'step-000002'} could not be written: ")
    assert "No space left on device" in str(caught.value)
    assert list(folder.iterdir()) == [earlier]
    assert {path: path.read_bytes() for path in earlier.rglob("*") if path.is_file()} == before


def test_a_mistake_of_an_adapter_is_not_taken_for_a_full_disk(
    build_toy: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = build_toy()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(parts.adapter, "save", fail)
    with pytest.raises(ZeroDivisionError):
        save(folder, parts, Progress(step=2))
    assert list(folder.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs the rights of root on Linux")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(build_toy: Build, small_disk: Path) -> None:
    parts = build_toy()
    learn(parts)

    def fill() -> None:
        for step in range(1, 100):
            save(small_disk, parts, Progress(step=step))

    with pytest.raises(TrainingError, match=r"step-000\d\d\d could not be written: .*No space left on device"):
        fill()

    saved = checkpoints_in(small_disk)
    assert len(saved) > 0
    assert sorted(path.name for path in small_disk.iterdir()) == [f"step-{step + 1:06d}" for step in range(len(saved))]
    fresh = build_toy(checkpoint=saved[-1][1])
    assert restore(saved[-1][1], fresh).step == len(saved)
    assert same(everything(fresh), everything(parts))


def test_a_checkpoint_with_heads_of_another_algorithm_is_refused(build_toy: Build, folder: Path) -> None:
    path = save(folder, build_toy(*CRITIC), Progress(step=1))

    with pytest.raises(ConfigError, match=r"step-000001 has the heads {'value\.weight': .* the algorithm has none"):
        restore(path, build_toy())
