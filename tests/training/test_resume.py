"""The promise of `--resume`: whatever ended a run, going on gives bit for bit what an uninterrupted run gives."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KINDS = {
    "state": [],
    "heads": ["algorithm=toy_critic"],
    "reference": ["algorithm.kl_coefficient=0.1", "algorithm.minibatches=2", "training.schedule=cosine"],
    "ahead": ["engine.rollout.async=1", "algorithm.importance=token", "algorithm.kl_coefficient=0.1"],
    "text": ["task.choices=", "task.max_new_tokens=3", "training.steps=5", "training.weight_decay=0.1"],
}
"""What a run may keep from step to step: the algorithm's own state, heads, a reference, episodes sampled ahead, nothing
but weights."""

_STATE = ("policy.json", "policy.safetensors", "state.json", "state.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def outcome(run: Path) -> dict[str, Any]:
    """Everything about a finished run that must not depend on how often it was interrupted."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    last = run / "checkpoints" / checkpoints[-1]
    return {
        "status": summary["status"],
        "steps": summary["steps"],
        "eval": summary["eval"],
        "metrics": metrics(run),
        "checkpoints": checkpoints,
        "weights": (last / "model.safetensors").read_bytes(),
        "state": [(last / "resume" / name).read_bytes() for name in _STATE],
    }


@pytest.fixture(scope="session")
def whole(rllava_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], dict[str, Any]]:
    """`whole(config, kind)`: the outcome of an uninterrupted run, made once; with its directory and its seconds."""
    known: dict[str, dict[str, Any]] = {}

    def make(config: Path, kind: str) -> dict[str, Any]:
        if kind not in known:
            run = tmp_path_factory.mktemp("whole") / "run"
            began = time.monotonic()
            done = rllava_process("train", str(config), *KINDS[kind], "--run-dir", str(run))
            assert done.code == 0, done.stderr
            known[kind] = {**outcome(run), "seconds": time.monotonic() - began, "run": run}
        return known[kind]

    return make


def same(resumed: dict[str, Any], uninterrupted: dict[str, Any]) -> None:
    """Compare part by part, so that a failure says which part differs."""
    for name, value in resumed.items():
        assert value == uninterrupted[name], name


def at(place: str, call: int, *, name: str = "SIGKILL", after: bool = False) -> dict[str, Any]:
    """A signal around a call of a function; places without a module are the loop's."""
    place = place if ":" in place else f"rllava_core.training.loop:{place}"
    return {"at": place, "call": call, "signal": name, "after": after}


CHECKPOINT, STORAGE = "rllava_core.training.checkpoint", "rllava_core.training.storage"
FILES = "rllava_core.training.files"

MOMENTS = {
    "before the directory is made": at("RunDirectory.begin", 1),
    "while the config is written": at(f"{FILES}:os.fsync", 1),
    "between config and manifest": at("RunDirectory.begin", 1, after=True),
    "in the first evaluation": at("evaluate", 1),
    "before any step": at("_Run._step", 1),
    "before the first checkpoint": at("_Run._step", 2, after=True),
    "between metrics and checkpoint": at("_Run._save", 1),
    "as the first checkpoint begins": at(f"{CHECKPOINT}:save", 1),
    "before the model is written": at("rllava_core.testing.tiny:TinyAdapter.save", 2),
    "with the model written": at("rllava_core.testing.tiny:TinyAdapter.save", 2, after=True),
    "with half of the state written": at(f"{STORAGE}:save_file", 2),
    "with the state written": at(f"{CHECKPOINT}:save_tree", 2, after=True),
    "with every file written, some flushed": at(f"{CHECKPOINT}:flush", 12),
    "with the checkpoint in place, not pruned": at(f"{CHECKPOINT}:prune", 2),
    "while an old checkpoint is removed": at(f"{CHECKPOINT}:shutil.rmtree", 5),
    "between steps": at("rllava_core.cli.display:Display.stepped", 5),
    "in the middle of a step": at("score_once", 6),
    "while a trajectory sample is written": at("write_sample", 1, after=True),
    "after the last checkpoint": at("RunDirectory.write_summary", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_point_goes_on_exactly(
    rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path, moment: str
) -> None:
    uninterrupted = whole(toy_config, "state")
    run = tmp_path / "run"
    command = ["train", str(toy_config), "--run-dir", str(run)]

    killed = rllava_process(*command, signals=[MOMENTS[moment]])
    resumed = rllava_process(*command, "--resume")

    assert killed.code == -signal.SIGKILL
    assert resumed.code == 0, resumed.stderr
    same(outcome(run), uninterrupted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_again_and_again_goes_on_exactly(
    rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path, kind: str
) -> None:
    uninterrupted = whole(toy_config, kind)
    command = ["train", str(toy_config), *KINDS[kind], "--run-dir", str(tmp_path / "run"), "--resume"]

    first = rllava_process(*command, signals=[at("score_once", 5)])
    second = rllava_process(*command, signals=[at(f"{STORAGE}:save_file", 1)])
    third = rllava_process(*command)

    assert (first.code, second.code) == (-signal.SIGKILL, -signal.SIGKILL)
    assert third.code == 0, third.stderr
    same(outcome(tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_moments_goes_on_exactly(
    rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path, seed: int
) -> None:
    uninterrupted = whole(toy_config, "reference")
    command = ["train", str(toy_config), *KINDS["reference"], "--run-dir", str(tmp_path / "run"), "--resume"]
    moments = random.Random(seed)

    for _ in range(4):
        rllava_process(*command, kill_after=moments.uniform(0.1, 1.0) * uninterrupted["seconds"])
    last = rllava_process(*command)

    assert last.code == 0, last.stderr
    same(outcome(tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize("kind", ["heads", "reference", "ahead"])
def test_ctrl_c_finishes_the_step_saves_it_and_says_how_to_go_on(
    rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path, kind: str
) -> None:
    run = tmp_path / "a run"
    command = ["train", str(toy_config), *KINDS[kind], "--run-dir", str(run)]

    stopped = rllava_process(*command, signals=[at("score_once", 3, name="SIGINT")])

    assert stopped.code == 130
    assert "Stopping after this step, which will be saved" in stopped.stdout
    options = " ".join(KINDS[kind])
    assert f"Go on with:  rllava train {toy_config} {options} --run-dir '{run}' --resume\n" in stopped.stdout
    assert "Traceback" not in stopped.stderr
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert (summary["status"], summary["steps"]) == ("interrupted", 3)
    assert (run / "checkpoints" / "step-000003").is_dir()

    resumed = rllava_process(*command, "--resume")

    assert resumed.code == 0, resumed.stderr
    assert f"Resuming {run} at step 3" in resumed.stdout
    same(outcome(run), whole(toy_config, kind))


def test_a_second_ctrl_c_stops_at_once_and_loses_nothing_that_was_saved(
    rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["train", str(toy_config), "--run-dir", str(run)]

    stopped = rllava_process(
        *command, signals=[at("score_once", 4, name="SIGINT"), at("learning_rate", 4, name="SIGINT")]
    )

    assert stopped.code == 130
    assert "interrupted" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert [line["step"] for line in metrics(run)] == [0, 1, 2, 3]
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]

    assert rllava_process(*command, "--resume").code == 0
    same(outcome(run), whole(toy_config, "state"))


def test_ctrl_c_during_the_first_evaluation_stops_before_any_step(
    rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["train", str(toy_config), "--run-dir", str(run)]

    stopped = rllava_process(*command, signals=[at("rllava_core.training.evaluation:score_once", 1, name="SIGINT")])

    assert stopped.code == 130
    assert [line["step"] for line in metrics(run)] == [0]
    assert rllava_process(*command, "--resume").code == 0
    same(outcome(run), whole(toy_config, "state"))


def test_resuming_a_completed_run_changes_nothing(
    rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole(toy_config, "state")["run"], run)
    command = ["train", str(toy_config), "--run-dir", str(run)]
    times = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    wall_seconds = json.loads((run / "summary.json").read_text(encoding="utf-8"))["wall_seconds"]

    again = rllava_process(*command, "--resume")

    assert again.code == 0, again.stderr
    same(outcome(run), whole(toy_config, "state"))
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == times
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["wall_seconds"] == wall_seconds


def test_a_completed_run_goes_on_to_a_later_last_step(
    rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["train", str(toy_config), "--run-dir", str(run)]
    assert rllava_process(*command, "training.steps=4").code == 0

    longer = rllava_process(*command, "--resume")

    assert longer.code == 0, longer.stderr
    same_steps = {key: value for key, value in outcome(run).items() if key in ("steps", "weights", "state")}
    same(same_steps, whole(toy_config, "state"))
    # The shorter run evaluated at its last step, too, which changes nothing else.
    evaluated = [line["step"] for line in metrics(run) if "eval/success_rate" in line]
    assert evaluated == [0, 3, 4, 6, 7]


def test_another_seed_gives_another_run(rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path) -> None:
    """Without which the tests above would prove nothing."""
    done = rllava_process("train", str(toy_config), "training.seed=1", "--run-dir", str(tmp_path / "run"))

    assert done.code == 0
    uninterrupted = whole(toy_config, "state")
    assert outcome(tmp_path / "run")["weights"] != uninterrupted["weights"]
    rewards = [line.get("reward/mean") for line in uninterrupted["metrics"]]
    assert len(set(rewards)) > 3
    assert [line.get("reward/mean") for line in outcome(tmp_path / "run")["metrics"]] != rewards


DAMAGE: dict[str, Callable[[Path], object]] = {
    "model.safetensors": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "resume/state.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "resume/state.json": lambda path: path.write_text("{", encoding="utf-8"),
    "resume/progress.json": lambda path: path.write_text('{"setp": 2}', encoding="utf-8"),
    "resume/progress.json ": lambda path: path.with_name("progress.json").unlink(),
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path, file: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole(toy_config, "state")["run"], run)
    command = ["train", str(toy_config), "--run-dir", str(run)]
    last = run / "checkpoints" / "step-000007"
    DAMAGE[file](last / file.strip())
    before = metrics(run)

    refused = rllava_process(*command, "--resume")

    assert refused.code == 1
    assert str(last) in refused.stderr
    assert "remove it" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert metrics(run) == before

    (last / "config.json").unlink()  # enough: without it, it is no checkpoint
    assert rllava_process(*command, "--resume").code == 0
    same(outcome(run), whole(toy_config, "state"))


def test_a_disk_that_is_full_ends_the_run_with_a_message_and_going_on_is_exact(
    rllava_process: Any, whole: Any, toy_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ["train", str(toy_config), "--run-dir", str(run)]
    rllava_process(*command, signals=[at("_Run._step", 3)])
    saved = run / "checkpoints" / "step-000002"
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}

    # Room for everything but the weights.
    full = rllava_process(*command, "--resume", file_limit=(saved / "model.safetensors").stat().st_size - 1)

    assert full.code == 1
    failed = run / "checkpoints" / "step-000004"
    assert re.match(rf"error: checkpoint {re.escape(str(failed))} could not be written: .*File too large", full.stderr)
    assert full.stderr.count("\n") == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before

    assert rllava_process(*command, "--resume").code == 0
    same(outcome(run), whole(toy_config, "state"))


def test_a_disk_that_is_full_from_the_beginning_is_named_at_once(
    rllava_process: Any, toy_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    full = rllava_process("train", str(toy_config), "--run-dir", str(run), file_limit=500)

    assert full.code == 1
    assert full.stderr.startswith(f"error: run directory {run} could not be written: ")
    assert full.stderr.endswith("File too large\n")
    assert list(run.iterdir()) == []
