"""The fastest setting of the memory levers that fits a card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from rllava_core.errors import ConfigError
from rllava_core.planning.planner import Plan, Planner
from rllava_core.planning.request import Levers, Request

CARDS = (6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 141, 192)
"""GiB of memory that cards are sold with."""

MARGIN = 0.95
"""Of a card's memory: what the allocator's blocks waste is not predicted."""

SMALLEST_BATCH = 2048
"""Tokens of a micro-batch below which nothing is gained any more."""


@dataclass(frozen=True)
class Fit:
    """The result of a search.

    plan: the fastest that fits, or if none does the one that needs least.
    overrides: of the config, by which it is reached.
    card: GiB of the smallest card that holds it, None if there is none.
    host: bytes of the host's memory beside the card, None if it was not limited.
    """

    budget: int
    fits: bool
    plan: Plan
    overrides: tuple[str, ...]
    card: int | None
    host: int | None


def fitted(planner: Planner, request: Request, budget: int, host: int | None = None) -> Fit:
    """Try settings from fast to slow, the request's own first. Raises ConfigError if that cannot be run.

    budget: bytes of the card, or of the host if the model is there.
    host: bytes of the host's memory beside a card; None: enough of it.

    Measuring takes seconds, so what is sure not to fit is not measured.
    """
    before = request.levers
    room = _Room(budget, host if request.device == "cuda" else None)
    least = planner.plan(holes=False)
    found = planner.plan() if room.holds(least) else least
    for levers in () if room.holds(found) else _from_fast_to_slow(request):
        try:
            if not room.may_hold(planner, levers):
                continue
            # Plans are compared without holes, which are looked for where all else has room.
            bare = planner.plan(levers, holes=False)
            least = min((least, bare), key=room.lack)
            if room.holds(bare):
                found = planner.plan(levers)
        except ConfigError:
            continue  # such a setting cannot be run
        if room.holds(found):
            break
    if not room.holds(found):
        least = min((least, planner.plan(_leanest(request), holes=False)), key=room.lack)
        found = planner.plan(least.levers)
    card = next((size for size in CARDS if found.needed <= MARGIN * size * 2**30), None)
    return Fit(budget, room.holds(found), found, tuple(found.levers.overrides(before)), card, room.host)


@dataclass(frozen=True)
class _Room:
    """Bytes of the card, or of the host where the model is there; and of the host beside a card, if that is limited."""

    budget: int
    host: int | None

    def lack(self, plan: Plan) -> tuple[float, int]:
        """Bytes that are missing; of two that lack the same, the one that needs less is better."""
        on_host = 0 if self.host is None else max(0, plan.host_peak.host_total - self.host)
        return max(0.0, plan.needed - MARGIN * self.budget) + on_host, plan.needed

    def holds(self, plan: Plan) -> bool:
        return self.lack(plan)[0] == 0

    def may_hold(self, planner: Planner, levers: Levers) -> bool:
        """Whether there is room for weights, states, gradients, and for the activations of the setting that has least
        of them (which are there while gradients may not be)."""
        least = planner.at_least(levers)
        held = least.device or least.host
        limit = MARGIN * self.budget
        if sum(held.values()) > limit or (self.host is not None and least.host_total > self.host):
            return False
        leanest = replace(
            levers,
            micro_batch_tokens=min(SMALLEST_BATCH, levers.micro_batch_tokens),
            checkpoint_activations=True,
            offload_activations=True,
            optimizer="adamw",
            optimizer_on_cpu=True,
            stochastic_rounding=False,
            step_in_backward=False,
            unseen_images="ignore",
        )
        return sum(held.values()) - held.get("gradients", 0) + planner.activations(leanest) <= limit


def _from_fast_to_slow(request: Request) -> Iterator[Levers]:
    before = request.levers
    sizes = [before.micro_batch_tokens]
    while sizes[-1] > SMALLEST_BATCH:
        sizes.append(max(SMALLEST_BATCH, sizes[-1] // 2))
    may_stream = request.training.max_grad_norm is None
    settings = [
        replace(
            before,
            unseen_images=unseen,
            micro_batch_tokens=size,
            checkpoint_activations=recompute or before.checkpoint_activations,
            offload_activations=offload or before.offload_activations,
            dtype=dtype,
            stochastic_rounding=before.stochastic_rounding or (dtype != before.dtype and not away),
            optimizer=optimizer,
            optimizer_on_cpu=away or before.optimizer_on_cpu,
            step_in_backward=streamed or before.step_in_backward,
        )
        for unseen, size, recompute, offload, dtype, optimizer, away, streamed in product(
            dict.fromkeys((before.unseen_images, "ignore")),
            sizes,
            (False, True),
            (False, True),
            dict.fromkeys((before.dtype, "bfloat16")),
            dict.fromkeys((before.optimizer, "adamw_8bit")),
            (False, True),
            (False, True) if may_stream else (False,),
        )
        if not (away and streamed)
    ]
    yield from sorted(dict.fromkeys(settings), key=lambda levers: _slowness(levers, before))


def _slowness(levers: Levers, before: Levers) -> float:
    """About how much longer an update takes than before; then how much else is given up."""
    return (
        (0.33 if levers.checkpoint_activations and not before.checkpoint_activations else 0.0)
        + (1.0 if levers.offload_activations and not before.offload_activations else 0.0)
        + (0.5 if levers.optimizer_on_cpu and not before.optimizer_on_cpu else 0.0)
        + 0.02 * (before.micro_batch_tokens / levers.micro_batch_tokens - 1)
        + (0.03 if levers.optimizer != before.optimizer else 0.0)
        + (0.02 if levers.step_in_backward and not before.step_in_backward else 0.0)
        # These change what is computed, or what is looked at: not as long as others will do.
        + (0.6 if levers.dtype != before.dtype else 0.0)
        + (0.3 if levers.unseen_images != before.unseen_images else 0.0)
    )


def _leanest(request: Request) -> Levers:
    """Every lever that goes with the others."""
    return replace(
        request.levers,
        micro_batch_tokens=min(SMALLEST_BATCH, request.levers.micro_batch_tokens),
        checkpoint_activations=True,
        optimizer_on_cpu=True,
        step_in_backward=False,
        dtype="bfloat16" if request.levers.dtype == "float32" else request.levers.dtype,
        unseen_images="ignore",
    )
