"""What the plugin lists, and what listing it costs."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rllava_gymnasium import plugin
from rllava_gymnasium.config import GymnasiumConfig

PACKAGE = Path(__file__).parents[1]


def test_it_lists_its_environment() -> None:
    [spec] = plugin.rllava_environments()
    assert spec.name == "gymnasium"
    assert spec.provides == {"choices"}
    assert plugin.rllava_plugin_info().summary


def test_listing_it_and_reading_its_options_imports_nothing_heavy() -> None:
    code = (
        "import sys; import rllava_gymnasium.plugin as plugin; plugin.rllava_environments(); "
        "import rllava_gymnasium.config; "
        "print([name for name in ('torch', 'gymnasium', 'pygame', 'numpy', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_entry_point_names_the_plugin_module() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert importlib.import_module(project["entry-points"]["rllava"]["gymnasium"]).__name__ == plugin.__name__


@pytest.mark.parametrize("option", list(GymnasiumConfig.model_fields))
def test_the_readme_describes_every_option(option: str) -> None:
    assert f"| `{option}` |" in (PACKAGE / "README.md").read_text(encoding="utf-8")
