"""Options of DQN and what the plugin declares."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rllava_core.plugins import load_plugins
from rllava_dqn.config import DQNConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon_start": 0.1, "epsilon_end": 0.5}, "epsilon_end is 0.5, above epsilon_start 0.1: .* at most"),
        ({"gamma": 1.1}, "gamma"),
        ({"n_steps": 0}, "n_steps"),
        ({"loss": "l1"}, "loss"),
        ({"batch_size": 0}, "batch_size"),
        ({"updates_per_turn": 0}, "updates_per_turn"),
        ({"warmup_turns": -1}, "warmup_turns"),
        ({"target_every": 0}, "target_every"),
        ({"target_rate": 0}, "target_rate"),
        ({"target_rate": 1.5}, "target_rate"),
        ({"epsilon_turns": 0}, "epsilon_turns"),
        ({"replay_size": 0}, "replay_size"),
        ({"replay_bytes": 0}, "replay_bytes"),
        ({"priority_alpha": 2}, "priority_alpha"),
        ({"priority_beta": -0.1}, "priority_beta"),
        ({"priority_epsilon": 0}, "priority_epsilon"),
        ({"prioritized": True}, "prioritized"),
    ],
)
def test_a_mistake_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DQNConfig(**options)


def test_the_defaults_are_double_dqn_with_a_uniform_replay() -> None:
    config = DQNConfig()
    assert (config.double, config.dueling, config.n_steps, config.priority_alpha) == (True, False, 1, 0.0)
    assert (config.target_rate, config.loss, config.gamma) == (1.0, "huber", 0.99)
    assert (config.replay_size, config.replay_bytes) == (50_000, 512 * 2**20)


def test_the_plugin_provides_the_algorithm_dqn() -> None:
    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.name == "dqn"]
    assert plugin.status == "ok", plugin.error
    [component] = plugin.components
    assert (component.kind, component.qualified_name) == ("algorithm", "rllava-dqn/dqn")
    assert component.spec.needs == {"train", "rollout", "heads", "choices", "action_values"}
    assert component.load_config() is DQNConfig
    assert component.load_target().__name__ == "DQN"


def test_listing_the_plugin_and_reading_its_options_imports_no_torch() -> None:
    script = (
        "import sys, rllava_dqn.plugin, rllava_dqn.config\n"
        "rllava_dqn.plugin.rllava_algorithms(), rllava_dqn.plugin.rllava_plugin_info()\n"
        "print(*sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


def test_the_replay_itself_needs_no_torch() -> None:
    script = "import sys, rllava_dqn.replay\nprint(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
