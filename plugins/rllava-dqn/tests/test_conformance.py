"""DQN and its options keep the contract of an algorithm."""

from __future__ import annotations

from types import MappingProxyType

from rllava_core.testing import AlgorithmConformance

USUAL = {"warmup_turns": 0, "batch_size": 16, "updates_per_turn": 1}


class TestDQN(AlgorithmConformance):
    component = "dqn"
    options = MappingProxyType(USUAL)
    learns = False  # values are learnt, not the policy's own distribution


class TestEverything(AlgorithmConformance):
    component = "dqn"
    options = MappingProxyType(
        {
            **USUAL,
            "dueling": True,
            "n_steps": 3,
            "priority_alpha": 0.6,
            "target_every": 1,
            "target_rate": 0.1,
            "loss": "mse",
        }
    )
    learns = False
