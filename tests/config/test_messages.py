"""What a user reads who made a mistake in a config: the file or override, the key, the value, what would be right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rllava_core.config import load
from rllava_core.errors import ConfigError, PluginError
from rllava_core.plugins import load_plugins

Refusal = Callable[..., str]

UNKNOWN = {
    "a section": ("training:", "trainnig:", "trainnig", "", "'training'"),
    "a key of a section": ("{steps: 7", "{stepz: 7", "training.stepz", "", "'steps'"),
    "a nested section": ("  rewards:", "  reward:", "task.reward", "", "'rewards'"),
    "an option of the algorithm": (
        "group_size",
        "grop_size",
        "algorithm.grop_size",
        " of algorithm 'toy_gradient'",
        "'group_size'",
    ),
    "an option of the model": ("from_scratch", "from_scrach", "model.from_scrach", " of model 'toy'", "'from_scratch'"),
    "an option of the data set": ("count", "cuont", "task.dataset.cuont", " of dataset 'colours'", "'count'"),
    "the weight of a reward": (
        "{name: match}",
        "{name: match, wieght: 2}",
        "task.rewards.0.wieght",
        " of reward 'match'",
        "'weight'",
    ),
    "an option of an engine": (
        "training:",
        "engine: {rollout: {name: local, max_sequence: 3}}\ntraining:",
        "engine.rollout.max_sequence",
        " of engine 'local'",
        "'max_sequences'",
    ),
    "an option of an environment": (
        "task:",
        "task:\n  environment: {name: single_turn, nmae: 1}",
        "task.environment.nmae",
        " of environment 'single_turn'",
        "'name'",
    ),
}


@pytest.mark.parametrize("where", UNKNOWN)
def test_an_unknown_key_is_named_with_its_file_and_the_likely_one(refusal: Refusal, where: str) -> None:
    old, new, key, owner, meant = UNKNOWN[where]

    message = refusal(replace=(old, new))

    assert f"FILE: {key}: unknown key{owner}; did you mean {meant}? (known: " in message


def test_an_unknown_key_like_no_other_lists_what_is_known(refusal: Refusal) -> None:
    message = refusal(replace=("count: 24", "zzz: 24"))

    assert message == "FILE: task.dataset.zzz: unknown key of dataset 'colours' (known: count, images, name)"


def test_every_problem_of_a_section_is_reported_at_once(refusal: Refusal) -> None:
    lines = refusal(replace=("steps: 7", "stepz: 7, seed: -1")).splitlines()

    assert len(lines) == 3
    assert "FILE: training.steps: required key is missing" in lines
    assert "FILE: training.seed: Input should be greater than or equal to 0 (got -1)" in lines


WRONG = {
    "steps: 7": ("steps: many", "training.steps: Input should be a valid integer", "(got 'many')"),
    "prompts_per_step: 4": ("prompts_per_step: 0", "training.prompts_per_step: Input should be greater", "(got 0)"),
    "learning_rate: 3.0e-3": ("learning_rate: .nan", "training.learning_rate: Input should be a finite", "(got nan)"),
    "temperature: 4.0": ("temperature: .inf", "training.temperature: Input should be a finite number", "(got inf)"),
    "eval_every: 3": ("adam_betas: [0.9, 1.5]", "training.adam_betas.1: Input should be less than 1", "(got 1.5)"),
    "save_every: 2": ("schedule: cosin", "training.schedule: Input should be 'constant'", "(got 'cosin')"),
    "group_size: 4": ("group_size: four", "algorithm.group_size: Input should be a valid integer", "(got 'four')"),
    "count: 24": ("count: []", "task.dataset.count: Input should be a valid integer", "(got [])"),
    "{name: match}": ("{name: match, weight: .nan}", "task.rewards.0.weight: Input should be a finite", "(got nan)"),
    "rewards: [{name: match}]": ("rewards: match", "task.rewards: expected a list", "found 'match'"),
    "choices: [red, green, blue]": ("choices: red", "task.choices: expected a list", "found 'red'"),
    "{name: colours, count: 24}": ("[colours]", "task.dataset: expected keys and values", "found a list"),
    "[red, green, blue]": ("[red]", "task.choices: needs at least two different", "(got ['red'])"),
    "[red, green, ": ("[red, red, ", "task.choices: needs at least two different", "(got ['red', 'red', 'blue'])"),
    "algorithm: {name: toy_gradient, group_size: 4}": (
        "algorithm: 5",
        "algorithm: expected keys and values",
        "found 5",
    ),
    "model: {adapter: toy, from_scratch: any}": ("model:", "model: expected keys and values", "found nothing"),
}


@pytest.mark.parametrize("old", WRONG)
def test_a_wrong_value_is_named_with_its_key_and_what_is_expected(refusal: Refusal, old: str) -> None:
    new, expected, found = WRONG[old]

    message = refusal(replace=(old, new))

    assert f"FILE: {expected}" in message
    assert found in message


def test_a_component_may_refuse_options_that_do_not_go_together(refusal: Refusal) -> None:
    message = refusal(replace=("from_scratch: any", "from_scratch: any, path: x"))

    assert message == "FILE: model: set either `path` (a directory or hub id) or `from_scratch` (a preset)"


def test_a_long_value_is_shortened(refusal: Refusal) -> None:
    message = refusal("task.choices=[" + "x, " * 1000 + "x]")

    assert message.endswith("…)")
    assert len(message.partition(": task.choices: ")[2]) < 200


@pytest.mark.parametrize("word", ["yes", "off", "true"])
def test_choices_that_yaml_reads_as_switches_must_be_quoted(refusal: Refusal, word: str) -> None:
    message = refusal(replace=("[red, green, blue]", f"[{word}, maybe]"))

    assert "FILE: task.choices: YAML reads yes, no, on, off, true and false as " in message
    assert "put the answers in quotes" in message


def test_rewards_of_one_name_must_be_told_apart(refusal: Refusal, resolve: Callable[..., Any]) -> None:
    message = refusal("task.rewards=[match, {name: rllava-toy/match, weight: 2}]")
    assert "task.rewards: match is listed twice; tell them apart with `label`" in message

    labelled = resolve("task.rewards=[match, {name: rllava-toy/match, label: again}]")
    assert [reward.reported_as for reward in labelled.run.task.rewards] == ["match", "again"]


def test_a_component_that_is_not_installed_is_named_with_its_key_and_how_to_get_it(refusal: Refusal) -> None:
    message = refusal(replace=("name: toy_gradient", "name: ppo2"))

    assert message.startswith("FILE: algorithm.name: no algorithm 'ppo2' is installed (installed: ")
    assert "toy_critic, toy_discrete, toy_gradient, toy_imitation)" in message
    assert message.endswith("Try: pip install rllava-ppo2")


@pytest.mark.parametrize(
    ("replace", "start"),
    [
        (("adapter: toy", "adapter: tay"), "FILE: model.adapter: no model 'tay'"),
        (("name: match", "name: mach"), "FILE: task.rewards.0.name: no reward 'mach'"),
        (("name: colours", "name: colors"), "FILE: task.dataset.name: no dataset 'colors'"),
        (("task:", "task:\n  environment: single"), "FILE: task.environment.name: no environment 'single'"),
        (("task:", "engine: {train: remote}\ntask:"), "FILE: engine.train.name: no train engine 'remote'"),
    ],
)
def test_a_missing_component_of_any_kind_is_named_with_its_key(
    refusal: Refusal, replace: tuple[str, str], start: str
) -> None:
    assert refusal(replace=replace).startswith(start)


def test_a_broken_plugin_that_was_asked_for_is_named_with_its_cause(refusal: Refusal, fake_distribution: Any) -> None:
    fake_distribution("rllava-ppo2", "0.3", "raise ZeroDivisionError('at import')")

    message = refusal("algorithm=ppo2")

    assert message.startswith("override 'algorithm=ppo2': algorithm.name: algorithm 'ppo2' cannot be used: ")
    assert "ZeroDivisionError: at import" in message


DISCRETE = ("name: toy_gradient", "name: toy_discrete")


def test_what_a_component_needs_and_nothing_provides_is_named_before_anything_is_loaded(
    refusal: Refusal, resolve: Callable[..., Any]
) -> None:
    message = refusal("task.choices=", replace=DISCRETE)
    assert message == (
        "FILE: algorithm 'toy_discrete' needs choices, which none of the chosen parts provides (model 'toy', "
        "engine 'local', engine 'local', environment 'single_turn', dataset 'colours')"
    )

    assert resolve("task.environment=brightness", "task.dataset=").algorithm.component.spec.name == "toy_discrete"


NEEDY = """
from rllava_core import ComponentSpec, hookimpl

@hookimpl
def rllava_environments():
    return [ComponentSpec(name="needy", target="a.b:C", needs={"dataset", "gloves"})]
"""


def test_an_environment_without_its_data_set_is_told_that_none_is_set(refusal: Refusal, fake_distribution: Any) -> None:
    fake_distribution("rllava-needy", "1.0", NEEDY)

    with_data = refusal("task.environment=needy")
    without = refusal("task.environment=needy", "task.dataset=")

    assert "environment 'needy' needs gloves, which" in with_data
    assert "no task.dataset" not in with_data
    assert "environment 'needy' needs dataset, gloves, which" in without
    assert without.endswith("environment 'needy', no task.dataset)")


FILES = {
    "": "expected sections (model, algorithm, task, training), found nothing",
    "# only a comment": "expected sections (model, algorithm, task, training), found nothing",
    "- a\n- b": "expected sections (model, algorithm, task, training), found a list",
    "just text": "expected sections (model, algorithm, task, training), found 'just text'",
    "model: [1, 2\ntask: x": "not valid YAML: line 2, column 5: expected ',' or ']', but got ':'",
    "model: {a: 1}\nmodel: {a: 2}": "not valid YAML: line 2, column 1: key 'model' is written twice",
    "task:\n  prompt: a\n  choices: b\n  prompt: c": "not valid YAML: line 4, column 3: key 'prompt' is written twice",
    "model:\n\t- x": "not valid YAML: line 2, column 1: found character '\\t' that cannot start any token",
    "a: 1\n---\nb: 2": "not valid YAML: line 2, column 1: but found another document",
    "a: !!python/object:os.system {}": "not valid YAML: line 1, column 4: could not determine a constructor",
    "a: \x00": "not valid YAML: unacceptable character #x0000",
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_holds_no_config_says_where_and_why(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError) as caught:
        load(path, [], load_plugins())

    assert str(caught.value).startswith(f"{path}: {FILES[text]}")
    assert "\n" not in str(caught.value)


def test_keys_that_are_no_text_are_refused(refusal: Refusal) -> None:
    assert "Keys should be strings (got True)" in refusal(replace=("task:", "on: 1\ntask:"))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "cannot be read ("),
        (lambda path: path.write_bytes(b"model: \xff"), "cannot be read ("),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], Any], problem: str) -> None:
    path = tmp_path / "config.yaml"
    make(path)

    with pytest.raises(ConfigError) as caught:
        load(path, [], load_plugins())

    assert str(caught.value).startswith(f"{path}: {problem}")


def test_an_error_of_a_component_is_the_plugin_errors_own_kind(resolve: Callable[..., Any]) -> None:
    """So that `--debug` shows a broken plugin's traceback."""
    with pytest.raises(PluginError) as caught:
        resolve("algorithm=nothing")

    assert isinstance(caught.value.__cause__, PluginError)


def test_everything_that_is_missing_is_named_at_once(refusal: Refusal) -> None:
    message = refusal("algorithm.name=nowhere", "model.adapter=elsewhere", "task.rewards.0.name=nothing")

    lines = message.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "override 'model.adapter=elsewhere'",
        "override 'algorithm.name=nowhere'",
        "override 'task.rewards.0.name=nothing'",
    ]
    assert "no algorithm 'nowhere' is installed (installed: " in lines[1]
    assert "toy_critic" in lines[1]
    assert lines[1].endswith("Try: pip install rllava-nowhere")


def test_a_capability_that_is_misspelt_in_a_plugin_is_recognised(fake_distribution: Any, toy_config: Path) -> None:
    source = (
        "from rllava_core import ComponentSpec, hookimpl\n@hookimpl\ndef rllava_algorithms():\n"
        "    return [ComponentSpec(name='odd', target='rllava_toy.algorithm:ToyGradient',\n"
        "                          config='rllava_toy.config:ToyGradientConfig', needs={'logprob'})]\n"
    )
    fake_distribution("rllava-odd", "1.0", source)

    with pytest.raises(ConfigError, match=r"needs logprob, which none .*; did you mean 'logprobs'\?"):
        load(toy_config, ["algorithm.name=odd"], load_plugins())


def test_a_value_that_the_shell_has_split_is_recognised(toy_config: Path) -> None:
    with pytest.raises(ConfigError, match="if it holds spaces, put the whole override in quotes"):
        load(toy_config, ["task.rewards=[{name:"], load_plugins())
