"""The commands with a hosted model: the same task, rewards and report; and what a user sees of what went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from rllava_core.testing.samples import picture

FakeEndpoint = Any  # of conftest.py
Run = Callable[..., Result]

TASK = """\
model: {{adapter: hosted}}
algorithm: {{name: grpo}}
task:
  dataset: {{name: jsonl, path: questions.jsonl, held_out_fraction: 0.5}}
  prompt: "{{question}}"
  {choices}
  rewards: [{{name: exact_match}}]
engine: {{rollout: {{name: openai, base_url: "{url}", model: some-model}}}}
training: {{steps: 1, prompts_per_step: 2}}
"""


@pytest.fixture
def config(server: FakeEndpoint, tmp_path: Path) -> Path:
    """Held-out questions of which a model that repeats the last word answers all."""
    return written(server, tmp_path, "")


@pytest.fixture
def choosing(server: FakeEndpoint, tmp_path: Path) -> Path:
    return written(server, tmp_path, "choices: [zero, one, two]")


def written(server: FakeEndpoint, folder: Path, choices: str) -> Path:
    words = ("zero", "one", "two")
    lines = []
    for number in range(30):
        picture(number).to_pil().save(folder / f"{number}.png")
        word = words[number % 3]
        lines.append({"image": f"{number}.png", "question": f"Say {number} {word}", "answer": word})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    path = folder / "hosted.yaml"
    path.write_text(TASK.format(url=server.base_url, choices=choices), encoding="utf-8")
    server.answer = last_word
    return path


def last_word(body: Any) -> str:
    word = str(body["messages"][-1]["content"][-1]["text"].split()[-1])
    return json.dumps({"choice": word}) if "response_format" in body else word


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shown(result: Result) -> dict[str, float]:
    rows = [line.strip("│").split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    return {row[0].strip(): float(row[1]) for row in rows}


@pytest.mark.parametrize("kind", ["config", "choosing"])
def test_a_hosted_model_is_evaluated_like_any(
    run_rllava: Run, server: FakeEndpoint, kind: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind)
    prices = ["engine.rollout.price_per_million_input=1", "engine.rollout.price_per_million_output=10"]
    result = run_rllava("eval", str(path), *prices, "--output", "answers.jsonl")

    assert result.exit_code == 0, result.output
    found = shown(result)
    assert (found["success rate"], found["reward exact_match"]) == (1.0, 1.0)
    assert found["engine calls"] == len(server.requests) == len(answers(Path("answers.jsonl"))) == 15
    assert found["engine cost"] == pytest.approx(15 * (100 * 1 + 10 * 10) / 1e6)
    assert "share of turns not understood" not in found
    again = shown(run_rllava("eval", str(path), "--output", "again.jsonl"))
    assert (again["engine calls"], again["engine cache hits"]) == (0, 15)
    assert answers(Path("again.jsonl")) == answers(Path("answers.jsonl"))


def test_answers_that_are_no_choice_are_counted_and_never_guessed_at(
    run_rllava: Run, server: FakeEndpoint, choosing: Path
) -> None:
    server.answer = lambda body: "zero"  # which would be right for some, but is not what was asked for
    result = run_rllava("eval", str(choosing), "--output", "answers.jsonl")

    assert result.exit_code == 0, result.output
    assert shown(result)["success rate"] == 0.0
    assert shown(result)["share of turns not understood"] == 1.0
    assert {(line["answer"], line["truncation"]) for line in answers(Path("answers.jsonl"))} == {("zero", "unparsable")}


def test_chance_can_be_measured(run_rllava: Run, server: FakeEndpoint, choosing: Path) -> None:
    result = run_rllava("eval", str(choosing), "--random")
    assert result.exit_code == 0, result.output
    assert not server.requests


def test_an_evaluation_goes_on_where_a_dead_server_stopped_it(
    run_rllava: Run, server: FakeEndpoint, make_server: Any, config: Path
) -> None:
    count = 0

    def dies(body: Any) -> Any:
        nonlocal count
        count += 1
        return {"close": True} if count > 6 else last_word(body)

    server.answer = dies
    options = ["engine.rollout.retries=1", "engine.rollout.concurrency=1"]
    result = run_rllava("eval", str(config), *options, "--output", "answers.jsonl")
    assert result.exit_code == 1
    assert result.stderr.count("error: ") == 1
    assert "gave no answer: the connection was lost" in result.stderr
    assert "questions.jsonl:" in result.stderr
    assert "give the same command again" in result.stderr
    assert not Path("answers.jsonl").exists()

    other = make_server()
    other.answer = last_word
    again = run_rllava("eval", str(config), f"engine.rollout.base_url={other.base_url}", "--output", "answers.jsonl")
    assert shown(again)["success rate"] == 1.0
    assert len(other.requests) == 15 - 6


def test_it_is_not_for_training(run_rllava: Run, server: FakeEndpoint, config: Path) -> None:
    result = run_rllava("train", str(config), "model={adapter: qwen2vl, path: nowhere}", "--run-dir", "run")

    assert result.exit_code == 2
    assert "engine 'openai' answers by a model of its own, so nothing that is trained here would ever act" in (
        result.stderr
    )
    assert not server.requests
    assert not Path("run").exists()


BAD = {
    "missing key": (["engine.rollout.api_key_env=NO_SUCH_KEY"], 2, "the environment variable NO_SUCH_KEY is not set"),
    "unknown option": (["engine.rollout.modle=x"], 2, "did you mean 'model'?"),
    "unreachable": (["engine.rollout.base_url=http://127.0.0.1:9/v1"], 2, "http://127.0.0.1:9/v1 cannot be reached"),
    "no address": (["engine.rollout.base_url=127.0.0.1"], 2, "must be a whole address"),
    "no way": (["engine.rollout.choices_by=luck"], 2, "choices_by"),
    "one price": (["engine.rollout.price_per_million_input=1"], 2, "set both of"),
    "reserved": (["engine.rollout.extra_body={stream: true}"], 2, "may not set stream"),
}


@pytest.mark.parametrize(("options", "code", "message"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_message(run_rllava: Run, config: Path, options: list[str], code: int, message: str) -> None:
    result = run_rllava("eval", str(config), *options)

    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output


SECRETS = {
    "the key itself": "engine.rollout.api_key_env=sk-live-0123456789",
    "a key without hyphens": "engine.rollout.api_key_env=gsklive0123456789",
    "an option that is none": "engine.rollout.api_key=sk-live-0123456789",
    "a password": "engine.rollout.base_url=http://user:sk-live-0123456789@127.0.0.1:9/v1",
    "a query": "engine.rollout.base_url=http://127.0.0.1:9/v1?key=sk-live-0123456789",
}


@pytest.mark.parametrize("override", SECRETS.values(), ids=SECRETS.keys())
def test_a_secret_in_a_config_is_refused_and_not_repeated(run_rllava: Run, config: Path, override: str) -> None:
    path, _, value = override.removeprefix("engine.rollout.").partition("=")
    text = config.read_text(encoding="utf-8")
    if path == "base_url":
        text = text.replace(text[text.index("http:") : text.index('", model')], value)
    else:
        text = text.replace("model: some-model", f"model: some-model, {path}: {value}")
    config.write_text(text, encoding="utf-8")
    result = run_rllava("eval", str(config))

    assert result.exit_code == 2
    assert "0123456789" not in result.output


def test_a_run_with_a_judge_reports_what_it_spent_and_holds_no_key(
    run_rllava: Run, server: FakeEndpoint, config: Path, secret: str
) -> None:
    def judges(body: Any) -> str:
        return json.dumps({"reason": "It is.", "score": len(str(body["messages"])) % 11})

    server.answer = judges
    server.faults = [{"status": 429, "body": f"slow down, {secret}"}]
    reward = f"{{name: judge, base_url: '{server.base_url}', model: judge-model, api_key_env: TEST_API_KEY}}"
    result = run_rllava(
        "train",
        str(config),
        "model={adapter: qwen2vl, from_scratch: tiny}",
        "algorithm.group_size=2",
        "engine.rollout=local",
        f"task.rewards=[{reward[:-1]}, price_per_million_input: 1, price_per_million_output: 1}}]",
        "task.max_new_tokens=3",
        "training.eval_episodes=2",
        "training.unseen_images=ignore",
        "--run-dir",
        "run",
    )

    assert result.exit_code == 0, result.output
    first, second = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert first["eval/reward/judge/calls"] >= 2
    assert first["eval/reward/judge/cost"] > 0
    assert {f"reward/judge/{key}" for key in ("calls", "cache_hits", "input_tokens", "cost", "failures")} <= set(second)
    assert 0 <= second["reward/judge"] <= 1
    assert len(server.images()) == len(server.requests)
    assert set(server.keys) == {f"Bearer {secret}"}
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert "TEST_API_KEY" in Path("run/config.yaml").read_text(encoding="utf-8")
    assert secret not in result.output
