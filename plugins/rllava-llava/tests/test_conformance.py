"""LLaVA keeps the contract of a model adapter."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from rllava_core.testing import ModelAdapterConformance


class TestLlava(ModelAdapterConformance):
    component = "llava"


class TestLlavaNext(ModelAdapterConformance):
    """Tiles, and as many tokens as an image's shape asks for."""

    component = "llava"
    options = MappingProxyType({"from_scratch": "tiny-next"})


class TestLlavaOnevision(ModelAdapterConformance):
    component = "llava"
    options = MappingProxyType({"from_scratch": "tiny-onevision"})


class TestLlavaOnevisionUntiled(ModelAdapterConformance):
    component = "llava"
    options = MappingProxyType({"from_scratch": "tiny-onevision", "tiling": False})


class TestEagerAttention(ModelAdapterConformance):
    component = "llava"
    options = MappingProxyType({"from_scratch": "tiny-next", "attention": "eager"})


class Composed(ModelAdapterConformance):
    """Of directories that are made for every check."""

    component = "llava"
    vision, language, connector = "siglip", "qwen2", "mlp"
    __test__ = False

    @pytest.fixture(autouse=True)
    def _towers(self, towers: Any) -> None:
        composed = towers.compose(self.vision, self.language, connector=self.connector, queries=5)
        self.options = MappingProxyType({"compose": composed})


class TestComposed(Composed):
    __test__ = True


class TestComposedWithAResampler(Composed):
    """No class of transformers."""

    __test__ = True
    vision, language, connector = "clip", "llama", "resampler"


class TestComposedWithALinearConnector(Composed):
    __test__ = True
    vision, language, connector = "dinov2", "llama", "linear"
