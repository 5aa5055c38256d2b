"""Two processes that share by ZeRO compute what one computes alone: images everywhere, in one group, nowhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from rllava_core.training.storage import load_tree

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: see environment.sh")
pytest.importorskip("rllava_ppo", reason="rllava-ppo is not installed")

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "group_size": 4, "entropy_coefficient": 0.01, "kl_coefficient": 0.05},
    "ppo": {"name": "ppo", "minibatches": 2, "epochs": 1, "entropy_coefficient": 0.01},
}
IMAGES = {"everywhere": (1, 1, 1, 1), "of one group": (0, 0, 1, 0), "nowhere": (0, 0, 0, 0)}
CASES = [(stage, algorithm, images) for stage in (2, 3) for algorithm in ALGORITHMS for images in IMAGES]


def write(directory: Path, algorithm: str, images: str) -> Path:
    """A config of five steps on four examples, with the data that it names."""
    directory.mkdir(parents=True)
    for split, count in (("train", 4), ("test", 2)):
        lines = []
        for number in range(count):
            line: dict[str, Any] = {"problem": f"Number {number}: red or blue?", "answer": ("red", "blue")[number % 2]}
            line["images"] = []
            if IMAGES[images][number]:
                pixels = np.random.default_rng(number).integers(0, 256, (32, 32 + 8 * number, 3), np.uint8)
                PIL.Image.fromarray(pixels).save(directory / f"{split}-{number}.png")
                line["images"] = [f"{split}-{number}.png"]
            lines.append(json.dumps(line))
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = {"name": "jsonl", "path": str(directory / "train.jsonl"), "held_out_path": str(directory / "test.jsonl")}
    config = {
        "model": {"adapter": "qwen2vl", "from_scratch": "tiny"},
        "algorithm": ALGORITHMS[algorithm],
        "task": {
            "dataset": {**data, "image": "images", "question": "problem"},
            "max_new_tokens": 3,
            "rewards": [{"name": "answer_format", "pattern": "(?s).*[a-z0-9 ].*", "require_end": False}],
        },
        "training": {
            # Small, so that what rounding makes of weights does not grow from step to step.
            **{"steps": 5, "prompts_per_step": 4, "learning_rate": 1e-5, "eval_every": 5, "save_every": 5},
            **{"micro_batch_tokens": 90, "unseen_images": "ignore", "seed": 1},
        },
    }
    path = directory / "task.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def train(config: Path, run: Path, *more: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "rllava_core", "train", str(config), "--run-dir", str(run), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return run


def by(stage: int) -> str:
    return f"engine.train={{name: deepspeed, stage: {stage}, device: cpu}}"


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def states(run: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Of AdamW, by the number of the weight: how many steps it took, and moments, which are sums of all gradients."""
    state = load_tree(run / "checkpoints" / "step-000005" / "resume" / "state")["trainer"]["update"]["optimizer"]
    return {int(number): own for number, own in state["state"].items()}


def assert_same_states(run: Path, alone: Path) -> None:
    found, expected = states(run), states(alone)
    assert {number: float(own["step"]) for number, own in found.items()} == {
        number: float(own["step"]) for number, own in expected.items()
    }
    for name in ("exp_avg", "exp_avg_sq"):
        one, other = (
            torch.cat([held[number][name].flatten().double() for number in sorted(held)]) for held in (expected, found)
        )
        assert float((one - other).norm()) < 1e-5 * float(one.norm())


def assert_same(run: Path, alone: Path) -> None:
    found, expected = metrics(run), metrics(alone)
    assert len(found) == len(expected) == 6
    for one, other in zip(expected, found, strict=True):
        assert {name: other[name] for name in one} == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert_same_states(run, alone)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """By algorithm and images: a config, with its run by one process and the local engine beside it."""
    root = tmp_path_factory.mktemp("alone")
    found = {}
    for algorithm in ALGORITHMS:
        for images in IMAGES:
            config = write(root / algorithm / images, algorithm, images)
            train(config, config.parent / "alone", "engine.train.device=cpu")
            found[algorithm, images] = config
    return found


@pytest.mark.parametrize(("stage", "algorithm", "images"), CASES)
def test_two_processes_compute_what_one_does(
    alone: dict[tuple[str, str], Path], tmp_path: Path, stage: int, algorithm: str, images: str
) -> None:
    config = alone[algorithm, images]

    run = train(config, tmp_path / "run", by(stage), "--num-processes", "2")

    assert_same(run, config.parent / "alone")
    assert any(line.get("policy/grad_norm", 0.0) > 0.01 for line in metrics(run))


def test_there_are_steps_with_images_and_without(alone: dict[tuple[str, str], Path]) -> None:
    taken = {float(own["step"]) for own in states(alone["ppo", "of one group"].parent / "alone").values()}
    assert taken == {5.0, 10.0}


def test_four_processes_of_one_group_each(alone: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    config = alone["grpo", "of one group"]

    run = train(config, tmp_path / "run", by(3), "--num-processes", "4")

    assert_same(run, config.parent / "alone")


@pytest.mark.parametrize(("stage", "processes"), [(2, 4), (3, 2), (3, 4), (3, 1)])
def test_a_run_of_two_goes_on_with_another_number(
    alone: dict[tuple[str, str], Path], tmp_path: Path, stage: int, processes: int
) -> None:
    config, run = alone["ppo", "of one group"], tmp_path / "run"
    often = ("training.save_every=3", "training.eval_every=3")
    train(config, run, by(stage), *often, "--num-processes", "2")
    shutil.rmtree(run / "checkpoints" / "step-000005")

    train(config, run, by(stage), *often, "--resume", "--num-processes", str(processes))

    assert_same_states(run, config.parent / "alone")


def test_layers_that_are_computed_again(alone: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    config = alone["ppo", "of one group"]
    options = "engine.train={name: deepspeed, stage: 3, device: cpu, checkpoint_activations: true}"

    run = train(config, tmp_path / "run", options, "--num-processes", "2")

    assert_same(run, config.parent / "alone")


REFUSED = {
    "deepspeed trains float32, and is given weights of bfloat16": (2, "model.dtype=bfloat16"),
    "divides all weights of a model, and model.": (3, "model.train={vision: frozen}"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_cannot_train_is_refused(alone: dict[tuple[str, str], Path], tmp_path: Path, message: str) -> None:
    stage, override = REFUSED[message]
    command = [sys.executable, "-m", "rllava_core", "train", str(alone["grpo", "nowhere"]), "--num-processes", "2"]
    done = subprocess.run(
        [*command, by(stage), override, "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_frozen_weights_under_stage_two(alone: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    config = alone["grpo", "of one group"]
    frozen = "model.train={vision: frozen}"
    one = train(config, tmp_path / "alone", "engine.train.device=cpu", frozen)

    run = train(config, tmp_path / "run", by(2), frozen, "--num-processes", "2")

    assert_same(run, one)
