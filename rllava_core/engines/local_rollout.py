"""Sampling in this process, from the very weights that are trained or, beside training, from a copy of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from rllava_core.engines.config import LocalRolloutConfig, overlaps
from rllava_core.engines.protocol import RolloutSetup
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request, Sampler


class LocalRolloutEngine:
    """Decodes with the policy's own module, so that weights are not copied; with `async`, with a module of its own."""

    def __init__(self, config: LocalRolloutConfig, setup: RolloutSetup) -> None:
        self.config = config
        self._media = setup.media
        self._autocast = setup.autocast
        self._copy = setup.policy.copied() if overlaps(config) else None
        self.sync(setup.policy)

    def generate(
        self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None
    ) -> list[list[ActionSegment]]:
        # Each thread has a current device of its own.
        here = nullcontext() if self._copy is None else torch.accelerator.device_index(self._copy.device.index)
        with here, self._autocast():
            return self._sampler.sample(requests, seed, behaviour, self.config.max_sequences)

    def forget(self) -> None:
        self._sampler.forget()

    @torch.no_grad()
    def sync(self, policy: Policy) -> None:
        if self._copy is not None:
            # Casts of the copy's weights as they were.
            torch.clear_autocast_cache()
            for own, new in zip(self._copy.parameters(), policy.parameters(), strict=True):
                if new.requires_grad:
                    own.copy_(new)
        self._policy = policy if self._copy is None else self._copy
        self._sampler = Sampler(self._policy, self._media)
