"""Qwen2-VL keeps the contract of a model adapter."""

from __future__ import annotations

from types import MappingProxyType

from rllava_core.testing import ModelAdapterConformance


class TestQwen2VL(ModelAdapterConformance):
    component = "qwen2vl"


class TestSmallImages(ModelAdapterConformance):
    """Down to one token an image."""

    component = "qwen2vl"
    options = MappingProxyType({"from_scratch": "tiny", "min_pixels": 64, "max_pixels": 1024})


class TestEagerAttention(ModelAdapterConformance):
    component = "qwen2vl"
    options = MappingProxyType({"from_scratch": "tiny", "attention": "eager"})


class TestQwen25VL(ModelAdapterConformance):
    """Window attention in the vision part."""

    component = "qwen2vl"
    options = MappingProxyType({"from_scratch": "tiny-qwen2.5"})


class TestQwen3VL(ModelAdapterConformance):
    """DeepStack, and M-RoPE with interleaved frequencies."""

    component = "qwen2vl"
    options = MappingProxyType({"from_scratch": "tiny-qwen3"})


class TestQwen3VLMoe(ModelAdapterConformance):
    """Experts."""

    component = "qwen2vl"
    options = MappingProxyType({"from_scratch": "tiny-qwen3-moe"})
