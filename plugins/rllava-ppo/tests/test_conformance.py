"""PPO and its options keep the contract of an algorithm."""

from __future__ import annotations

from types import MappingProxyType

from rllava_core.testing import AlgorithmConformance


class TestPPO(AlgorithmConformance):
    component = "ppo"
    learning_steps = 12


class TestASeparateCritic(AlgorithmConformance):
    component = "ppo"
    options = MappingProxyType({"critic": "separate", "epochs": 1, "minibatches": 1})


class TestTurns(AlgorithmConformance):
    """All of a step in one batch, with everything that bounds."""

    component = "ppo"
    learning_steps = 20
    options = MappingProxyType(
        {"gae": "turn", "epochs": 2, "minibatches": 1, "value_clip": 0.2, "dual_clip": 3.0, "target_kl": 0.5}
    )


class TestBothLevelsWithAReference(AlgorithmConformance):
    component = "ppo"
    learning_steps = 20
    options = MappingProxyType(
        {
            "gae": "both",
            "group_size": 2,
            "epochs": 2,
            "minibatches": 2,
            "kl_coefficient": 0.05,
            "kl_in": "reward",
            "kl_estimator": "k1",
            "kl_target": 0.1,
            "entropy_coefficient": 0.01,
            "whiten": False,
            "aggregation": "sequence",
        }
    )
