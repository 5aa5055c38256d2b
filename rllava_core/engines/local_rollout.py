"""Sampling in this process, from the very weights that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Generator

from rllava_core.engines.config import LocalRolloutConfig
from rllava_core.engines.protocol import RolloutSetup
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request, sample


class LocalRolloutEngine:
    """Decodes with the policy's own module, so that weights are never copied."""

    def __init__(self, config: LocalRolloutConfig, setup: RolloutSetup) -> None:
        self.config = config
        self._policy = setup.policy
        self._media = setup.media
        self._autocast = setup.autocast

    def generate(self, requests: Sequence[Request], seed: int | None) -> list[list[ActionSegment]]:
        generator = None if seed is None else Generator(self._policy.device).manual_seed(seed)
        actions: list[list[ActionSegment]] = []
        with self._autocast():
            for chunk in _chunks(requests, self.config.max_sequences):
                actions += sample(self._policy, self._media, chunk, generator)
        return actions

    def sync(self, policy: Policy) -> None:
        self._policy = policy


def _chunks(requests: Sequence[Request], limit: int) -> Iterator[list[Request]]:
    """Consecutive requests of at most `limit` sequences together; a larger group goes alone."""
    chunk: list[Request] = []
    for request in requests:
        if chunk and sum(item.count for item in chunk) + request.count > limit:
            yield chunk
            chunk = []
        chunk.append(request)
    if chunk:
        yield chunk
