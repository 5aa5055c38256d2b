"""`section.key=value` on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Resolve = Callable[..., Any]
Refusal = Callable[..., str]


def test_an_override_sets_a_key_and_wins_over_the_file(resolve: Resolve) -> None:
    run = resolve("training.steps=9", "training.seed=3", "training.steps=11").run

    assert (run.training.steps, run.training.seed, run.training.prompts_per_step) == (11, 3, 4)


def test_values_are_yaml(resolve: Resolve) -> None:
    resolved = resolve("task.choices=[a, 2, 0.5]", "training.max_grad_norm=null", "algorithm={name: toy_critic}")

    assert resolved.run.task.choices == ("a", "2", "0.5")
    assert resolved.run.training.max_grad_norm is None
    assert resolved.algorithm.component.spec.name == "toy_critic"
    # A value replaces what was there: the file's group size went with it.
    assert resolved.algorithm.config.group_size == 8


def test_only_the_first_sign_of_equality_separates(resolve: Resolve) -> None:
    assert resolve("task.prompt=1+1={question}").run.task.prompt == "1+1={question}"


@pytest.mark.parametrize("text", ["", "engine: {rollout: local}\n"])
def test_a_component_can_be_named_barely(resolve: Resolve, text: str) -> None:
    resolved = resolve("engine.rollout=local", "task.environment=single_turn", replace=("task:", f"{text}task:"))

    assert resolved.rollout_engine.component.spec.name == "local"


def test_a_component_written_as_a_bare_name_gains_options(resolve: Resolve) -> None:
    resolved = resolve("engine.rollout.max_sequences=7", replace=("task:", "engine: {rollout: local}\ntask:"))

    assert resolved.rollout_engine.config.max_sequences == 7


def test_an_override_reaches_through_a_list(resolve: Resolve) -> None:
    resolved = resolve("task.rewards.0.weight=0.25", "task.choices.2=yellow")

    assert resolved.run.task.rewards[0].weight == 0.25
    assert resolved.run.task.choices == ("red", "green", "yellow")


def test_merge_keys_of_yaml_work(resolve: Resolve) -> None:
    resolved = resolve(replace=("{name: match}", "{<<: {name: match, weight: 3}, weight: 2}"))

    assert [(reward.name, reward.weight) for reward in resolved.run.task.rewards] == [("match", 2.0)]


REFUSED = {
    "training.stepz=5": "training.stepz: unknown key; did you mean 'steps'?",
    "trainin.steps=5": "trainin: unknown key; did you mean 'training'?",
    "algorithm.grop_size=5": "algorithm.grop_size: unknown key of algorithm 'toy_gradient'; did you mean 'group_size'?",
    "task.rewards.0.wieght=1": "task.rewards.0.wieght: unknown key of reward 'match'; did you mean 'weight'?",
    "engine.rolout=local": "engine.rolout: unknown key; did you mean 'rollout'?",
    "training.steps=many": "training.steps: Input should be a valid integer",
    "algorithm.group_size=0": "algorithm.group_size: Input should be greater than or equal to 1 (got 0)",
    "algorithm=grpo2": "algorithm.name: no algorithm 'grpo2' is installed",
    "training=5": "training: expected keys and values, found 5",
    "training=": "training: expected keys and values, found nothing",
    "task.prompt.x=1": "task.prompt: expected text, found keys and values",
    "task.prompt={question}": "task.prompt: expected text, found keys and values; put text that begins with a brace in",
    "engine.train.devise=cpu": "engine.train.devise: unknown key of engine 'local'; did you mean 'device'?",
    "task.environment.seed=1": "task.environment.name: required key is missing",
    "training.steps.x=1": "training.steps is 7, which has no keys",
    "task.rewards.1.weight=1": "task.rewards is a list of 1; '1' is no index of it",
    "task.rewards.-1.weight=1": "task.rewards is a list of 1; '-1' is no index of it",
    "task.rewards.first.weight=1": "task.rewards is a list of 1; 'first' is no index of it",
    "steps": "expected section.key=value, such as training.steps=100",
    "": "expected section.key=value, such as training.steps=100",
    "=5": "expected section.key=value, such as training.steps=100",
    "training..steps=5": "expected section.key=value, such as training.steps=100",
    ".training.steps=5": "expected section.key=value, such as training.steps=100",
    "training.steps=[": "the value is not valid YAML: line 1, column 2: expected the node content",
    "model={adapter: toy, adapter: toy}": "the value is not valid YAML: line 1, column 16: key 'adapter' is written",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_wrong_override_is_quoted_with_what_is_wrong(refusal: Refusal, override: str) -> None:
    message = refusal(override)

    assert message.startswith(f"override {override!r}: {REFUSED[override]}")
    assert "FILE" not in message


def test_a_mistake_of_the_file_is_not_blamed_on_an_override(refusal: Refusal) -> None:
    message = refusal("training.seed=3", replace=("steps: 7", "stepz: 7"))

    assert "FILE: training.stepz: unknown key" in message
    assert "FILE: training.steps: required key is missing" in message
    assert "override" not in message


def test_a_contradiction_between_file_and_override_names_both(refusal: Refusal) -> None:
    message = refusal("model.path=weights")

    assert message.startswith("FILE with override 'model.path=weights': model: set either `path`")
