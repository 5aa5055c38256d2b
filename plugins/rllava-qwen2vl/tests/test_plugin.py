"""What the plugin declares, and its options."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rllava_core.plugins import load_plugins
from rllava_qwen2vl.config import Qwen2VLOptions


def test_the_plugin_provides_the_model_qwen2vl() -> None:
    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.name == "qwen2vl"]
    assert plugin.status == "ok", plugin.error
    [component] = plugin.components
    assert (component.kind, component.qualified_name) == ("model", "rllava-qwen2vl/qwen2vl")
    assert component.load_config() is Qwen2VLOptions
    assert component.load_target().__name__ == "Qwen2VL"


def test_listing_the_plugin_and_reading_its_options_imports_nothing_heavy() -> None:
    script = (
        "import sys, rllava_qwen2vl.plugin, rllava_qwen2vl.config\n"
        "rllava_qwen2vl.plugin.rllava_models(), rllava_qwen2vl.plugin.rllava_plugin_info()\n"
        "rllava_qwen2vl.config.Qwen2VLOptions(from_scratch='tiny')\n"
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
        ({"from_scratch": "tiny", "min_pixels": 0}, "min_pixels"),
        ({"from_scratch": "tiny", "min_pixels": 5000, "max_pixels": 4000}, "min_pixels 5000 is more than max_pixels"),
        ({"from_scratch": "tiny", "dtype": "int8"}, "dtype"),
        ({"from_scratch": "tiny", "attention": "flash"}, "attention"),
        ({"from_scratch": "tiny", "colour": 1}, "colour"),
    ],
)
def test_a_mistake_in_the_options_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Qwen2VLOptions(**options)
