"""GRPO and its published variants keep the contract of an algorithm."""

from __future__ import annotations

from types import MappingProxyType

from rllava_core.testing import AlgorithmConformance


class TestGRPO(AlgorithmConformance):
    component = "grpo"
    options = MappingProxyType({"group_size": 4})


class TestWithAReference(AlgorithmConformance):
    component = "grpo"
    options = MappingProxyType({"group_size": 4, "kl_coefficient": 0.05, "entropy_coefficient": 0.01})


class TestDAPO(AlgorithmConformance):
    """arXiv:2503.14476: a higher upper bound, every token alike; here with several steps an iteration."""

    component = "grpo"
    options = MappingProxyType(
        {"group_size": 4, "clip_high": 0.28, "aggregation": "token", "epochs": 2, "minibatches": 2}
    )


class TestDrGRPO(AlgorithmConformance):
    """arXiv:2503.20783: no standard deviation, a constant length."""

    component = "grpo"
    options = MappingProxyType({"group_size": 4, "scale": "none", "aggregation": "constant", "aggregation_length": 4})
