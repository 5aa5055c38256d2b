"""SmolVLM and Idefics3 keep the contract of a model adapter."""

from __future__ import annotations

from types import MappingProxyType

from rllava_core.testing import ModelAdapterConformance


class TestSmolVLM(ModelAdapterConformance):
    component = "smolvlm"


class TestSmolVLMInTiles(ModelAdapterConformance):
    """The three sizes of images become 4, 2 and 4 tiles, and the whole image behind them."""

    component = "smolvlm"
    options = MappingProxyType({"from_scratch": "tiny", "split_images": True, "attention": "eager"})


class TestManyTiles(ModelAdapterConformance):
    """3×3, 1×3 and 3×1 tiles."""

    component = "smolvlm"
    options = MappingProxyType({"from_scratch": "tiny", "split_images": True, "longest_edge": 96})
    image_sizes = ((16, 16), (4, 16), (16, 4))


class TestIdefics3(ModelAdapterConformance):
    component = "smolvlm"
    options = MappingProxyType({"from_scratch": "tiny-idefics3", "split_images": True})
