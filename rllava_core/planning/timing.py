"""Roughly how long a step takes: floating-point operations and bytes, over what a machine does of them in a second."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rllava_core.planning.phases import Parts


@dataclass(frozen=True)
class Seconds:
    """Of one step. Rough: what a machine reaches of its peak differs by a factor of two."""

    rollout: float
    update: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.rollout + self.update + self.optimizer


@dataclass(frozen=True)
class Machine:
    """flops: a second, as matrix products reach them; bandwidth: bytes a second of its memory; link: to the host's."""

    flops: float
    bandwidth: float
    link: float

    @classmethod
    def card(cls, teraflops: float, gigabytes: float) -> Machine:
        """A GPU by its data sheet: dense bfloat16, of which training reaches two fifths, and memory bandwidth."""
        return cls(0.4 * teraflops * 1e12, 0.7 * gigabytes * 1e9, 20e9)

    @classmethod
    def this_cpu(cls) -> Machine:
        """Measured in a fraction of a second."""
        left, right = torch.rand(2, 768, 768)
        big = torch.rand(2**24)
        left @ right
        began = time.perf_counter()
        for _ in range(4):
            left @ right
        multiplied = time.perf_counter()
        big.add_(1.0)
        added = time.perf_counter()
        bandwidth = 2 * big.nbytes / (added - multiplied)
        return cls(4 * 2 * 768**3 / (multiplied - began), bandwidth, bandwidth)

    def seconds(self, parts: Parts) -> Seconds:
        request, subject, levers = parts.request, parts.subject, parts.request.levers
        workload = request.workload
        rollout = 0.0
        if request.rollouts:
            chunks = -(-request.own_prompts // parts.groups) * workload.turns
            sampling = subject.sampling(parts.groups, workload.group_size)
            steps = 1 if workload.choices is not None else workload.answer_tokens
            # A token needs all weights once, and the cache of its sequence.
            read = steps * (subject.weights + sampling.peak.get("cache", 0))
            rollout = chunks * (sampling.flops / self.flops + read / self.bandwidth)
        if subject.encoding is not None:
            # As if all were new, which they are in the first epoch.
            images = request.own_prompts * workload.images * workload.turns
            rollout += images * subject.encoding.flops / self.flops
        share = len(parts.batch) / len(parts.micro_batch)
        passes = request.epochs * request.minibatches
        flops = parts.update.flops + (subject.evaluation(parts.micro_batch).flops if request.copies else 0)
        update = share * passes * flops / self.flops
        if levers.offload_activations:
            update += share * passes * 2 * parts.update.host / self.link
        moved = 3 * parts.states + 2 * parts.gradients
        optimizer = passes * moved / self.bandwidth
        if levers.optimizer_on_cpu:
            # Gradients go there and weights come back, and the host is slower by an order.
            optimizer = passes * (2 * parts.gradients / self.link + moved / min(self.bandwidth, 40e9))
        return Seconds(rollout, update, optimizer)
