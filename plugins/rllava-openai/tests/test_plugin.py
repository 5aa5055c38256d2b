"""What the plugin lists, what listing it costs, and that its README and example keep up."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rllava_core.config import load
from rllava_core.plugins import load_plugins
from rllava_openai import plugin
from rllava_openai.config import EngineConfig, JudgeConfig

PACKAGE = Path(__file__).parents[1]


def test_it_lists_an_engine_that_cannot_be_trained_and_a_reward() -> None:
    [engine] = plugin.rllava_engines()
    assert engine.provides == {"rollout", "own_model"}
    [judge] = plugin.rllava_rewards()
    assert (engine.name, judge.name) == ("openai", "judge")
    assert plugin.rllava_plugin_info().summary


def test_listing_it_and_reading_its_options_imports_nothing_heavy() -> None:
    code = (
        "import sys; import rllava_openai.plugin as plugin; plugin.rllava_engines(); plugin.rllava_rewards(); "
        "import rllava_openai.config; "
        "print([name for name in ('torch', 'transformers', 'httpx2', 'numpy', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_entry_point_names_the_plugin_module() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert importlib.import_module(project["entry-points"]["rllava"]["openai"]).__name__ == plugin.__name__


@pytest.mark.parametrize("option", sorted({*EngineConfig.model_fields, *JudgeConfig.model_fields}))
def test_the_readme_describes_every_option(option: str) -> None:
    assert f"| `{option}` |" in (PACKAGE / "README.md").read_text(encoding="utf-8")


def test_the_example_is_a_config_of_an_evaluation() -> None:
    example = PACKAGE.parents[1] / "examples" / "hosted_eval.yaml"
    resolved = load(example, [], load_plugins(), learning=False)
    assert isinstance(resolved.rollout_engine.config, EngineConfig)
