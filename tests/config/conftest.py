"""Fixtures for tests of the config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rllava_core.config import ResolvedConfig, load
from rllava_core.errors import RllavaError
from rllava_core.plugins import load_plugins


@pytest.fixture
def resolve(toy_config: Path) -> Callable[..., ResolvedConfig]:
    """`resolve("training.steps=2", …, replace=("old text", "new text"))`: the toy's config, changed and loaded."""

    def run(*overrides: str, replace: tuple[str, str] = ("", "")) -> ResolvedConfig:
        text = toy_config.read_text(encoding="utf-8")
        assert replace[0] in text
        toy_config.write_text(text.replace(*replace, 1), encoding="utf-8")
        return load(toy_config, overrides, load_plugins())

    return run


@pytest.fixture
def refusal(resolve: Callable[..., ResolvedConfig], toy_config: Path) -> Callable[..., str]:
    """The same for a config that must be refused with exit code 2: the message, with `FILE` for the file's path."""

    def run(*overrides: str, replace: tuple[str, str] = ("", "")) -> str:
        with pytest.raises(RllavaError) as caught:
            resolve(*overrides, replace=replace)
        assert caught.value.exit_code == 2
        return str(caught.value).replace(str(toy_config), "FILE")

    return run
