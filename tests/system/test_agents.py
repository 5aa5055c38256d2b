"""Agents through the command line: many turns, every algorithm, environments that fail, and runs that are resumed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml
from click.testing import CliRunner, Result

from rllava_core.cli import rllava
from rllava_core.training.storage import load_tree, save_tree

LAKE: dict[str, Any] = {
    "model": {"adapter": "toy", "from_scratch": "tiny"},
    "algorithm": {"name": "grpo", "group_size": 4, "credit": "turn"},
    "task": {
        "environment": {
            "name": "gymnasium",
            "id": "FrozenLake-v1",
            "kwargs": {"is_slippery": False},
            "frame_size": 16,
            "actions": ["L", "D", "R", "U"],
        },
        "history": 1,
        "max_turns": 6,
    },
    "training": {"steps": 4, "prompts_per_step": 3, "eval_episodes": 2, "save_every": 2, "sample_every": 2, "seed": 3},
}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "group_size": 4, "credit": "turn"},
    "ppo": {"name": "ppo", "kl_coefficient": 0.1, "kl_target": 0.01, "minibatches": 2, "critic": "separate"},
    "dqn": {"name": "dqn", "warmup_turns": 0, "batch_size": 4, "target_every": 3, "priority_alpha": 0.6, "n_steps": 2},
}


@pytest.fixture(autouse=True)
def _plugins() -> None:
    for name in ("rllava_gymnasium", "rllava_grpo", "rllava_ppo", "rllava_dqn"):
        pytest.importorskip(name, reason=f"{name.replace('_', '-')} is not installed")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(rllava, [str(argument) for argument in arguments])


def write(directory: Path, **changes: Any) -> Path:
    path = directory / "lake.yaml"
    path.write_text(yaml.safe_dump({**LAKE, **changes}), encoding="utf-8")
    return path


def metrics(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


@pytest.mark.parametrize("history", [1, "all"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(algorithm: str, history: Any, tmp_path: Path) -> None:
    task = {**LAKE["task"], "history": history, "max_turns": 6 if history == 1 else 4}
    config = write(tmp_path, algorithm=ALGORITHMS[algorithm], task=task)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run("train", config, "--run-dir", whole)
    assert done.exit_code == 0, done.output
    # As a kill between the checkpoint of step 2 and that of step 4 would leave it.
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    (cut / "summary.json").unlink()
    resumed = run("train", config, "--run-dir", cut, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert metrics(cut) == metrics(whole)
    assert len(metrics(whole)) == 5
    for name in ("model.safetensors", "resume/policy.safetensors", "resume/state.safetensors", "resume/state.json"):
        ours, theirs = (directory / "checkpoints" / "step-000004" / name for directory in (cut, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_an_evaluation_reports_turns_and_draws_every_episode(tmp_path: Path) -> None:
    config = write(tmp_path)
    directory = tmp_path / "run"
    assert run("train", config, "--run-dir", directory).exit_code == 0
    done = run("eval", directory, "--save-episodes", "training.eval_episodes=5")
    assert done.exit_code == 0, done.output
    assert "5 held-out episodes" in done.output
    assert "turns" in done.output
    strips = sorted((directory / "eval" / "episodes").iterdir())
    answers = [
        json.loads(line) for line in (directory / "eval" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(strips) == len(answers) == 5
    for strip, answer in zip(strips, answers, strict=True):
        with PIL.Image.open(strip) as picture:
            assert picture.width >= 176 * min(8, answer["turns"] + 1)
        assert len(answer["actions"]) == answer["turns"]


@pytest.mark.parametrize("best", range(4))
def test_a_run_of_dqn_is_evaluated_by_the_values_it_has_learnt(best: int, tmp_path: Path) -> None:
    """With a bias that outweighs all else written into its checkpoint, one action is the best everywhere."""
    config = write(tmp_path, algorithm=ALGORITHMS["dqn"], training={**LAKE["training"], "steps": 1})
    directory = tmp_path / "run"
    assert run("train", config, "--run-dir", directory).exit_code == 0
    policy = directory / "checkpoints" / "step-000001" / "resume" / "policy"
    state = load_tree(policy)
    state["heads"]["q.bias"][best] += 1000.0
    save_tree(state, policy)

    done = run("eval", directory)

    assert done.exit_code == 0, done.output
    lines = (directory / "eval" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert {action for line in lines for action in json.loads(line)["actions"]} == {"LDRU"[best]}


def test_heads_of_another_algorithm_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert run("train", write(tmp_path), "training.steps=1", "--run-dir", directory).exit_code == 0

    done = run("eval", directory, "algorithm={name: dqn}")

    assert done.exit_code == 2
    assert "the heads of no algorithm" in " ".join(done.output.split())
    assert "'q.weight': (4, " in done.output


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "raised KeyError"),
        ("hangs", "did not answer for 1 s"),
        ("killed", "was killed by signal 9"),
    ],
)
def test_an_environment_that_fails_ends_its_own_episodes_and_is_named(how: str, said: str, tmp_path: Path) -> None:
    environment = {"name": "misbehaving", "how": how, "at": 3, "length": 5}
    config = write(
        tmp_path,
        task={"environment": environment, "workers": 2, "worker_timeout": 1.0, "history": 1},
        training={"steps": 1, "prompts_per_step": 1, "eval_episodes": 1, "save_every": 0},
        algorithm={"name": "grpo", "group_size": 2},
    )
    directory = tmp_path / "run"
    done = run("train", config, "--run-dir", directory)
    assert done.exit_code == 0, done.output
    assert f"the environment {said}" in " ".join(done.output.split()) or said in " ".join(done.output.split())
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "completed"
    assert any(said in what for what in summary["environment_failures"])
    step = metrics(directory)[1]
    assert step["rollout/truncated_by_failure"] == 1.0
    assert step["rollout/turns"] == 2.0  # the third turn of each never came to an end


def test_a_run_in_which_everything_fails_at_once_stops_with_the_reason(tmp_path: Path) -> None:
    environment = {"name": "misbehaving", "how": "raises", "at": 1}
    config = write(tmp_path, task={"environment": environment, "workers": 1})
    done = run("train", config, "--run-dir", tmp_path / "run")
    assert done.exit_code == 1
    assert "failed before their first turn was done" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("task.max_turns=0", "task.max_turns"),
        ("task.history=0", "task.history"),
        ("task.environment.id=FrozenLak-v1", "did you mean 'FrozenLake-v1'?"),
        ("task.environment.id=Pendulum-v1", "Box"),
        ("task.environment.turn_limit=0", "turn_limit"),
        ("task.workers=-1", "task.workers"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(override: str, said: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in LAKE["task"]["environment"].items() if key not in ("kwargs", "actions")}
    config = write(tmp_path, task={**LAKE["task"], "environment": environment})
    done = run("train", config, override, "--run-dir", tmp_path / "run")
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "run").exists()


def test_values_of_choices_need_choices(tmp_path: Path) -> None:
    environment = {**LAKE["task"]["environment"], "action_format": "text"}
    config = write(tmp_path, algorithm=ALGORITHMS["dqn"], task={**LAKE["task"], "environment": environment})
    done = run("train", config, "--run-dir", tmp_path / "run")
    assert done.exit_code == 2, done.output
    assert "values each of the choices" in " ".join(done.output.split())


EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ("training.steps=1", "training.prompts_per_step=2", "training.eval_episodes=2", "task.max_turns=3")


@pytest.mark.parametrize(
    ("example", "overrides"),
    [
        ("minigrid_ppo", ()),
        ("frozenlake_dqn", ("algorithm.warmup_turns=2", "algorithm.batch_size=4")),
        ("frozenlake_dqn", ("grpo",)),
        ("frozenlake_dqn", ("ppo",)),
        ("zoom", ()),
        ("zoom", ("task.environment.zoom_limit=0",)),
    ],
)
def test_the_examples_of_agents_run_as_the_readme_says(
    example: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """One step of each, with the real adapter; what they learn is measured by hand."""
    for name in ("rllava_qwen2vl", "rllava_vqa", "minigrid", "sklearn"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    text = (EXAMPLES / f"{example}.yaml").read_text(encoding="utf-8")
    alternatives = {name: value for value, name in re.findall(r"'(algorithm={name: (\w+), .*})'", text)}
    chosen = [alternatives.get(override, override) for override in overrides]
    done = run("train", EXAMPLES / f"{example}.yaml", *QUICK, *chosen, "--run-dir", tmp_path / "run")

    assert done.exit_code == 0, done.output
    step = metrics(tmp_path / "run")[1]
    assert step["policy/updates"] >= 1
    assert step["policy/grad_norm"] > 0 or step["reward/std"] == 0
    if overrides == ("task.environment.zoom_limit=0",):
        assert step["rollout/turns"] == 1


def test_no_example_of_an_agent_is_left_out_above() -> None:
    agents = {path.stem for path in EXAMPLES.glob("*.yaml") if "environment:" in path.read_text(encoding="utf-8")}
    assert agents == {"minigrid_ppo", "frozenlake_dqn", "zoom"}
