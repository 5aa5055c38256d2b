"""Metrics on disk and in trackers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rllava_core.errors import ConfigError, TrainingError
from rllava_core.training import tracking
from rllava_core.training.tracking import MetricsLog, Trackers, check_trackers


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, steps: int) -> None:
    log = MetricsLog(path, keep_until=-1)
    for step in range(steps):
        log.write(step, {"reward/mean": step / 3})


def test_each_step_is_a_line_that_is_there_at_once(path: Path) -> None:
    log = MetricsLog(path, keep_until=-1)
    assert lines(path) == []

    log.write(0, {"reward/mean": 0.1})
    assert lines(path) == [{"step": 0, "reward/mean": 0.1}]
    log.write(1, {"reward/mean": 1 / 3})
    assert lines(path)[1] == {"step": 1, "reward/mean": 1 / 3}


@pytest.mark.parametrize(("keep", "kept"), [(-1, []), (0, [0]), (2, [0, 1, 2]), (4, [0, 1, 2, 3, 4]), (9, range(5))])
def test_a_resumed_log_holds_the_steps_before_the_checkpoint(path: Path, keep: int, kept: list[int]) -> None:
    write(path, 5)
    before = path.read_text(encoding="utf-8").splitlines()

    MetricsLog(path, keep_until=keep).write(7, {})

    after = path.read_text(encoding="utf-8").splitlines()
    assert after[:-1] == [before[step] for step in kept]
    assert json.loads(after[-1]) == {"step": 7}


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_that_a_kill_left_is_dropped(path: Path, cut: int) -> None:
    write(path, 4)
    path.write_text(path.read_text(encoding="utf-8")[:-cut], encoding="utf-8")

    MetricsLog(path, keep_until=9).write(4, {})

    # A line that lost no more than its line break is whole.
    assert [line["step"] for line in lines(path)] == ([0, 1, 2, 3, 4] if cut == 1 else [0, 1, 2, 4])


def test_a_log_that_cannot_be_written_is_named(path: Path) -> None:
    log = MetricsLog(path, keep_until=-1)
    path.unlink()
    path.mkdir()

    with pytest.raises(TrainingError, match=r"metrics\.jsonl could not be written"):
        log.write(0, {})


def test_a_tracker_that_is_not_installed_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "wandb" else object())

    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError) as caught:
        check_trackers(["tensorboard", "wandb"])

    assert str(caught.value) == "training.trackers: 'wandb' is not installed; pip install 'rllava-core[wandb]'"


def test_tensorboard_gets_every_metric_of_every_step(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = Trackers(["tensorboard"], tmp_path / "run", {"training": {"steps": 2, "betas": [0.9, 0.99]}, "x": None})
    trackers.write(0, {"eval/success_rate": 0.25})
    trackers.write(1, {"reward/mean": 0.5})
    trackers.write(2, {"reward/mean": 0.75})
    trackers.close()

    found = [path for path in (tmp_path / "run").rglob("events.out.tfevents.*") if path.parent.name != "hparams"]
    scalars: dict[str, list[tuple[int, float]]] = {}
    for file in found:
        events = accumulator.EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    assert scalars["eval/success_rate"] == [(0, 0.25)]
    assert scalars["reward/mean"] == [(1, 0.5), (2, 0.75)]


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    trackers = Trackers([], tmp_path / "run", {})
    trackers.write(1, {"reward/mean": 1.0})
    trackers.close()

    assert list(tmp_path.iterdir()) == []
