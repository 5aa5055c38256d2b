"""LLaVA keeps the contract of a model adapter."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, ClassVar

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
    options = MappingProxyType({"from_scratch": "tiny-onevision", "tiling": False, "attention": "eager"})


class Composed(ModelAdapterConformance):
    """Of directories that are made for it."""

    component = "llava"
    vision: ClassVar[str]
    language: ClassVar[str]
    connector: ClassVar[str]
    __test__ = False

    @pytest.fixture(scope="class", autouse=True)
    def _towers(self, request: Any, towers_of_class: Any) -> None:
        composed = towers_of_class.compose(self.vision, self.language, connector=self.connector, queries=5)
        request.cls.options = MappingProxyType({"compose": composed})


class TestComposed(Composed):
    __test__ = True
    vision, language, connector = "dinov2", "qwen2", "linear"


class TestComposedWithAResampler(Composed):
    """No class of transformers."""

    __test__ = True
    vision, language, connector = "clip", "llama", "resampler"
