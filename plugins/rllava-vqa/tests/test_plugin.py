"""What the plugin lists, and what listing it costs."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rllava_core.specs import ComponentSpec
from rllava_vqa import plugin

SPECS = [*plugin.rllava_datasets(), *plugin.rllava_environments(), *plugin.rllava_rewards()]
PACKAGE = Path(__file__).parents[1]


def attribute(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def config_of(spec: ComponentSpec) -> type[BaseModel]:
    assert spec.config is not None
    model = attribute(spec.config)
    assert issubclass(model, BaseModel)
    return model


def test_it_lists_its_components() -> None:
    assert [spec.name for spec in plugin.rllava_datasets()] == ["digits", "digit_scenes", "jsonl", "folder"]
    assert [spec.name for spec in plugin.rllava_environments()] == ["zoom", "zoom_text"]
    assert [spec.name for spec in plugin.rllava_rewards()] == ["exact_match", "answer_format", "contains", "numeric"]
    assert plugin.rllava_plugin_info().summary


def test_listing_it_and_reading_its_options_imports_nothing_heavy() -> None:
    code = (
        "import sys; import rllava_vqa.plugin as plugin; "
        "plugin.rllava_datasets(); plugin.rllava_environments(); plugin.rllava_rewards(); "
        "import rllava_vqa.config; "
        "print([name for name in ('torch', 'transformers', 'sklearn', 'numpy', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_targets_and_configs_are_there(spec: ComponentSpec) -> None:
    assert callable(attribute(spec.target))
    assert spec.summary
    config = config_of(spec)
    undescribed = [name for name, field in config.model_fields.items() if not field.description]
    assert undescribed == []
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        config.model_validate({"path": "data", "misspelt": 1})


@pytest.mark.parametrize("spec", plugin.rllava_rewards(), ids=lambda spec: spec.name)
def test_rewards_need_no_options(spec: ComponentSpec) -> None:
    assert attribute(spec.target)(config_of(spec)())([]) == []


def test_the_entry_point_names_the_plugin_module() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert importlib.import_module(project["entry-points"]["rllava"]["vqa"]).__name__ == plugin.__name__


def documented() -> Iterator[tuple[str, str]]:
    for spec in SPECS:
        for name in config_of(spec).model_fields:
            yield spec.name, name


@pytest.mark.parametrize(("component", "option"), list(documented()))
def test_the_readme_describes_every_option(component: str, option: str) -> None:
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    _, _, section = readme.partition(f"### `{component}`")
    assert f"| `{option}` |" in section.partition("\n### ")[0]
