"""Options of GRPO and what the plugin declares."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rllava_core.plugins import load_plugins
from rllava_grpo.config import GRPOConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "compares the trajectories of a group, so it needs at least 2"),
        ({"aggregation": "constant"}, "aggregation_length goes with `aggregation: constant`"),
        ({"aggregation_length": 8}, "aggregation_length goes with `aggregation: constant`"),
        ({"kl_coefficient": 0.1, "kl_estimator": "k1"}, "use k2 or k3, or kl_in: reward"),
        ({"kl_coefficient": -1}, "kl_coefficient"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_low": 1.1}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"epsilon": 0}, "epsilon"),
        ({"scale": "std"}, "scale"),
        ({"clip": 0.2}, "clip"),
    ],
)
def test_a_mistake_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GRPOConfig(**options)


def test_the_defaults_are_the_paper_s() -> None:
    config = GRPOConfig()
    assert (config.clip_low, config.clip_high, config.scale, config.aggregation) == (0.2, 0.2, "group", "sequence")
    assert (config.epochs, config.minibatches, config.kl_estimator, config.kl_in) == (1, 1, "k3", "loss")


def test_the_plugin_provides_the_algorithm_grpo() -> None:
    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.name == "grpo"]
    assert plugin.status == "ok", plugin.error
    [component] = plugin.components
    assert (component.kind, component.qualified_name) == ("algorithm", "rllava-grpo/grpo")
    assert component.load_config() is GRPOConfig
    assert component.load_target().__name__ == "GRPO"


def test_listing_the_plugin_and_reading_its_options_imports_no_torch() -> None:
    script = (
        "import sys, rllava_grpo.plugin, rllava_grpo.config\n"
        "rllava_grpo.plugin.rllava_algorithms(), rllava_grpo.plugin.rllava_plugin_info()\n"
        "print(*sorted({'torch', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
