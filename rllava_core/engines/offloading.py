"""Activations in host memory from the forward pass to the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SMALLEST = 2**16
"""Bytes from which a tensor is worth the way there and back."""


@contextmanager
def kept_on_host(module: nn.Module) -> Iterator[None]:
    """What autograd saves for backward is moved to the host, and back when it is used; weights and small tensors stay.

    `torch.autograd.graph.save_on_cpu` would move the weights as well, once for every use.
    """
    weights = {item.untyped_storage().data_ptr() for item in (*module.parameters(), *module.buffers())}

    def pack(saved: Tensor) -> tuple[torch.device, Tensor]:
        if saved.nbytes < SMALLEST or saved.untyped_storage().data_ptr() in weights:
            return saved.device, saved
        # Pinned memory is copied beside other work.
        held = torch.empty_like(saved, device="cpu", pin_memory=saved.is_cuda)
        held.copy_(saved, non_blocking=saved.is_cuda)
        return saved.device, held

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, held = packed
        return held.to(device, non_blocking=held.is_pinned())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
