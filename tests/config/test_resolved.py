"""The resolved config: every default written out, and the same when it is read again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rllava_core.config import TrainingSection, load
from rllava_core.plugins import load_plugins

Resolve = Callable[..., Any]


def test_every_default_is_written_out(resolve: Resolve) -> None:
    written = yaml.safe_load(resolve().run.to_yaml())

    assert list(written) == ["model", "algorithm", "task", "engine", "training"]
    assert written["model"] == {
        "adapter": "toy",
        "path": None,
        "from_scratch": "any",
        "dtype": "float32",
        "attention": "sdpa",
        "trust_remote_code": False,
        "train": {"vision": "full", "connector": "full", "language": "full"},
        "lora": {"rank": 16, "alpha": 32, "dora": False, "targets": None},
        "encoded_bytes": 2**30,
        "quantization": "none",
    }
    assert set(written["training"]) == set(TrainingSection.model_fields)
    assert written["training"]["keep_checkpoints"] == 2
    assert written["algorithm"]["group_size"] == 4
    assert written["algorithm"]["kl_estimator"] == "k3"
    assert written["task"]["dataset"] == {"name": "colours", "count": 24, "images": 1}
    assert written["task"]["environment"] == {"name": "single_turn"}
    assert written["task"]["rewards"] == [{"name": "match", "weight": 1.0, "label": None}]
    assert written["engine"]["train"]["device"] == "auto"
    assert written["engine"]["rollout"] == {"name": "local", "async": 0, "max_sequences": 512}


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("task.choices=", "task.prompt='{question} {{braces}} — ünïcode 漢字 \"quoted\"'"),
        ("task.choices=['yes', 'no', '1', 'null', ' ', '1e5']",),
        ("task.rewards=[{name: broken, label: first, how: nan}, {name: match, weight: -0.5}]",),
        ("task.dataset=", "task.environment=brightness", "training.eval_episodes=3", "task.rewards=[]"),
        ("training.max_grad_norm=.inf", "training.adam_betas=[0, 0.95]", "training.trackers=[tensorboard]"),
        ("algorithm=rllava-toy/toy_critic", "engine.train={name: rllava-core/local, mixed_precision: bf16}"),
    ],
)
def test_the_resolved_config_loads_back_to_the_same(
    resolve: Resolve, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    resolved = resolve(*overrides)
    path = tmp_path / "config.yaml"
    path.write_text(resolved.run.to_yaml(), encoding="utf-8")

    again = load(path, [], load_plugins())

    assert again == resolved
    assert again.run.to_yaml() == resolved.run.to_yaml()


INFINITE = """
from rllava_core import ComponentSpec, hookimpl
from rllava_core.config import Options

class Config(Options):
    limit: float = float("inf")

class Reward:
    pass

@hookimpl
def rllava_rewards():
    return [ComponentSpec(name="limited", target="rllava_limited:Reward", config="rllava_limited:Config")]
"""


def test_an_infinite_option_of_a_component_stays_infinite(
    resolve: Resolve, fake_distribution: Any, tmp_path: Path
) -> None:
    fake_distribution("rllava-limited", "1.0", INFINITE)
    path = tmp_path / "config.yaml"
    path.write_text(resolve("task.rewards=[limited]").run.to_yaml(), encoding="utf-8")

    [reward] = load(path, [], load_plugins()).rewards

    assert reward.config.model_dump() == {"limit": float("inf")}


def test_numbers_among_the_choices_become_text(resolve: Resolve) -> None:
    assert resolve("task.choices=[0, 1, 2.5, ten]").run.task.choices == ("0", "1", "2.5", "ten")


def test_a_reward_is_reported_under_its_label_or_its_bare_name(resolve: Resolve) -> None:
    rewards = resolve("task.rewards=[rllava-toy/match, {name: match, label: again}]").run.task.rewards

    assert [reward.reported_as for reward in rewards] == ["match", "again"]


def test_a_config_cannot_be_changed_after_it_was_resolved(resolve: Resolve) -> None:
    run = resolve().run

    with pytest.raises(ValueError, match="frozen"):
        run.training.steps = 8


def test_resolving_imports_no_component(resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rllava_toy.task", raising=False)

    resolve()

    assert "rllava_toy.task" not in sys.modules


def test_options_of_an_engine_without_a_name_are_the_local_one_s(resolve: Resolve) -> None:
    resolved = resolve("engine.train.device=cpu", "engine.rollout={max_sequences: 7}")
    assert resolved.train_engine.config.device == "cpu"
    assert resolved.rollout_engine.config.max_sequences == 7
    assert resolved.run.engine.train.name == resolved.run.engine.rollout.name == "local"
