"""`rllava parity`: equal where all is well, and what is wrong is said where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from rllava_core.cli import rllava
from rllava_core.policy.transformers_adapter import TransformersAdapter

EXAMPLES = Path(__file__).parents[2] / "examples"


def parity(*arguments: object) -> Result:
    return CliRunner().invoke(rllava, ["parity", *map(str, arguments)])


def words(result: Result) -> str:
    return " ".join(result.output.split())


def test_log_probs_are_those_of_the_plain_forward(tmp_path: Path) -> None:
    """On examples of the task, and on conversations with none, one and several pictures of several sizes."""
    result = parity(EXAMPLES / "digits.yaml", "--output", tmp_path / "tokens.jsonl")

    assert result.exit_code == 0, result.output
    assert "Equal, to 0.0001 nats" in result.output
    assert "8 of 8 prompts are what the family's processor makes of them" in words(result)
    assert "8 of 8 greedy answers are those of `generate`" in words(result)
    lines = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["episode"] for line in lines} >= {f"pictures {number}" for number in range(4)}
    assert {line["turn"] for line in lines} == {1, 2}
    for line in lines:
        values = [line[name] for name in ("sampled", "recomputed", "plain")]
        assert max(values) - min(values) <= 1e-4
        assert values[0] < 0


def test_several_turns_choices_and_free_text() -> None:
    pytest.importorskip("rllava_gymnasium", reason="rllava-gymnasium is not installed")
    for example, options in (("frozenlake_dqn", ["algorithm={name: grpo}", "task.history=all", "task.max_turns=4"]),):
        result = parity(EXAMPLES / f"{example}.yaml", *options, "--examples", 2)
        assert result.exit_code == 0, result.output
    result = parity(EXAMPLES / "digits_text.yaml", "--examples", 2, "training.temperature=0.7")
    assert result.exit_code == 0, result.output


def test_wrong_positions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling and training agree with each other, and not with the model."""
    from rllava_qwen2vl.adapter import Qwen2VL

    def counted(self: Any, tokens: Any, features: Any, start: int) -> torch.Tensor:
        return torch.arange(start, start + len(tokens)).expand(3, -1)

    monkeypatch.setattr(Qwen2VL, "positions", counted)

    result = parity(EXAMPLES / "digits.yaml")

    assert result.exit_code == 1
    assert "Differs: log-probs differ by" in words(result)
    assert "allowed are 0.0001" in words(result)
    assert "8 of 8 prompts are what" in words(result)


def test_numbers_that_are_none_are_not_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    from rllava_core.training import parity as module

    own = module._sequence

    def broken(*arguments: Any) -> torch.Tensor:
        return own(*arguments) * torch.nan

    monkeypatch.setattr(module, "_sequence", broken)

    result = parity(EXAMPLES / "digits.yaml", "--examples", 1)

    assert result.exit_code == 1
    assert "log-probs differ by inf nats" in words(result)


def test_half_precision_is_given_more_room() -> None:
    """In a process of its own: accelerate's precision is one for a whole process."""
    options = ["--examples", "1", "engine.train={name: local, mixed_precision: bf16}"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from rllava_core.cli import main; main()",
            "parity",
            EXAMPLES / "digits.yaml",
            *options,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )

    assert "5 of 5 prompts" in done.stdout, done.stdout + done.stderr
    assert "log-probs differ" not in done.stdout


def test_answers_of_a_group_stand_in_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the masks of trees would not be compared."""
    from rllava_core.policy.batch import BatchBuilder

    build, seen = BatchBuilder.build, []

    def remembered(self: Any) -> Any:
        batch = build(self)
        seen.append(batch.tree_sees is not None)
        return batch

    monkeypatch.setattr(BatchBuilder, "build", remembered)

    result = parity(EXAMPLES / "digits.yaml", "task.history=1", "task.max_new_tokens=4")

    assert result.exit_code == 0, result.output
    assert any(seen)


def test_another_prompt_than_the_processors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TransformersAdapter._template

    def longer(self: Any, conversation: Any) -> str:
        return own(self, conversation) + " "

    rendered = TransformersAdapter.render

    def render(self: Any, *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(TransformersAdapter, "_template", longer)
            return rendered(self, *arguments, **options)

    monkeypatch.setattr(TransformersAdapter, "render", render)

    result = parity(EXAMPLES / "digits.yaml", "task.history=1")

    assert result.exit_code == 1
    assert "is not what the family's processor makes of it" in words(result)


def test_an_adapter_without_a_processor_of_the_familys_own(toy_config: Path) -> None:
    result = parity(toy_config)

    assert result.exit_code == 0, result.output
    assert "recomputed, plain │ not known" in words(result)
    assert "Not known: how many" in words(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["missing.yaml"], "missing.yaml"), ([EXAMPLES / "digits.yaml", "model.adapter=qwen"], "Did you mean 'qwen2vl'?")],
)
def test_bad_input_is_one_message(arguments: list[Any], message: str) -> None:
    result = parity(*arguments)

    assert result.exit_code == 2, result.output
    assert message in words(result)
    assert "Traceback" not in result.output
