"""What the plugin declares, and its options."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rllava_core.plugins import load_plugins
from rllava_smolvlm.config import SmolVLMOptions


def test_the_plugin_provides_the_model_smolvlm() -> None:
    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.name == "smolvlm"]
    assert plugin.status == "ok", plugin.error
    [component] = plugin.components
    assert (component.kind, component.qualified_name) == ("model", "rllava-smolvlm/smolvlm")
    assert component.load_config() is SmolVLMOptions
    assert component.load_target().__name__ == "SmolVLM"


def test_listing_the_plugin_and_reading_its_options_imports_nothing_heavy() -> None:
    script = (
        "import sys, rllava_smolvlm.plugin, rllava_smolvlm.config\n"
        "rllava_smolvlm.plugin.rllava_models(), rllava_smolvlm.plugin.rllava_plugin_info()\n"
        "rllava_smolvlm.config.SmolVLMOptions(from_scratch='tiny')\n"
        "print(*sorted({'torch', 'torchvision', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set either `path`"),
        ({"path": "x", "from_scratch": "tiny"}, "set either `path`"),
        ({"from_scratch": "huge"}, "tiny"),
        ({"from_scratch": "tiny", "longest_edge": 0}, "longest_edge"),
        ({"from_scratch": "tiny", "split_images": "perhaps"}, "split_images"),
        ({"from_scratch": "tiny", "colour": 1}, "colour"),
    ],
)
def test_a_mistake_in_the_options_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SmolVLMOptions(**options)
