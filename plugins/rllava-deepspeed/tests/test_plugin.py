"""Without DeepSpeed: what the plugin says of itself, what is refused, and what it asks of a step."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from rllava_core.cli import rllava
from rllava_core.config import load
from rllava_core.engines.world import Alone
from rllava_core.errors import ConfigError, TrainingError
from rllava_core.plugins import load_plugins
from rllava_deepspeed.config import DeepSpeedConfig
from rllava_deepspeed.engine import _Made, _Step

CONFIG = """\
model: {adapter: qwen2vl, from_scratch: tiny}
algorithm: {name: grpo, group_size: 2}
task: {dataset: {name: digits}, choices: ["0", "1"], rewards: [{name: exact_match}]}
engine: {train: deepspeed}
training: {steps: 1, prompts_per_step: 2, learning_rate: 1.0e-3}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "task.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def test_one_line_chooses_it(config: Path) -> None:
    resolved = load(config, ["engine.train.stage=3"], load_plugins())

    assert resolved.train_engine.component.spec.name == "deepspeed"
    assert resolved.train_engine.config == DeepSpeedConfig(stage=3)


@pytest.mark.parametrize("options", [{"stage": 1}, {"parallel": "fsdp"}, {"optimizer": "adafactor"}])
def test_what_it_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DeepSpeedConfig(**options)


def plan(config: Path, *more: str) -> dict[str, int]:
    """Bytes by part, of the update."""
    done = CliRunner().invoke(rllava, ["plan", str(config), *more, "--json"])
    assert done.exit_code == 0, done.output
    phases = json.loads(done.stdout)["phases"]
    parts: dict[str, int] = next(phase["host"] for phase in phases if phase["name"] == "update")
    return parts


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_deepspeed_it_says_what_is_missing(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rllava_core", "train", str(config), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "engine.train={name: deepspeed, device: cpu}", "--num-processes", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 2
    assert "engine.train: deepspeed needs DeepSpeed" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


class Engine:
    """DeepSpeed's, as far as a step asks it. groups: what the optimizer's parameter groups say beside weights."""

    def __init__(self, groups: int, decay: float) -> None:
        self.optimizer = self
        self.param_groups: list[dict[str, Any]] = [{"weight_decay": decay} for _ in range(groups)]
        self.steps = 0

    def step(self) -> None:
        self.steps += 1

    def get_global_grad_norm(self) -> float:
        return 1.0


class Others(Alone):
    """A process whose neighbour has made gradients in another order."""

    def gathered(self, own: Any) -> list[Any]:
        return [own, own + 1]


class Bench:
    """A step over two groups, of weights 0 and 1, and of 2 and 3."""

    def __init__(self, decay: float = 0.0, world: Alone | None = None) -> None:
        self.weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(4)]
        self.engine = Engine(2, decay)
        counts = [[torch.zeros(())], [torch.zeros(())]]
        names = ["a", "b", "c", "d"]
        self.step = _Step(self.engine, [[0, 1], [2, 3]], names, _Made(self.weights), counts, world or Alone())

    def take(self, used: Sequence[int]) -> list[bool]:
        """Which groups rest in a step that uses these weights."""
        self.step.begin(1, 0.1)
        torch.stack([self.weights[number] for number in used]).sum().backward()
        assert self.step.finish() == 1.0
        return [group["rests"] for group in self.engine.param_groups]


def test_a_group_that_a_step_does_not_use_rests() -> None:
    bench = Bench()
    assert bench.take([0, 1]) == [False, True]
    assert bench.take([0, 1, 2, 3]) == [False, False]
    assert bench.take([1, 0]) == [False, True]
    assert set(bench.step.taken()) == {0, 1, 2, 3}


def test_weights_that_no_step_uses_are_left_alone() -> None:
    bench = Bench()
    assert bench.take([0, 1, 3]) == bench.take([0, 1, 3]) == [False, False]
    assert set(bench.step.taken()) == {0, 1, 3}


@pytest.mark.parametrize(("used", "named"), [([0, 2], "does not use b"), ([0, 1, 2, 3], "uses d")])
def test_a_step_that_uses_other_weights_of_a_group_is_refused(used: list[int], named: str) -> None:
    bench = Bench()
    bench.take([0, 1, 2])

    with pytest.raises(TrainingError, match=named):
        bench.take(used)
    assert bench.engine.steps == 1


def test_weights_that_decay_must_all_be_used() -> None:
    with pytest.raises(TrainingError, match=r"does not use d.*weight_decay"):
        Bench(decay=0.1).take([0, 1, 2])


def test_processes_that_make_gradients_in_different_orders_are_stopped() -> None:
    bench = Bench(world=Others())
    with pytest.raises(TrainingError, match="different orders"):
        bench.take([0, 1])
    assert bench.engine.steps == 0


def test_steps_of_one_group_that_differ_cannot_be_resumed() -> None:
    bench = Bench()
    bench.step.resume({0: 5.0, 1: 5.0, 3: 2.0})
    assert bench.step.taken() == {0: 5.0, 1: 5.0, 3: 2.0}
    with pytest.raises(ConfigError, match="4 and 5 steps"):
        bench.step.resume({0: 5.0, 1: 4.0})


@pytest.mark.parametrize("stage", [2, 3])
def test_a_plan_divides_gradients_and_states(config: Path, stage: int) -> None:
    chosen = f"engine.train={{name: deepspeed, device: cpu, stage: {stage}}}"
    alone, four = plan(config, chosen), plan(config, chosen, "--processes", "4")

    assert four["optimizer"] * 4 == pytest.approx(alone["optimizer"], abs=8)
    assert four["weights"] == alone["weights"]
    trained = alone["optimizer"] // 2
    assert four["shard of weights"] * 4 == pytest.approx((stage - 1) * trained, abs=8)


def test_nothing_is_searched_that_it_cannot_do(config: Path) -> None:
    done = CliRunner().invoke(rllava, ["plan", str(config), "--processes", "4", "--fit", "24GB"])

    assert done.exit_code != 0
    assert "--fit searches options of the engine `local`" in str(done.exception) + done.output
