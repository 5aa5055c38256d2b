"""From a resolved config to the parts of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rllava_core.config import load
from rllava_core.errors import PluginError, TrainingError
from rllava_core.plugins import load_plugins
from rllava_core.training.build import Parts, build_parts, device_name
from rllava_core.training.checkpoint import Progress, save

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
    begun_with = {name: tensor.clone() for name, tensor in weights(first._reference).items()}
    assert same(begun_with, weights(parts.policy))
    with torch.no_grad():
        for parameter in parts.policy.parameters():
            parameter += 1
    path = save(tmp_path, parts, Progress(step=1))

    resumed: Any = build_toy(kl, checkpoint=path).trainer

    assert same(begun_with, weights(resumed._reference))
    assert same(weights(parts.policy), weights(resumed.policy))


def test_no_reference_is_kept_where_none_is_needed(build_toy: Build, toy_config: Path) -> None:
    plain: Any = build_toy().trainer
    resolved = load(toy_config, ["algorithm.kl_coefficient=0.1"], load_plugins())
    only_evaluated: Any = build_parts(resolved, learning=False).trainer

    assert plain._reference is None
    assert only_evaluated._reference is None


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
