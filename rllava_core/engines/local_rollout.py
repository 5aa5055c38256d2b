"""Sampling in this process, from the very weights that are trained."""

from __future__ import annotations

from collections.abc import Sequence

from rllava_core.engines.config import LocalRolloutConfig
from rllava_core.engines.protocol import RolloutSetup
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request, Sampler


class LocalRolloutEngine:
    """Decodes with the policy's own module, so that weights are never copied."""

    def __init__(self, config: LocalRolloutConfig, setup: RolloutSetup) -> None:
        self.config = config
        self._media = setup.media
        self._autocast = setup.autocast
        self.sync(setup.policy)

    def generate(
        self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None
    ) -> list[list[ActionSegment]]:
        with self._autocast():
            return self._sampler.sample(requests, seed, behaviour, self.config.max_sequences)

    def forget(self) -> None:
        self._sampler.forget()

    def sync(self, policy: Policy) -> None:
        self._policy = policy
        self._sampler = Sampler(policy, self._media)
