"""`rllava train`: what a run leaves, and what a user reads whose config, data, reward or disk is not right."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]
Refused = Callable[..., str]


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, to show that nothing was lost."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_config_is_enough(run_rllava: Run, tmp_path: Path) -> None:
    result = run_rllava("train", "toy.yaml")

    assert result.exit_code == 0
    assert result.stderr == ""
    run = tmp_path / "runs" / "toy-001"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "trajectories",
        "checkpoints",
        "summary.json",
    }
    assert steps(run) == list(range(8))
    assert result.stdout.startswith("Run runs/toy-001\n")
    assert "Completed 7 steps in" in result.stdout


def test_overrides_and_the_place_come_from_the_command_line(run_rllava: Run, tmp_path: Path) -> None:
    result = run_rllava("train", "toy.yaml", "training.steps=1", "--run-dir", "here/run", "algorithm.group_size=2")

    assert result.exit_code == 0
    assert steps(tmp_path / "here" / "run") == [0, 1]
    assert "group_size: 2" in (tmp_path / "here" / "run" / "config.yaml").read_text(encoding="utf-8")


def test_every_run_has_a_directory_of_its_own_and_the_newest_is_resumed(run_rllava: Run, tmp_path: Path) -> None:
    for _ in range(2):
        assert run_rllava("train", "toy.yaml", "training.steps=1").exit_code == 0

    resumed = run_rllava("train", "toy.yaml", "training.steps=2", "--resume")

    assert "Resuming runs/toy-002 at step 1" in resumed.stdout
    assert steps(tmp_path / "runs" / "toy-001") == [0, 1]
    assert steps(tmp_path / "runs" / "toy-002") == [0, 1, 2]


BEFORE_A_RUN: dict[str, tuple[list[str], str]] = {
    "an unknown key": (["training.stepz=3"], "override 'training.stepz=3': training.stepz: unknown key; did you mean"),
    "a wrong type": (
        ["training.steps=many"],
        "override 'training.steps=many': training.steps: Input should be a valid",
    ),
    "a bad override": (["training.steps"], "override 'training.steps': expected section.key=value"),
    "an algorithm that is not installed": (
        ["algorithm=ppo2"],
        "override 'algorithm=ppo2': algorithm.name: no algorithm 'ppo2' is installed (installed: ",
    ),
    "a model directory without a config": (
        ["model={adapter: toy, path: empty}"],
        "model empty: holds no config.json",
    ),
    "an empty data set": (["task.dataset.count=0"], "data set 'colours' has no held_out examples"),
    "an option the algorithm refuses": (
        ["algorithm.aggregation=constant"],
        "toy.yaml with override 'algorithm.aggregation=constant': algorithm: aggregation_length goes with",
    ),
    "what the algorithm needs is missing": (
        ["algorithm=toy_discrete", "task.choices="],
        "toy.yaml: algorithm 'toy_discrete' needs choices, which none of the chosen parts provides",
    ),
    "a tracker that is not installed": (
        ["training.trackers=[wandb]"],
        "training.trackers: 'wandb' is not installed; pip install 'rllava-core[wandb]'",
    ),
}


@pytest.mark.parametrize("mistake", BEFORE_A_RUN)
def test_a_mistake_is_one_message_and_leaves_nothing_behind(
    refused: Refused, tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rllava_core.training.tracking.find_spec", lambda name: None)
    (tmp_path / "empty").mkdir()
    overrides, expected = BEFORE_A_RUN[mistake]

    message = refused("train", "toy.yaml", *overrides)

    assert message.startswith(expected)
    assert "\n" not in message
    assert not (tmp_path / "runs").exists()


def test_a_missing_algorithm_says_what_is_there_and_how_to_get_it(refused: Refused) -> None:
    message = refused("train", "toy.yaml", "algorithm=ppo2")

    assert "toy_critic, toy_discrete, toy_gradient" in message
    assert message.endswith("Try: pip install rllava-ppo2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "other.yaml: no such file"),
        ("model: [1\n", "other.yaml: not valid YAML: line 2, column 1: expected ',' or ']'"),
        ("", "other.yaml: expected sections (model, algorithm, task, training), found nothing"),
    ],
)
def test_a_file_that_holds_no_config_is_one_message(
    refused: Refused, tmp_path: Path, text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / "other.yaml").write_text(text, encoding="utf-8")

    assert refused("train", "other.yaml").startswith(expected)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("args", [["train"], ["train", "toy.yaml", "--no-such-option"], ["eval"]])
def test_wrong_usage_exits_with_2(run_rllava: Run, args: list[str]) -> None:
    result = run_rllava(*args)

    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_a_prompt_longer_than_the_context_is_named_and_nothing_is_cut(refused: Refused) -> None:
    message = refused("train", "toy.yaml", f"task.prompt={'x' * 300}")

    assert message.startswith("colours:0: 31")
    assert "tokens, the model's context is 256; use smaller images, a shorter prompt or fewer new tokens" in message


def test_a_prompt_that_names_no_field_is_named(refused: Refused) -> None:
    message = refused("train", "toy.yaml", "task.prompt=Say {qustion}")

    assert message == "colours:0: task.prompt names {qustion}, the example has the fields: question"


BROKEN = {
    "raises": r"reward 'broken' raised KeyError: 'nothing here' (task.py:61), on example colours:",
    "nan": r"reward 'broken' returned nan for example colours:",
    "short": r"reward 'broken' returned 15 values for 16 trajectories (first: example colours:",
    "text": r"reward 'broken' returned 'good' for example colours:",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_reward_that_breaks_at_a_later_step_is_named_with_its_example(
    refused: Refused, tmp_path: Path, how: str
) -> None:
    # Called for the first evaluation, steps 1 to 3, the evaluation at 3, and then for step 4.
    reward = f"task.rewards=[{{name: broken, how: {how}, call: 6}}]"

    message = refused("train", "toy.yaml", reward, "--run-dir", "run", code=1)

    assert message.startswith(f"step 4: {BROKEN[how]}")
    assert message.endswith("; the last good checkpoint is run/checkpoints/step-000002")
    assert steps(tmp_path / "run") == [0, 1, 2, 3]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["status"], summary["steps"]) == ("failed", 3)
    assert message in summary["error"]


def test_a_run_whose_reward_was_mended_goes_on(run_rllava: Run, refused: Refused, tmp_path: Path) -> None:
    """The reward counts its calls anew, so that after the resume it holds until the end."""
    command = ["train", "toy.yaml", "task.rewards=[{name: broken, call: 8}]", "training.steps=6", "--run-dir", "run"]
    refused(*command, code=1)
    assert steps(tmp_path / "run")[-1] == 5

    assert run_rllava(*command, "--resume").exit_code == 0
    assert steps(tmp_path / "run") == list(range(7))


BECOMES = """
import torch
from rllava_core import ComponentSpec, hookimpl
from rllava_core.algorithms.protocol import Loss

def make():
    from rllava_toy.algorithm import ToyGradient

    class Becomes(ToyGradient):
        batches = 0

        def prepare(self, trajectories, policy):
            self.batches += 1
            return super().prepare(trajectories, policy)

        def loss(self, batch, output):
            loss = super().loss(batch, output)
            return Loss(loss.total * float("VALUE"), loss.metrics) if self.batches == 4 else loss

    return Becomes

def Becomes(config):
    return make()(config)

@hookimpl
def rllava_algorithms():
    config = "rllava_toy.config:ToyGradientConfig"
    return [ComponentSpec(name="becomes", target="rllava_becomes:Becomes", config=config)]
"""


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_becomes_non_finite_stops_the_run_with_its_batch_described(
    refused: Refused, fake_distribution: Any, tmp_path: Path, value: str
) -> None:
    fake_distribution("rllava-becomes", "1.0", BECOMES.replace("VALUE", value))

    message = refused("train", "toy.yaml", "algorithm={name: becomes, group_size: 4}", "--run-dir", "run", code=1)

    assert message.startswith("step 4: the loss became ")
    assert value in message
    assert " on 16 trajectories of colours:" in message
    assert "(returns 0 to 1, 16 decisions)" in message
    assert message.endswith("; the last good checkpoint is run/checkpoints/step-000002")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_learning_rate_that_destroys_the_model_stops_the_run(refused: Refused, tmp_path: Path) -> None:
    message = refused("train", "toy.yaml", "training.learning_rate=1e30", "--run-dir", "run", code=1)

    assert message.startswith("step 2: the gradient became non-finite on 16 trajectories of colours:")
    assert message.endswith("; no checkpoint had been saved yet")
    assert steps(tmp_path / "run") == [0, 1]


def test_a_model_that_was_destroyed_is_not_saved(refused: Refused, tmp_path: Path) -> None:
    """Greedily, nonsense could still be answered; the run must not end as if all were well."""
    message = refused(
        "train", "toy.yaml", "training.learning_rate=1e38", "training.steps=1", "--run-dir", "run", code=1
    )

    assert message == (
        "evaluation at step 1: colours:0: the policy's log-probs are not finite, so its weights are damaged; "
        "no checkpoint had been saved yet"
    )
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_directory_that_holds_a_run_is_left_as_it_is(run_rllava: Run, refused: Refused, tmp_path: Path) -> None:
    assert run_rllava("train", "toy.yaml", "training.steps=2", "--run-dir", "run").exit_code == 0
    before = files(tmp_path / "run")

    again = refused("train", "toy.yaml", "--run-dir", "run")
    other = refused("train", "toy.yaml", "training.learning_rate=0.5", "--run-dir", "run", "--resume")

    assert again == "run already holds a run: add --resume to go on with it, or choose another --run-dir"
    assert "run holds a run with another config (training.learning_rate was 0.003, is 0.5)" in other
    assert files(tmp_path / "run") == before


def test_a_directory_of_something_else_is_left_as_it_is(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")

    message = refused("train", "toy.yaml", "--run-dir", "photos")

    assert message == "photos exists and holds no run: choose an empty or new --run-dir"
    assert files(tmp_path / "photos") == {"cat.png": b"cat"}


def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(
    run_rllava: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rllava_core.cli.display.Display.stepped", lambda *_: signal.raise_signal(signal.SIGINT))

    result = run_rllava("train", "toy.yaml", "task.prompt=Which colour?")

    assert result.exit_code == 130
    command = "rllava train toy.yaml 'task.prompt=Which colour?' --run-dir runs/toy-001 --resume"
    assert result.stdout.endswith(f"Go on with:  {command}\n")
    assert "Interrupted after 1 steps" in result.stdout


def test_debug_shows_where_an_error_came_from(run_rllava: Run) -> None:
    result = run_rllava("--debug", "train", "toy.yaml", "task.rewards=[{name: broken}]")

    assert result.exit_code == 1
    assert "KeyError: 'nothing here'" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: evaluation at step 0: reward 'broken' raised KeyError")
