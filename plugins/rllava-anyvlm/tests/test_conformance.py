"""The conformance suite on the preset, and on checkpoints of families of several designs."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from rllava_core.testing import ModelAdapterConformance


class TestInternVL(ModelAdapterConformance):
    """Images that are not square are cut into crops."""

    component = "anyvlm"


class OfAFamily(ModelAdapterConformance):
    """On a checkpoint that transformers alone wrote."""

    component = "anyvlm"
    family: ClassVar[str]

    @pytest.fixture(scope="class", autouse=True)
    def _written(self, request: Any, checkpoints: Any) -> None:
        request.cls.options = {"path": checkpoints.path(self.family)}


class TestLlavaOnevision(OfAFamily):
    """Tiles of different numbers are padded."""

    family = "llava_onevision"


class TestMistral3(OfAFamily):
    """Images keep their sizes, and are padded to the largest."""

    family = "mistral3"


class TestAyaVision(OfAFamily):
    """The placeholder in the text is not the token of an image feature."""

    family = "aya_vision"
