"""Options that save memory compute what is computed without them, on a real model, alone and together."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rllava_core.cli import rllava
from rllava_core.config import load
from rllava_core.mdp.environment import Start
from rllava_core.plugins import load_plugins
from rllava_core.training.build import build_parts

pytest.importorskip("rllava_qwen2vl", reason="rllava-qwen2vl is not installed")
pytest.importorskip("rllava_grpo", reason="rllava-grpo is not installed")

CONFIG: dict[str, Any] = {
    "model": {"adapter": "qwen2vl", "from_scratch": "tiny"},
    "algorithm": {"name": "grpo", "group_size": 4, "entropy_coefficient": 0.01},
    "task": {
        "dataset": {"name": "digits"},
        "prompt": "{question}",
        "choices": list("0123456789"),
        "rewards": [{"name": "exact_match"}],
    },
    "training": {
        "steps": 6,
        "prompts_per_step": 4,
        "learning_rate": 1e-3,
        "eval_every": 0,
        "eval_episodes": 8,
        "save_every": 3,
        "sample_every": 0,
        "unseen_images": "ignore",
    },
}

EXACT = [
    "prefix_sharing: false",
    "checkpoint_activations: true",
    "offload_activations: true",
    "optimizer_on_cpu: true",
    "step_in_backward: true",
    "checkpoint_activations: true, offload_activations: true, optimizer_on_cpu: true",
    "checkpoint_activations: true, offload_activations: true, step_in_backward: true, prefix_sharing: false",
]
"""Settings under which a step is the same step."""

OTHERS = [
    "optimizer: adamw_8bit",
    "optimizer: adafactor",
    "optimizer: adamw_8bit, optimizer_on_cpu: true, checkpoint_activations: true",
    "optimizer: adafactor, step_in_backward: true, offload_activations: true",
]
"""Settings with another optimizer, whose step is another."""


def write(directory: Path, engine: str, **changes: dict[str, Any]) -> Path:
    config = {section: {**values, **changes.get(section, {})} for section, values in CONFIG.items()}
    train = yaml.safe_load(f"{{{engine}}}")
    if train.get("step_in_backward"):
        config["training"]["max_grad_norm"] = None
    config["engine"] = {"train": {"name": "local", **train}}
    path = directory / "task.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(rllava, [str(argument) for argument in arguments])


def trained(config: Path, steps: int = 3) -> dict[str, Tensor]:
    """The weights after a few steps on episodes that the first weights have played."""
    with build_parts(load(config, (), load_plugins())) as parts:
        examples = parts.task.examples("train")
        assert examples is not None
        starts = [Start(example, number) for number, example in enumerate(examples[:4])]
        trajectories = parts.episodes.play(starts, parts.algorithm.group_size, 0)
        trajectories = [replace(item, score=float(number % 3)) for number, item in enumerate(trajectories)]
        for step in range(steps):
            for batch in parts.algorithm.prepare(trajectories, parts.trainer):
                torch.manual_seed(step)
                parts.trainer.step(batch, parts.algorithm.loss, 1e-3)
        return {name: item.detach().clone() for name, item in parts.policy.named_parameters()}


def assert_same_step(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Weights have moved by about 3e-3. Adam divides a gradient by its own size, so rounding in one that is almost zero
    may turn a step around, which hardly any may be."""
    assert found.keys() == expected.keys()
    gaps = torch.cat([(found[name] - expected[name]).abs().flatten() for name in expected])
    assert gaps.mean() < 1e-6
    assert (gaps > 1e-4).float().mean() < 5e-3


@pytest.mark.parametrize("task", ["choices", "text"])
@pytest.mark.parametrize("engine", EXACT)
def test_a_step_is_the_same_step(engine: str, task: str, tmp_path: Path) -> None:
    changes = {"task": {"choices": None, "max_new_tokens": 5}} if task == "text" else {}
    limit = {"training": {"max_grad_norm": None}} if "step_in_backward" in engine else {}
    expected = trained(write(tmp_path, "device: cpu", **changes, **limit))

    found = trained(write(tmp_path, f"device: cpu, {engine}", **changes))

    assert_same_step(found, expected)


@pytest.mark.parametrize("engine", OTHERS)
def test_another_optimizer_makes_the_same_step_wherever_its_states_are(engine: str, tmp_path: Path) -> None:
    name = engine.split(",")[0]
    limit = {"training": {"max_grad_norm": None}} if "step_in_backward" in engine else {}
    alone = trained(write(tmp_path, name, **limit))
    adamw = trained(write(tmp_path, "device: cpu", **limit))

    found = trained(write(tmp_path, engine))

    assert_same_step(found, alone)
    moved = torch.cat([(found[key] - adamw[key]).abs().flatten() for key in adamw])
    assert moved.max() > 1e-4, "it is AdamW after all"


@pytest.mark.parametrize("engine", ["optimizer_on_cpu: true", "prefix_sharing: false", "optimizer: adamw_8bit"])
def test_the_cut_into_micro_batches_changes_nothing(engine: str, tmp_path: Path) -> None:
    whole = trained(write(tmp_path, engine))
    cut = trained(write(tmp_path, engine, training={"micro_batch_tokens": 60}))
    assert_same_step(cut, whole)


def test_low_rank_adapters_and_a_critic_of_its_own_under_all_of_them(tmp_path: Path) -> None:
    pytest.importorskip("rllava_ppo", reason="rllava-ppo is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    model = {"train": {"vision": "lora", "connector": "full", "language": "lora"}}
    algorithm = {"name": "ppo", "critic": "separate", "minibatches": 1}
    everything = "checkpoint_activations: true, offload_activations: true, optimizer_on_cpu: true"
    expected = trained(write(tmp_path, "device: cpu", model=model, algorithm=algorithm), steps=1)

    found = trained(write(tmp_path, everything, model=model, algorithm=algorithm), steps=1)

    assert_same_step(found, expected)


@pytest.mark.parametrize(
    "engine",
    [
        "device: cpu",
        "optimizer_on_cpu: true",
        "optimizer: adamw_8bit",
        "optimizer: adafactor, step_in_backward: true",
        "stochastic_rounding: true, optimizer: adamw_8bit, checkpoint_activations: true",
        "stochastic_rounding: true, optimizer_on_cpu: true, offload_activations: true",
    ],
)
def test_a_run_is_resumed_exactly(engine: str, tmp_path: Path) -> None:
    """In bfloat16, where masters hold more than the weights, and rounding is random."""
    config = write(tmp_path, engine, model={"dtype": "bfloat16"})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("train", config, "--run-dir", whole)
    assert done.exit_code == 0, done.output
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000006")
    (cut / "summary.json").unlink()

    resumed = run("train", config, "--run-dir", cut, "--resume")

    assert resumed.exit_code == 0, resumed.output
    for name in ("model.safetensors", "resume/state.safetensors"):
        ours, theirs = (directory / "checkpoints" / "step-000006" / name for directory in (cut, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_what_is_kept_for_backward(tmp_path: Path) -> None:
    """Layers that are computed again keep their input; what is offloaded is not kept where it was made."""
    kept = {engine: _kept(write(tmp_path, engine)) for engine in ("device: cpu", "checkpoint_activations: true")}
    assert kept["checkpoint_activations: true"] < 0.4 * kept["device: cpu"]


@pytest.mark.parametrize(
    ("engine", "changes", "message"),
    [
        ("step_in_backward: true", {"training": {"max_grad_norm": 1.0}}, "training.max_grad_norm=null"),
        ("step_in_backward: true", {"training": {"micro_batch_tokens": 30}}, "raise training.micro_batch_tokens"),
        ("step_in_backward: true, optimizer_on_cpu: true", {}, "choose one"),
        ("stochastic_rounding: true", {}, "model.dtype=bfloat16"),
        ("optimizer: sgd", {}, "engine.train.optimizer"),
    ],
)
def test_what_cannot_be_is_one_clear_message(
    engine: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = write(tmp_path, engine, **changes)
    overrides = ["training.max_grad_norm=1.0"] if changes.get("training", {}).get("max_grad_norm") else []

    done = run("train", config, *overrides, "--run-dir", tmp_path / "run")

    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def _kept(config: Path) -> int:
    """Bytes that autograd keeps of a forward pass, weights left out."""
    with build_parts(load(config, (), load_plugins())) as parts:
        examples = parts.task.examples("train")
        assert examples is not None
        trajectories = parts.episodes.play([Start(examples[0], 0)], 16, 0)
        weights = {item.untyped_storage().data_ptr() for item in parts.policy.parameters()}
        kept: dict[int, int] = {}

        def pack(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return saved

        with saved_tensors_hooks(pack, lambda saved: saved):
            output = parts.policy(parts.trainer._pack(trajectories))  # type: ignore[attr-defined]
        assert output.logprobs.requires_grad
        return sum(kept.values())
