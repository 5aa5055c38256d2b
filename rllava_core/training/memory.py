"""The memory of this process: how much it took, and what it can do without."""

from __future__ import annotations

import ctypes
import sys

import torch


def give_back_free_memory() -> None:
    """Return to the system what the C library (glibc) has kept of freed memory, which may be as much as a step's
    activations: to be called where something else is about to need memory in other sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_memory_bytes() -> int:
    """The process's largest resident size so far; on a CUDA device the largest allocation there."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
