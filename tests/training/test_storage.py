"""Trees of tensors and values on disk, and files that are written whole or not at all."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rllava_core.errors import TrainingError
from rllava_core.training.files import write_text, writing
from rllava_core.training.storage import load_tree, save_tree


def equal(one: Any, two: Any) -> bool:
    """Structure, types of keys, and tensors bit for bit; lists and tuples are alike."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return isinstance(two, list) and len(one) == len(two) and all(map(equal, one, two))
    return type(one) is type(two) and (one == two or (one != one and two != two))


SHARED = torch.arange(12.0)

TREES = {
    "plain values": {"a": 1, "b": 2.5, "c": None, "d": "text — é", "e": True, "f": -math.inf, "g": math.nan},
    "an optimizer's state": {"state": {0: {"step": torch.tensor(3.0), "avg": torch.ones(2, 3)}}, "groups": [{"lr": 1}]},
    "keys that look alike": {1: torch.zeros(1), "1": torch.ones(1), "a.b": torch.zeros(2), "a": {"b": torch.ones(2)}},
    "lists and tuples": [1, (torch.tensor([1, 2]), [torch.tensor(True), "x"]), [], ()],
    "tensors that share memory": {"all": SHARED, "part": SHARED[3:6], "turned": SHARED.view(3, 4).T},
    "every type": [torch.ones(2, dtype=kind) for kind in (torch.bfloat16, torch.float16, torch.float64, torch.int64)],
    "empty tensors": {"none": torch.zeros(0, 4), "scalar": torch.tensor(7)},
    "no tensor": {"steps": 3},
    "nothing": {},
    "one tensor alone": torch.ones(3),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    save_tree(TREES[name], tmp_path / "state")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    assert equal(TREES[name], load_tree(tmp_path / "state"))


def test_much_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which one at a time is copied."""
    monkeypatch.setattr("rllava_core.training.storage.SHARD_BYTES", 64)
    large = {"weights": [torch.randn(size) for size in (3, 12, 40, 1, 1, 8)], "shared": SHARED, "part": SHARED[2:4]}

    save_tree(large, tmp_path / "state")

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "state-1.safetensors"
    assert len(names) > 4
    assert equal(large, load_tree(tmp_path / "state"))
    (tmp_path / "state-2.safetensors").unlink()
    with pytest.raises(OSError, match=r"state-2\.safetensors"):
        load_tree(tmp_path / "state")


def test_what_comes_back_needs_no_gradient(tmp_path: Path) -> None:
    save_tree([torch.ones(2, requires_grad=True)], tmp_path / "state")

    assert not load_tree(tmp_path / "state")[0].requires_grad


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"algorithm": {"replay": [np.zeros(3)]}}, "algorithm.replay.0 is a ndarray"),
        ({"algorithm": {"seen": {1, 2}}}, "algorithm.seen is a set"),
        ({"algorithm": {(1, 2): 3}}, "algorithm is a dict"),
        (object(), "the state is a object"),
    ],
)
def test_a_value_that_cannot_be_saved_is_named_by_its_place(tmp_path: Path, tree: Any, place: str) -> None:
    with pytest.raises(TrainingError) as caught:
        save_tree(tree, tmp_path / "state")

    assert str(caught.value).startswith(f"{place}; what is saved must be made of tensors, numbers, strings")


def test_text_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    seen: list[tuple[str, str]] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append((path.read_text(encoding="utf-8"), self.read_text(encoding="utf-8")))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_text(path, "new — é \udc80")

    assert seen == [("old", "new — é \\udc80")]
    assert path.read_text(encoding="utf-8") == "new — é \\udc80"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_text_that_cannot_be_written_leaves_the_old_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if name == "fsync" else Path, name, full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")

    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "fail",
    [
        lambda folder: (folder / "missing" / "file").write_text("x", encoding="utf-8"),
        lambda folder: save_tree({}, folder / "missing" / "state"),
        lambda folder: save_tree([torch.ones(1)], _with_directory(folder)),
    ],
)
def test_a_failure_to_write_becomes_one_clear_error(tmp_path: Path, fail: Callable[[Path], object]) -> None:
    with pytest.raises(TrainingError, match=r"^the thing could not be written: "), writing("the thing"):
        fail(tmp_path)


def _with_directory(folder: Path) -> Path:
    """A path whose safetensors file cannot be written: a directory has its name."""
    (folder / "state.safetensors").mkdir()
    return folder / "state"


def test_a_mistake_in_the_code_is_not_taken_for_a_full_disk() -> None:
    with pytest.raises(ZeroDivisionError), writing("the thing"):
        raise ZeroDivisionError
