"""Is the image seen? What the answers' log-probs owe to the images, and whether gradients reach what sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from rllava_core.algorithms.protocol import Batch
from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ContextSegment, Segment, Trajectory
from rllava_core.policy.adapter import ModelAdapter, Part
from rllava_core.policy.batch import BatchBuilder
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy, PolicyOutput

EPISODES = 16
"""How many episodes with images are looked at."""

UNSEEN = 1e-6
"""Nats. The same tokens in the same batch are computed alike, so what comes of an unseen image is rounding at most."""


def probe(
    policy: Policy, media: MediaStore, trajectories: Sequence[Trajectory], micro_batch_tokens: int = 16_384
) -> dict[str, float]:
    """Metrics `image/…` of the first episodes that show an image; empty if none does.

    swapped, blanked: mean |change| of the log-probs of what was decided (nats), when each image becomes another of the
        same size from these episodes (left out if there is none), or a plain grey one.
    influence: the largest of these changes, and of those of the policy's heads.
    gradient_vision, gradient_connector: norm of the gradient of the mean log-prob of the first micro-batch with respect
        to the part's weights, where they are trained.
    """
    shown = [item for item in trajectories if any(_images(item))][:EPISODES]
    if not shown:
        return {}
    found: dict[str, float] = {}
    with torch.no_grad():
        seen = _forward(policy, media, shown, micro_batch_tokens)
        influence = 0.0
        for name, replaced in (("swapped", _swapped(shown)), ("blanked", _with_images(shown, _blank))):
            if replaced is None:
                continue
            other = _forward(policy, media, replaced, micro_batch_tokens)
            found[f"image/{name}"] = float((other.logprobs - seen.logprobs).abs().mean())
            changes = [other.logprobs - seen.logprobs, *(other.heads[key] - seen.heads[key] for key in seen.heads)]
            largest = float(torch.stack([change.abs().max() for change in changes]).max())
            influence = largest if math.isnan(largest) else max(influence, largest)
    first = next(iter(Batch(tuple(shown), {}).split(micro_batch_tokens))).trajectories
    return {**found, "image/influence": influence, **_gradients(policy, media, first)}


def _forward(policy: Policy, media: MediaStore, trajectories: Sequence[Trajectory], tokens: int) -> PolicyOutput:
    """Log-probs and heads of all, computed a micro-batch at a time."""
    outputs = [_packed(policy, media, part.trajectories) for part in Batch(tuple(trajectories), {}).split(tokens)]
    return PolicyOutput(
        torch.cat([output.logprobs for output in outputs]),
        torch.cat([output.entropies for output in outputs]),
        {name: torch.cat([output.heads[name] for output in outputs]) for name in policy.heads},
    )


def _packed(policy: Policy, media: MediaStore, trajectories: Sequence[Trajectory]) -> PolicyOutput:
    builder = BatchBuilder(policy.adapter, media, packed=policy.recomputes)
    for trajectory in trajectories:
        builder.add_trajectory(trajectory)
    output: PolicyOutput = policy(builder.build().to(policy.device))
    return output


def _gradients(policy: Policy, media: MediaStore, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    parts = _trained(policy.model, policy.adapter)
    weights = [item for members in parts.values() for item in members]
    if not weights:
        return {}
    with torch.enable_grad():
        # Not by `backward`, which would leave its gradients to the next step.
        mean = _packed(policy, media, trajectories).logprobs.mean()
        gradients = iter(torch.autograd.grad(mean, weights, allow_unused=True))
    norms = {}
    for part, members in parts.items():
        reached = [gradient for gradient in (next(gradients) for _ in members) if gradient is not None]
        norms[f"image/gradient_{part}"] = sum(float(item.float().square().sum()) for item in reached) ** 0.5
    return norms


def _trained(model: nn.Module, adapter: ModelAdapter) -> dict[Part, list[Tensor]]:
    """The weights that are trained of the parts that see."""
    parts: dict[Part, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        part = adapter.part_of(name.replace(".base_layer.", "."))
        if parameter.requires_grad and part != "language":
            parts.setdefault(part, []).append(parameter)
    return parts


def _images(trajectory: Trajectory) -> list[Image]:
    return [image for turn in trajectory.turns for segment in turn.context for image in _of(segment)]


def _of(segment: Segment) -> tuple[Image, ...]:
    return segment.images if isinstance(segment, ContextSegment) else ()


def _blank(image: Image) -> Image:
    return Image.from_array(np.full_like(image.pixels, 127), f"{image.source}, blanked")


def _swapped(trajectories: Sequence[Trajectory]) -> list[Trajectory] | None:
    """Every image replaced by the next other one of its size; None if no image has another of its size."""
    alike: dict[tuple[int, ...], dict[str, Image]] = {}
    for trajectory in trajectories:
        for image in _images(trajectory):
            alike.setdefault(image.pixels.shape, {})[image.digest] = image
    partners: dict[str, Image] = {}
    for members in alike.values():
        digests = list(members)
        partners |= {digest: members[digests[place - 1]] for place, digest in enumerate(digests) if len(digests) > 1}
    return _with_images(trajectories, lambda image: partners.get(image.digest, image)) if partners else None


def _with_images(trajectories: Sequence[Trajectory], other: Callable[[Image], Image]) -> list[Trajectory]:
    """The same episodes with other images. Segments that turns share stay shared."""
    replaced: dict[int, Segment] = {}

    def changed(segment: Segment) -> Segment:
        if isinstance(segment, ContextSegment) and segment.images and id(segment) not in replaced:
            replaced[id(segment)] = replace(segment, images=tuple(map(other, segment.images)))
        return replaced.get(id(segment), segment)

    return [
        replace(
            trajectory,
            turns=tuple(replace(turn, context=tuple(map(changed, turn.context))) for turn in trajectory.turns),
            final=None if trajectory.final is None else tuple(map(changed, trajectory.final)),
        )
        for trajectory in trajectories
    ]


def unseen(metrics: Mapping[str, float]) -> str | None:
    """What to tell the user if images have no influence on the answers."""
    if not metrics.get("image/influence", 1.0) <= UNSEEN:
        return None
    return (
        "the images have no influence on the answers: other images, or none, give the very same log-probs. Do the "
        "features of the vision part reach the language model, and is the placeholder where they go?"
    )
