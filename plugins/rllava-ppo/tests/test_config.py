"""Options of PPO and what the plugin declares."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rllava_core.plugins import load_plugins
from rllava_ppo.config import PPOConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gae": "sequence"}, "gae"),
        ({"critic": "own"}, "critic"),
        ({"turn_gamma": 0.9}, "turn_gamma is not read with `gae: token`: leave it out, or set gae to turn or both"),
        ({"turn_lam": 0.9}, "turn_lam is not read with `gae: token`"),
        ({"gae": "turn", "gamma": 0.9}, "gamma is not read with `gae: turn`: leave it out, or set gae to token or"),
        ({"gae": "turn", "lam": 0.9}, "lam is not read with `gae: turn`"),
        ({"gamma": 1.1}, "gamma"),
        ({"lam": -0.1}, "lam"),
        ({"gae": "turn", "turn_gamma": 2}, "turn_gamma"),
        ({"gae": "turn", "turn_lam": 2}, "turn_lam"),
        ({"clip_low": 1.1}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"value_clip": 0}, "value_clip"),
        ({"value_coefficient": 0}, "value_coefficient"),
        ({"target_kl": 0}, "target_kl"),
        ({"target_kl": 0.02, "epochs": 1, "minibatches": 1}, "target_kl leaves minibatches out, and there is one"),
        ({"kl_target": 0.1}, "kl_target adapts kl_coefficient by factors, so kl_coefficient must begin above 0"),
        ({"kl_target": 0, "kl_coefficient": 0.1}, "kl_target"),
        ({"kl_horizon": 20, "kl_coefficient": 0.1}, "kl_horizon goes with kl_target"),
        ({"kl_horizon": 0, "kl_target": 0.1, "kl_coefficient": 0.1}, "kl_horizon"),
        ({"aggregation": "constant"}, "aggregation_length goes with `aggregation: constant`"),
        ({"kl_coefficient": 0.1, "kl_estimator": "k1"}, "use k2 or k3, or kl_in: reward"),
        ({"group_size": 0}, "group_size"),
        ({"clip": 0.2}, "clip"),
    ],
)
def test_a_mistake_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PPOConfig(**options)


@pytest.mark.parametrize("gae", ["token", "turn", "both"])
def test_a_config_with_every_default_written_out_can_be_read_again(gae: Any) -> None:
    config = PPOConfig(gae=gae, kl_coefficient=0.1, kl_target=0.1 if gae == "turn" else None)
    assert PPOConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize("steps", [{"epochs": 2, "minibatches": 1}, {"epochs": 1, "minibatches": 2}])
def test_several_steps_of_either_kind_can_be_cut_short(steps: dict[str, int]) -> None:
    assert PPOConfig(target_kl=0.02, **steps).target_kl == 0.02


def test_the_defaults_are_those_of_an_actor_critic() -> None:
    config = PPOConfig()
    assert (config.group_size, config.epochs, config.minibatches, config.aggregation) == (1, 4, 4, "token")
    assert (config.clip_low, config.clip_high, config.dual_clip, config.value_clip) == (0.2, 0.2, None, None)
    assert (config.gae, config.gamma, config.lam, config.critic, config.whiten) == ("token", 1.0, 0.95, "shared", True)


def test_the_plugin_provides_the_algorithm_ppo() -> None:
    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.name == "ppo"]
    assert plugin.status == "ok", plugin.error
    [component] = plugin.components
    assert (component.kind, component.qualified_name) == ("algorithm", "rllava-ppo/ppo")
    assert component.spec.needs == {"train", "rollout", "heads"}
    assert component.load_config() is PPOConfig
    assert component.load_target().__name__ == "PPO"


def test_listing_the_plugin_and_reading_its_options_imports_no_torch() -> None:
    script = (
        "import sys, rllava_ppo.plugin, rllava_ppo.config\n"
        "rllava_ppo.plugin.rllava_algorithms(), rllava_ppo.plugin.rllava_plugin_info()\n"
        "print(*sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
