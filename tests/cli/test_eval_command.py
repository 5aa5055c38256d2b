"""`rllava eval`: of a config, of a run, of one of its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

Run = Callable[..., Result]
Refused = Callable[..., str]


@pytest.fixture
def trained(run_rllava: Run, tmp_path: Path) -> Path:
    """A run that was evaluated and saved at steps 4, 8 and 12, and got better each time."""
    options = ["training.steps=12", "training.learning_rate=0.02", "training.prompts_per_step=8"]
    options += ["training.eval_every=4", "training.save_every=4", "training.keep_checkpoints=3"]
    assert run_rllava("train", "toy.yaml", "algorithm=toy_imitation", *options, "--run-dir", "run").exit_code == 0
    return tmp_path / "run"


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line for line in lines if "eval/success_rate" in line}


def shown(result: Result) -> dict[str, float]:
    rows = [line.strip("│").split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    return {row[0].strip(): float(row[1]) for row in rows}


def test_a_run_is_evaluated_as_it_evaluated_itself_last(run_rllava: Run, trained: Path) -> None:
    result = run_rllava("eval", "run")

    own = evaluations(trained)[12]
    assert result.exit_code == 0
    found = shown(result)
    assert found.pop("ms a turn, policy") > 0
    assert found.pop("ms a turn, environment") >= 0
    assert found == {
        "success rate": round(own["eval/success_rate"], 4),
        "return": round(own["eval/return_mean"], 4),
        "turns": 1.0,
        "reward match": round(own["eval/match"], 4),
    }
    assert "Weights: run/checkpoints/step-000012" in result.stdout
    assert "Every answer is in run/eval/answers.jsonl" in result.stdout


def test_every_answer_is_written_down(run_rllava: Run, trained: Path) -> None:
    run_rllava("eval", "run")

    written = answers(trained / "eval" / "answers.jsonl")
    assert [line["name"] for line in written] == [f"colours:{number}" for number in range(0, 24, 4)]
    assert all(
        line["success"] == (line["answer"] == line["right_answer"]) == (line["reward/match"] == line["return"] == 1.0)
        for line in written
    )
    assert sum(line["success"] for line in written) / 6 == evaluations(trained)[12]["eval/success_rate"]


def test_an_earlier_checkpoint_can_be_chosen(run_rllava: Run, trained: Path) -> None:
    rates = {step: line["eval/success_rate"] for step, line in evaluations(trained).items()}
    assert rates[4] < rates[8] < rates[12]

    for step in (4, 8, 12):
        result = run_rllava("eval", "run", "--checkpoint", str(step))
        assert f"step-{step:06d}" in result.stdout
        assert shown(result)["success rate"] == round(rates[step], 4)


def test_a_config_is_evaluated_with_the_weights_it_names(run_rllava: Run, trained: Path, tmp_path: Path) -> None:
    fresh = run_rllava("eval", "toy.yaml")
    weights = run_rllava(
        "eval", "toy.yaml", "model={adapter: toy, path: run/checkpoints/step-000012}", "--output", "out/a.jsonl"
    )

    assert shown(fresh)["success rate"] == round(evaluations(trained)[0]["eval/success_rate"], 4)
    assert shown(weights)["success rate"] == round(evaluations(trained)[12]["eval/success_rate"], 4)
    assert len(answers(tmp_path / "out" / "a.jsonl")) == 6
    assert not (tmp_path / "eval").exists()
    assert "Every answer is in" not in fresh.stdout


def test_overrides_apply_to_a_run_too(run_rllava: Run, trained: Path) -> None:
    result = run_rllava("eval", "run", "training.eval_episodes=2")

    assert "2 held-out episodes, greedy" in result.stdout
    assert len(answers(trained / "eval" / "answers.jsonl")) == 2


def test_swapped_images_are_said_to_be_swapped(run_rllava: Run, trained: Path) -> None:
    result = run_rllava("eval", "run", "--swap-images")

    assert result.exit_code == 0
    assert "6 held-out episodes, greedy, images swapped" in result.stdout
    assert (trained / "eval" / "answers-swapped-images.jsonl").is_file()
    assert not (trained / "eval" / "answers.jsonl").exists()


def test_chance_is_measured_beside_what_was_trained(run_rllava: Run, trained: Path) -> None:
    result = run_rllava("eval", "run", "--random", "--save-episodes")

    assert result.exit_code == 0
    assert "6 held-out episodes, at random" in result.stdout
    assert (trained / "eval" / "answers-random.jsonl").is_file()
    assert not (trained / "eval" / "answers.jsonl").exists()
    assert len(list((trained / "eval" / "episodes-random").iterdir())) == 6


def test_chance_needs_choices(run_rllava: Run, trained: Path) -> None:
    result = run_rllava("eval", "run", "--random", "task.choices=", "task.max_new_tokens=4")

    assert result.exit_code == 2
    assert "asks for free text" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_evaluation_changes_nothing_of_the_run(run_rllava: Run, trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}

    run_rllava("eval", "run")

    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file() and path in before} == before


def test_a_path_with_square_brackets_is_shown_as_it_is(run_rllava: Run, trained: Path) -> None:
    trained.rename(trained.with_name("run [a] [bold]"))

    result = run_rllava("eval", "run [a] [bold]")

    assert "Weights: run [a] [bold]/checkpoints/step-000012" in result.stdout
    assert "Every answer is in run [a] [bold]/eval/answers.jsonl" in result.stdout


def test_what_is_no_run_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()

    assert refused("eval", "photos") == "photos is no run directory: it holds no config.yaml"
    assert refused("eval", "nothing").startswith("nothing: no such file")
    assert list((tmp_path / "photos").iterdir()) == []


def test_a_run_without_a_checkpoint_is_refused(refused: Refused, trained: Path) -> None:
    import shutil

    shutil.rmtree(trained / "checkpoints")

    assert refused("eval", "run") == "run holds no checkpoint yet"


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(refused: Refused, trained: Path) -> None:
    assert refused("eval", "run", "--checkpoint", "5") == "run holds no checkpoint of step 5; it holds 4, 8, 12"


def test_a_config_has_no_checkpoints(refused: Refused) -> None:
    message = refused("eval", "toy.yaml", "--checkpoint", "5")

    assert message == "--checkpoint needs a run directory, not a config"


def test_a_damaged_checkpoint_is_named(refused: Refused, trained: Path) -> None:
    (trained / "checkpoints" / "step-000012" / "model.safetensors").write_bytes(b"half")

    message = refused("eval", "run", code=1)

    assert message.startswith("checkpoint run/checkpoints/step-000012 cannot be loaded (")


def test_answers_that_cannot_be_written_are_an_error(refused: Refused, trained: Path) -> None:
    (trained / "eval").write_text("in the way", encoding="utf-8")

    message = refused("eval", "run", code=1)

    assert message.startswith("run/eval/answers.jsonl could not be written: ")


def test_what_is_odd_about_the_choice_of_plugins_is_said(
    run_rllava: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLLAVA_DISABLE_PLUGINS", "no-such-plugin")

    result = run_rllava("eval", "run")

    assert result.exit_code == 0
    assert "warning: RLLAVA_DISABLE_PLUGINS names 'no-such-plugin', which is not installed" in result.stderr


@pytest.mark.parametrize("model", ["toy", "hosted"])
@pytest.mark.parametrize("task", [[], ["task.choices=null", "task.max_new_tokens=8"]], ids=["choices", "text"])
def test_an_engine_may_answer_by_a_model_of_its_own(
    run_rllava: Run, tmp_path: Path, model: str, task: list[str]
) -> None:
    """The same task, rewards and report; no weights are loaded, so a path that does not exist is never looked at."""
    chosen = ["model={adapter: hosted}"] if model == "hosted" else ["model={adapter: toy, path: nowhere}"]

    result = run_rllava("eval", "toy.yaml", *chosen, *task, "engine.rollout=oracle", "--output", "answers.jsonl")

    assert result.exit_code == 0, result.output
    assert shown(result)["success rate"] == 1.0
    assert "engine oracle" in result.stdout
    written = answers(tmp_path / "answers.jsonl")
    assert {line["answer"] for line in written} == {"red", "green", "blue"}
    assert all(line["success"] for line in written)


def test_an_engine_with_a_model_of_its_own_is_not_for_training(refused: Refused, tmp_path: Path) -> None:
    message = refused("train", "toy.yaml", "engine.rollout=oracle", "--run-dir", "run")

    assert message.startswith("toy.yaml: engine 'oracle' answers by a model of its own, so nothing that is trained")
    assert not (tmp_path / "run").exists()


def test_the_absence_of_a_model_needs_such_an_engine(refused: Refused) -> None:
    message = refused("eval", "toy.yaml", "model={adapter: hosted}")
    assert message.startswith("toy.yaml: model 'hosted' needs own_model, which none of the chosen parts provides")
