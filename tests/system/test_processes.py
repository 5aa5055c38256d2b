"""Several processes compute what one does: DDP and FSDP2, with images everywhere, somewhere and nowhere."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from rllava_core.training.storage import load_tree

from .conftest import picture

pytest.importorskip("rllava_ppo", reason="rllava-ppo is not installed")

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "group_size": 4, "entropy_coefficient": 0.01, "kl_coefficient": 0.05},
    "ppo": {"name": "ppo", "minibatches": 2, "epochs": 1, "entropy_coefficient": 0.01},
}
IMAGES = {"everywhere": (1, 1, 1, 1), "of one group": (0, 0, 1, 0), "nowhere": (0, 0, 0, 0)}
"""Pictures of each of the four examples of a step. A group is on one process."""

WAYS = ("ddp", "fsdp")
CASES = [f"{way} {algorithm} {images}" for way in WAYS for algorithm in ALGORITHMS for images in IMAGES]


def write(directory: Path, case: str, **training: Any) -> Path:
    """A config of three steps on four examples, with the data that it names."""
    way, algorithm, images = case.split(" ", 2)
    directory.mkdir(parents=True)
    for split, count in (("train", 4), ("test", 2)):
        lines = []
        for number in range(count):
            line: dict[str, Any] = {"problem": f"Number {number}: red or blue?", "answer": ("red", "blue")[number % 2]}
            line["images"] = []
            for part in range(IMAGES[images][number]):
                file = f"{split}-{number}-{part}.png"
                picture(("red", "blue")[number % 2], (32 + 8 * number, 32), number).save(directory / file)
                line["images"].append(file)
            lines.append(json.dumps(line))
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {"name": "jsonl", "path": str(directory / "train.jsonl"), "held_out_path": str(directory / "test.jsonl")}
    config = {
        "model": {"adapter": "qwen2vl", "from_scratch": "tiny"},
        "algorithm": ALGORITHMS[algorithm],
        "task": {
            "dataset": {**data, "image": "images", "question": "problem"},
            "max_new_tokens": 3,
            # Of letters, so that the answers of a group differ from the first step on.
            "rewards": [{"name": "answer_format", "pattern": "(?s).*[a-z0-9 ].*", "require_end": False}],
        },
        "engine": {"train": {"name": "local", "device": "cpu", "parallel": way}},
        "training": {
            **{"steps": 3, "prompts_per_step": 4, "learning_rate": 1e-4, "eval_every": 3, "save_every": 3},
            **{"micro_batch_tokens": 90, "unseen_images": "ignore", "seed": 1, **training},
        },
    }
    path = directory / "task.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def carry_out(jobs: list[dict[str, Any]], directory: Path) -> None:
    """Jobs of `in_processes.py`."""
    directory.mkdir(exist_ok=True)
    path = directory / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("in_processes.py")), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=1000,
        check=True,
    )


def said(job: dict[str, Any]) -> list[tuple[str, int]]:
    """What each process wrote, and its exit code."""
    found = []
    for rank in range(job["processes"]):
        text = Path(f"{job['output']}.{rank}").read_text(encoding="utf-8")
        output, _, code = text.rpartition("\nexit code ")
        found.append((output, int(code)))
    return found


def job_of(directory: Path, processes: int, name: str, commands: list[list[object]], **more: Any) -> dict[str, Any]:
    written = [[str(word) for word in command] for command in commands]
    return {"processes": processes, "commands": written, "output": str(directory / name), **more}


def rllava(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rllava_core", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == code, (output, errors)
    return output + (errors or "")


def metrics(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in found]


def gradients(run: Path) -> list[torch.Tensor]:
    """A sum over all steps, which Adam keeps: its first moments."""
    state = load_tree(run / "checkpoints" / "step-000003" / "resume" / "state")["trainer"]["update"]["optimizer"]
    return [own["exp_avg"] for _, own in sorted(state["state"].items())]


def assert_same(run: Path, alone: Path) -> None:
    """Metrics and gradients of all steps, to 1e-5."""
    found, expected = metrics(run), metrics(alone)
    assert len(found) == len(expected) == 4
    for one, other in zip(expected, found, strict=True):
        # A run that was cut was evaluated once more.
        assert {name: other[name] for name in one} == pytest.approx(one, rel=1e-5, abs=1e-5)
    one, other = (torch.cat([item.flatten().double() for item in gradients(place)]) for place in (alone, run))
    assert float((one - other).norm()) < 1e-5 * float(one.norm())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by two processes; by one, which takes no part in any way; by four, where one group has pictures: more
    processes than cores, and as many as groups. And runs of two that end early, and go on with one and with four."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return compute(tmp_path_factory.mktemp("processes"))
    # The processes of one run of pytest share these runs: whichever comes first computes them.
    root = tmp_path_factory.getbasetemp().parent / "processes"
    done = root.with_suffix(".done")
    try:
        root.mkdir()
    except FileExistsError:
        wait_for(done.exists, 1000)
    else:
        try:
            compute(root)
        finally:
            done.touch()
    return root


def compute(root: Path) -> Path:
    """Carry out the runs that `trained` speaks of. Returns the directory."""
    for case in CASES:
        write(root / case, case)

    def train(cases: Sequence[str], name: str, *more: str) -> list[list[object]]:
        return [["train", root / case / "task.yaml", *more, "--run-dir", root / case / name] for case in cases]

    single = [case for case in CASES if case.startswith("ddp")]
    jobs = [
        job_of(root, 1, "of-1", train(single, "of-1")),
        job_of(root, 2, "of-2", train(CASES, "of-2")),
        job_of(root, 4, "of-4", train(FOUR, "of-4")),
        job_of(root, 2, "cut", train(RESUMED, "resumed-1", "training.steps=2")),
        job_of(root, 2, "cut again", train(RESUMED, "resumed-4", "training.steps=2")),
        job_of(root, 2, "longer", train(CASES[:1], "longer", *LONGER)),
        job_of(root, 1, "ahead-1", train(CASES[:1], "ahead-1", *AHEAD)),
        job_of(root, 2, "ahead cut", train(CASES[:1], "ahead-2", *AHEAD, "training.save_every=2", "training.steps=2")),
        job_of(root, 2, "ahead-2", train(CASES[:1], "ahead-2", *AHEAD, "--resume")),
        job_of(root, 1, "resumed-1", train(RESUMED, "resumed-1", "--resume")),
        job_of(root, 4, "resumed-4", train(RESUMED, "resumed-4", "--resume")),
    ]
    carry_out(jobs, root)
    for job in jobs:
        for output, code in said(job):
            assert code == 0, (job["output"], output)
    return root


FOUR = ["ddp grpo of one group", "fsdp ppo of one group"]
LONGER = ("training.steps=20", "training.save_every=1")
AHEAD = ("engine.rollout.async=1", "algorithm.importance=token")
RESUMED = [f"{way} ppo of one group" for way in WAYS]


def alone(root: Path, case: str) -> Path:
    return root / f"ddp {case.split(' ', 1)[1]}" / "of-1"


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(trained: Path, case: str) -> None:
    assert_same(trained / case / "of-2", alone(trained, case))
    lines = metrics(alone(trained, case))
    assert max(line.get("policy/grad_norm", 0.0) for line in lines) > 0.01
    assert any(0 < line["reward/mean"] < 1 for line in lines[1:])


@pytest.mark.parametrize("case", FOUR)
def test_four_processes_compute_what_one_does(trained: Path, case: str) -> None:
    assert_same(trained / case / "of-4", alone(trained, case))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("case", RESUMED)
def test_a_run_of_two_processes_goes_on_with_another_number(trained: Path, case: str, count: int) -> None:
    run = trained / case / f"resumed-{count}"
    assert_same(run, alone(trained, case))
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["processes"] == count


def test_episodes_sampled_ahead_are_those_of_one_process_and_a_checkpoint_keeps_them(trained: Path) -> None:
    assert_same(trained / CASES[0] / "ahead-2", trained / CASES[0] / "ahead-1")
    assert [line["rollout/behind"] for line in metrics(trained / CASES[0] / "ahead-2")[1:]] == [0, 1, 1]


def test_one_process_speaks_for_all(trained: Path) -> None:
    first, second = (Path(f"{trained / 'of-2'}.{rank}").read_text(encoding="utf-8") for rank in (0, 1))
    assert first.count("Completed 3 steps") == len(CASES)
    assert "step" not in second


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on_exactly(trained: Path, tmp_path: Path) -> None:
    config, run = trained / CASES[0] / "task.yaml", tmp_path / "run"
    process = rllava("train", config, *LONGER, "--run-dir", run, "--num-processes", 2)
    wait_for(lambda: steps_of(run) >= 3)
    ranks = {int(item.environ()["RANK"]): item for item in psutil.Process(process.pid).children()}
    ranks[1].kill()
    killed = time.monotonic()

    message = finished(process, 1)

    assert time.monotonic() - killed < 60
    assert "process 1 of 2 ended by signal 9, and the others with it" in message
    assert not ranks[0].is_running()
    assert steps_of(run) < 20
    job = job_of(tmp_path, 2, "go on", [["train", config, *LONGER, "--run-dir", run, "--resume"]])
    carry_out([job], tmp_path)
    assert [code for _, code in said(job)] == [0, 0]
    assert metrics(run) == metrics(trained / CASES[0] / "longer")


def test_ctrl_c_saves_the_step_that_all_processes_have_done(trained: Path, tmp_path: Path) -> None:
    case = "fsdp grpo everywhere"
    config, run = trained / case / "task.yaml", tmp_path / "run"
    process = rllava("train", config, "training.steps=200", "--run-dir", run, "--num-processes", 2)
    wait_for(lambda: steps_of(run) >= 2)
    process.send_signal(signal.SIGINT)

    message = finished(process, 130)

    steps = json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"]
    assert steps < 200
    assert (run / "checkpoints" / f"step-{steps:06d}").is_dir()
    assert message.count("Go on with:") == 1
    assert "--num-processes 2" in message


def test_what_several_processes_cannot_do_together_is_said_once(trained: Path, tmp_path: Path) -> None:
    config = trained / CASES[0] / "task.yaml"
    train: list[object] = ["train", config, "--run-dir", tmp_path / "run"]
    streamed = ["engine.train.stochastic_rounding=true", "model.dtype=bfloat16"]
    partly = ["engine.train.parallel=fsdp", "engine.train.optimizer=adafactor"]
    others = [{}, {"RLLAVA_DISABLE_PLUGINS": "rllava-dqn"}]
    jobs = [
        job_of(tmp_path, 2, "plugins", [train], environments=others),
        job_of(tmp_path, 2, "launchers", [["train", config]]),
        job_of(tmp_path, 2, "streamed", [[*train, *streamed]]),
        job_of(tmp_path, 2, "partly", [[*train, *partly]]),
        job_of(tmp_path, 2, "asked otherwise", [train], environments=[{"ACCELERATE_USE_SAGEMAKER": "true"}] * 2),
    ]

    carry_out(jobs, tmp_path)

    (first, code), (second, other) = said(jobs[0])
    assert code == other == 2
    assert "error" not in second
    found = re.search(r"has other plugins than process 0: (.*); process 0: (.*)\. Inst", first)
    assert found is not None
    assert "rllava-dqn" in found[2]
    assert "rllava-dqn" not in found[1]
    for job, expected in zip(jobs[1:], REFUSED, strict=True):
        for output, code in said(job):
            assert code == 2
            assert expected in output
            assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


REFUSED = (
    "a launcher has started this command several times: give it --run-dir",
    "engine.train.stochastic_rounding takes gradients as they are made, before several processes have averaged",
    "engine.train.optimizer adafactor cannot step on parts of weights: use adamw, or parallel: ddp",
    "accelerate's launcher sets ACCELERATE_USE_SAGEMAKER, which is not followed: engine.train says how",
)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) - 1 if path.exists() else -1


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
