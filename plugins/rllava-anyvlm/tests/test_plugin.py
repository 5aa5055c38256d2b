"""What the plugin declares, and its options."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rllava_anyvlm.config import AnyVLMOptions
from rllava_core.plugins import load_plugins


def test_the_plugin_provides_the_model_auto() -> None:
    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.name == "anyvlm"]
    assert plugin.status == "ok", plugin.error
    [component] = plugin.components
    assert (component.kind, component.qualified_name) == ("model", "rllava-anyvlm/anyvlm")
    assert component.load_config() is AnyVLMOptions
    assert component.load_target().__name__ == "AnyVLM"


def test_listing_the_plugin_and_reading_its_options_imports_nothing_heavy() -> None:
    script = (
        "import sys, rllava_anyvlm.plugin, rllava_anyvlm.config\n"
        "rllava_anyvlm.plugin.rllava_models(), rllava_anyvlm.plugin.rllava_plugin_info()\n"
        "rllava_anyvlm.config.AnyVLMOptions(from_scratch='tiny')\n"
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
        ({"from_scratch": "tiny", "dtype": "int8"}, "dtype"),
        ({"from_scratch": "tiny", "probe": False}, "probe"),
    ],
)
def test_a_mistake_in_the_options_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AnyVLMOptions(**options)
