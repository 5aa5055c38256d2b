"""From a resolved config to the parts of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rllava_core.config import load
from rllava_core.errors import ConfigError, PluginError, TrainingError
from rllava_core.plugins import load_plugins
from rllava_core.policy.policy import Head
from rllava_core.training.build import Parts, build_parts, device_name
from rllava_core.training.checkpoint import Progress, restore, save
from rllava_core.training.episodes import Limits
from rllava_toy.algorithm import ToyCritic

Build = Callable[..., Parts]


def weights(module: Any) -> dict[str, Tensor]:
    return dict(module.state_dict())


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_the_seed_alone_decides_the_first_weights(build_toy: Build) -> None:
    torch.manual_seed(1)
    one = weights(build_toy("algorithm=toy_critic").policy)
    torch.manual_seed(2)
    two = weights(build_toy("algorithm=toy_critic").policy)
    other = weights(build_toy("algorithm=toy_critic", "training.seed=1").policy)

    assert "heads.value.weight" in one
    assert same(one, two)
    assert not same(one, other)


def test_the_reference_is_what_training_began_with_also_after_a_resume(build_toy: Build, tmp_path: Path) -> None:
    kl = "algorithm.kl_coefficient=0.1"
    parts = build_toy(kl)
    first: Any = parts.trainer
    begun_with = {name: tensor.clone() for name, tensor in weights(first._copies["reference"]).items()}
    assert same(begun_with, weights(parts.policy))
    with torch.no_grad():
        for parameter in parts.policy.parameters():
            parameter += 1
    path = save(tmp_path, parts, Progress(step=1))

    resumed: Any = build_toy(kl, checkpoint=path).trainer

    assert same(begun_with, weights(resumed._copies["reference"]))
    assert same(weights(parts.policy), weights(resumed.policy))


def test_no_reference_is_kept_where_none_is_needed(build_toy: Build, toy_config: Path) -> None:
    plain: Any = build_toy().trainer
    resolved = load(toy_config, ["algorithm.kl_coefficient=0.1"], load_plugins())
    only_evaluated: Any = build_parts(resolved, learning=False).trainer

    assert plain._copies == {}
    assert only_evaluated._copies == {}


def heads(monkeypatch: pytest.MonkeyPatch, **declared: Head) -> None:
    monkeypatch.setattr(ToyCritic, "heads", {"value": Head(1), **declared})


def test_a_head_may_have_an_output_for_each_choice_of_the_first_observation(
    build_toy: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads(monkeypatch, q=Head("choices"), p=Head(5))
    policy = build_toy("algorithm=toy_critic").policy

    assert {name: head.out_features for name, head in policy.heads.items()} == {"value": 1, "q": 3, "p": 5}


def test_a_head_for_each_choice_needs_choices(build_toy: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    heads(monkeypatch, q=Head("choices"))
    with pytest.raises(ConfigError, match=r"^algorithm 'toy_critic' values each of the choices, .*set task\.choices"):
        build_toy("algorithm=toy_critic", "task.choices=")


def test_a_separate_trunk_begins_as_the_policy_and_survives_a_checkpoint(
    build_toy: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert build_toy("algorithm=toy_critic").policy.trunk is None
    heads(monkeypatch, value=Head(1, own_trunk=True))
    parts = build_toy("algorithm=toy_critic")
    trunk = parts.policy.trunk
    assert same(weights(trunk), weights(parts.policy.model))
    with torch.no_grad():
        for parameter in parts.policy.parameters():
            parameter += torch.rand_like(parameter)
    path = save(tmp_path, parts, Progress(step=1))

    resumed = build_toy("algorithm=toy_critic", checkpoint=path)
    restore(path, resumed)

    assert not same(weights(resumed.policy.trunk), weights(resumed.policy.model))
    assert same(weights(resumed.policy), weights(parts.policy))


def test_every_copy_begins_as_the_policy(build_toy: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ToyCritic.__init__

    def declare(self: ToyCritic, config: Any) -> None:
        original(self, config)
        self.copies = ("target", "reference")

    monkeypatch.setattr(ToyCritic, "__init__", declare)
    parts = build_toy("algorithm=toy_critic")
    trainer: Any = parts.trainer

    assert list(trainer._copies) == ["target", "reference"]
    for copy in trainer._copies.values():
        assert same(weights(copy), weights(parts.policy))
    assert len({id(copy) for copy in [parts.policy, *trainer._copies.values()]}) == 3


def test_limits_are_those_of_the_task(build_toy: Build) -> None:
    assert build_toy().task.limits == Limits(64, 200, None, "all")
    changed = ("max_new_tokens=3", "max_turns=5", "max_episode_tokens=99", "history=2")
    assert build_toy(*(f"task.{change}" for change in changed)).task.limits == Limits(3, 5, 99, 2)


def test_rewards_have_their_weights_and_names(build_toy: Build) -> None:
    task = build_toy("task.rewards=[{name: match, weight: 0.25}, {name: broken, label: other}]").task

    assert [(reward.name, reward.weight) for reward in task.rewards] == [("match", 0.25), ("other", 1.0)]
    assert task.primary == "match"
    assert build_toy("task.rewards=[]").task.primary is None


def test_a_damaged_checkpoint_is_named_whatever_its_reader_raises(build_toy: Build, tmp_path: Path) -> None:
    path = save(tmp_path, build_toy(), Progress(step=1))
    (path / "model.safetensors").write_bytes(b"not weights")

    with pytest.raises(TrainingError, match=r"^checkpoint .*step-000001 cannot be loaded \(.*\); remove it to go on"):
        build_toy(checkpoint=path)


def test_a_mistake_of_an_adapter_is_not_disguised(build_toy: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from rllava_core.testing.tiny import TinyAdapter

    monkeypatch.setattr(TinyAdapter, "load", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_toy()


STUBBORN = """
from rllava_core import ComponentSpec, hookimpl
from rllava_core.config import Options

class Config(Options):
    from_scratch: str

@hookimpl
def rllava_models():
    target = "rllava_core.testing.tiny:TinyAdapter"
    return [ComponentSpec(name="stubborn", target=target, config="rllava_stubborn:Config")]
"""


def test_an_adapter_whose_config_has_no_path_cannot_resume(
    build_toy: Build, fake_distribution: Any, tmp_path: Path
) -> None:
    fake_distribution("rllava-stubborn", "1.0", STUBBORN)

    with pytest.raises(PluginError, match=r"rllava-stubborn/stubborn.*is no rllava_core\.policy\.config\.ModelConfig"):
        build_toy("model={adapter: stubborn, from_scratch: any}", checkpoint=tmp_path)


def test_the_device_is_named(build_toy: Build) -> None:
    assert device_name(build_toy("engine={train: {name: local, device: cpu}}").policy) == "cpu"
