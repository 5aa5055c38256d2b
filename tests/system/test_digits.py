"""The shipped examples run, and what they train is an ordinary transformers checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rllava_core.cli import rllava

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
COUNT = 30

QUICK = [
    "training.steps=3",
    # Three larger steps may leave one answer for all images, and tests with little to tell apart.
    "training.learning_rate=1.0e-5",
    "training.prompts_per_step=4",
    "algorithm.group_size=4",
    "training.eval_every=2",
    f"training.eval_episodes={COUNT}",
]


def rllava_here(*args: str) -> str:
    result = CliRunner().invoke(rllava, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each example, evaluated afterwards by `rllava eval`, as it is and with swapped images."""
    for name in ("rllava_qwen2vl", "rllava_grpo", "rllava_vqa", "sklearn"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    root = tmp_path_factory.mktemp("digits")
    found = {}
    for kind, example in (("choices", "digits"), ("text", "digits_text")):
        run = found[kind] = root / kind
        rllava_here("train", str(EXAMPLES / f"{example}.yaml"), *QUICK, "--run-dir", str(run))
        rllava_here("eval", str(run))
        rllava_here("eval", str(run), "--swap-images")
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["choices", "text"])
def test_the_examples_run(runs: dict[str, Path], kind: str) -> None:
    measured = lines(runs[kind] / "metrics.jsonl")

    assert [line["step"] for line in measured] == [0, 1, 2, 3]
    assert all(line["policy/logprob_gap"] < 1e-4 for line in measured[1:])
    # The policy does change.
    assert len({line["policy/entropy"] for line in measured[1:]}) == 3


@pytest.mark.parametrize("kind", ["choices", "text"])
def test_eval_finds_what_the_run_found_last(runs: dict[str, Path], kind: str) -> None:
    last = lines(runs[kind] / "metrics.jsonl")[-1]
    answers = lines(runs[kind] / "eval" / "answers.jsonl")

    assert len(answers) == COUNT == last["eval/episodes"]
    assert sum(line["success"] for line in answers) / COUNT == pytest.approx(last["eval/success_rate"], abs=1e-12)
    assert sum(line["return"] for line in answers) / COUNT == pytest.approx(last["eval/return_mean"], abs=1e-12)
    assert {line["turns"] for line in answers} == {1} == {last["eval/turns_mean"]}
    names = [name.removeprefix("eval/") for name in last if name.startswith("eval/")]
    for name in set(names) - {"success_rate", "return_mean", "turns_mean", "episodes"}:
        assert sum(line[f"reward/{name}"] for line in answers) / COUNT == pytest.approx(last[f"eval/{name}"], abs=1e-12)
    # Otherwise equality would say little.
    assert len({line["answer"] for line in answers}) > 1


@pytest.mark.parametrize("kind", ["choices", "text"])
def test_swapped_images_change_answers(runs: dict[str, Path], kind: str) -> None:
    own = lines(runs[kind] / "eval" / "answers.jsonl")
    swapped = lines(runs[kind] / "eval" / "answers-swapped-images.jsonl")

    assert [line["name"] for line in swapped] == [line["name"] for line in own]
    assert [line["right_answer"] for line in swapped] == [line["right_answer"] for line in own]
    assert [line["answer"] for line in swapped] != [line["answer"] for line in own]
    # The same pictures in another order are answered alike.
    assert sorted(line["answer"] for line in swapped) == sorted(line["answer"] for line in own)


def test_the_checkpoints_answer_the_same_in_plain_transformers(runs: dict[str, Path]) -> None:
    """`AutoModelForImageTextToText` and `AutoProcessor`, in a process that imports nothing of rllava."""
    checkpoints = [str(runs[kind] / "checkpoints" / "step-000003") for kind in ("choices", "text")]
    done = subprocess.run(
        [sys.executable, str(HERE / "plain_answers.py"), *checkpoints, str(COUNT)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout)
    assert plain["rllava"] == []
    for kind in ("choices", "text"):
        ours = [line["answer"] for line in lines(runs[kind] / "eval" / "answers.jsonl")]
        assert plain[kind] == ours
