"""How glibc hands out memory, which a process must be told before it begins."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

TUNABLES = ":".join(
    (
        "glibc.malloc.tcache_count=0",
        "glibc.malloc.mxfast=0",
        "glibc.malloc.mmap_threshold=33554432",
        "glibc.malloc.trim_threshold=1073741824",
    )
)
"""Tensors are aligned to 64 bytes: malloc cuts off what stands before the first such address, and keeps the piece in a
list for small blocks. There it goes to somebody else, and when the tensor is freed its hole is too short for another of
the same size: up to a third of the heap was such holes. Without these lists the piece is joined to the hole again.
The thresholds are where glibc's own end up (32 MiB), and keep the end of the heap, which the next step needs again."""

LEARNING = ("train",)
"""Commands whose memory is worth starting the interpreter again, a tenth of a second."""


def begin_with_whole_holes(arguments: Sequence[str]) -> None:
    """Begin this process anew with `TUNABLES`, where its command learns, the C library is glibc, and nobody has told it
    otherwise: by tunables of their own, or a variable such as MALLOC_MMAP_THRESHOLD_, which these would overrule.

    arguments: of the command line, without the program. What is started from here on gets no tunables.
    """
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command not in LEARNING or not sys.executable or not _is_glibc():
        return
    if os.environ.get("GLIBC_TUNABLES") == TUNABLES:
        del os.environ["GLIBC_TUNABLES"]
    elif not any(name == "GLIBC_TUNABLES" or re.fullmatch("MALLOC_.*_", name) for name in os.environ):
        os.environ["GLIBC_TUNABLES"] = TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        return False
