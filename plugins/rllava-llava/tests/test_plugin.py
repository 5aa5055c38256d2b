"""What the plugin declares, and its options."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rllava_core.plugins import load_plugins
from rllava_llava.config import LlavaOptions

TOWERS = {"vision": "v", "language": "l"}


def test_the_plugin_provides_the_model_llava() -> None:
    [plugin] = [plugin for plugin in load_plugins().plugins if plugin.name == "llava"]
    assert plugin.status == "ok", plugin.error
    [component] = plugin.components
    assert (component.kind, component.qualified_name) == ("model", "rllava-llava/llava")
    assert component.load_config() is LlavaOptions
    assert component.load_target().__name__ == "Llava"


def test_listing_the_plugin_and_reading_its_options_imports_nothing_heavy() -> None:
    script = (
        "import sys, rllava_llava.plugin, rllava_llava.config\n"
        "rllava_llava.plugin.rllava_models(), rllava_llava.plugin.rllava_plugin_info()\n"
        "rllava_llava.config.LlavaOptions(from_scratch='tiny')\n"
        "print(*sorted({'torch', 'torchvision', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set either `path`"),
        ({"path": "x", "from_scratch": "tiny"}, "set either `path`"),
        ({"path": "x", "compose": TOWERS}, "set either `path`"),
        ({"from_scratch": "tiny", "compose": TOWERS}, "set either `path`"),
        ({"from_scratch": "huge"}, "tiny-onevision"),
        ({"compose": {"vision": "v"}}, r"compose\.language"),
        ({"compose": {"language": "l"}}, r"compose\.vision"),
        ({"compose": {**TOWERS, "connector": "glue"}}, "'mlp', 'linear' or 'resampler'"),
        ({"compose": {**TOWERS, "queries": 0}}, "queries"),
        ({"from_scratch": "tiny", "colour": 1}, "colour"),
    ],
)
def test_a_mistake_in_the_options_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        LlavaOptions(**options)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("origin", [{"path": "x"}, {"from_scratch": "tiny-next"}, {"compose": TOWERS}])
def test_one_origin_is_enough(origin: dict[str, Any]) -> None:
    assert LlavaOptions(**origin).tiling
