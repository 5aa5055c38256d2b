"""What is counted from sizes alone, not measured: weights, the optimizer's states, and what processes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rllava_core.planning.request import Levers, Request
from rllava_core.planning.shape import QuantizedLinear
from rllava_core.policy.policy import Policy

AVERAGED = 2**28
"""Bytes of gradients that are averaged at once, where each process then keeps a part of them (ZeRO)."""


@dataclass(frozen=True)
class Shared:
    """What a process holds because there are others, in bytes by part. gathered: while an update computes."""

    held: Mapping[str, int]
    gathered: Mapping[str, int]


def shared_bytes(request: Request, policy: Policy) -> Shared:
    """Gradients that are whole are copied to where they are averaged (DDP); those that are divided, some at a time. A
    part of the weights is there beside those that act; layers are gathered one by one, with the next, and what is in
    none of them for the whole pass, each with its gradient (FSDP2, ZeRO-3)."""
    if request.processes == 1:
        return Shared({}, {})
    trained = {name: item.nbytes for name, item in policy.named_parameters() if item.requires_grad}
    total = sum(trained.values())
    if "gradients" not in request.divided:
        return Shared({"averaging": total}, {})
    parts = len(request.divided & {"weights", "masters"})
    held = {"shard of weights": parts * total // request.processes}
    if "masters" in request.divided:
        held["averaging"] = min(total, AVERAGED)
    if "weights" not in request.divided:
        # Beside it the copy that is sent, or a weight that is larger than all of it.
        return Shared(held, {"sent": max(held.get("averaging", 0), *trained.values())})
    layers = [name for name, item in policy.named_modules() if isinstance(item, GradientCheckpointingLayer)]
    units = [sum(size for name, size in trained.items() if name.startswith(f"{layer}.")) for layer in layers]
    return Shared(held, {"gathered": 2 * (total - sum(units)) + 3 * max(units, default=0)})


def optimizer_bytes(levers: Levers, trained: Sequence[Tensor]) -> int:
    """States of the optimizer, and the float32 weights that it keeps beside the model's."""
    total = 0
    for parameter in trained:
        width, count = stepped_in(levers, parameter), parameter.numel()
        if levers.optimizer == "adafactor":
            # One number a row and a column; a whole second moment of what is no matrix.
            total += 4 * (sum(parameter.shape) if parameter.ndim > 1 else count)
        elif levers.optimizer == "adamw_8bit":
            # A byte each, and a float32 scale for every 256; of small ones bitsandbytes keeps float32.
            total += 2 * (count + 4 * count // 256) if count >= 4096 else 8 * count
        else:
            total += 2 * width * count
        if levers.optimizer_on_cpu and not levers.stochastic_rounding and parameter.element_size() < 4:
            total += 4 * count
    return total


def stepped_in(levers: Levers, parameter: Tensor) -> int:
    """Bytes a number of what the optimizer steps on: float32 on the host, and where it is rounded at random."""
    return 4 if levers.optimizer_on_cpu or levers.stochastic_rounding else parameter.element_size()


def step_bytes(levers: Levers, trained: Sequence[Tensor], *, on_card: bool) -> int:
    """What a step takes for the while: of streamed ones the largest parameter's.

    Its gradient in float32, and the weight where no master is kept, if they are not that already, and there;
    bitsandbytes on the CPU takes 24 bytes a weight, adafactor 8; rounding at random takes pieces.
    """
    largest = max(trained, key=Tensor.numel)
    own = 8 if levers.optimizer == "adafactor" else 0
    if levers.optimizer == "adamw_8bit" and (levers.optimizer_on_cpu or not on_card):
        own = 24
    if not (levers.stochastic_rounding or levers.optimizer_on_cpu or levers.step_in_backward):
        return own * largest.numel()
    width = stepped_in(levers, largest)
    narrow = largest.element_size() < width
    mastered = narrow and levers.optimizer_on_cpu and not levers.stochastic_rounding
    moved = levers.optimizer_on_cpu and on_card
    copied = width * (narrow + ((narrow or moved) and not mastered))
    return (own + copied) * largest.numel()


def module_bytes(module: nn.Module) -> int:
    """Of weights and buffers, what is tied once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def copy_bytes(policy: Policy) -> int:
    """Of a frozen copy of the policy, which shares what is not trained."""
    return sum(parameter.nbytes for parameter in policy.parameters() if parameter.requires_grad)


def merged_bytes(model: nn.Module) -> int:
    """Of the layers that low-rank adapters are around, plain."""
    total = 0
    for name, module in model.named_modules():
        if name.endswith(".base_layer"):
            layer: Any = module
            size = layer.in_features * layer.out_features
            total += size * layer.dtype.itemsize if isinstance(layer, QuantizedLinear) else layer.weight.nbytes
    return total
