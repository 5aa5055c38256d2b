"""Whatever a plugin's code does while it is loaded becomes the reason why that plugin, and no other, is refused."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rllava_core.errors import what_happened


class RefusedError(Exception):
    """Why a plugin is not used, in one line; the exception behind it is its `__cause__`."""

    def __init__(self, reason: str, status: Literal["broken", "incompatible"] = "broken") -> None:
        super().__init__(reason)
        self.status: Literal["broken", "incompatible"] = status


@contextmanager
def contained() -> Iterator[None]:
    """Keep what a plugin's code does to the process from the command that runs: its output, and where it is."""
    before = os.getcwd()
    try:
        # Standard output belongs to the command, which may be writing JSON.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if os.getcwd() != before:
            os.chdir(before)


@contextmanager
def isolated(action: str) -> Iterator[None]:
    """Turn what a plugin raises, `sys.exit` included, into a RefusedError; what it prints goes to stderr.

    An interrupt by the user passes, and nothing else does: extensions in Rust panic, and test code skips, with
    exceptions that are no `Exception`.
    """
    try:
        with contained():
            yield
    except (KeyboardInterrupt, RefusedError):
        raise
    except BaseException as error:
        raise RefusedError(f"{action} {what_happened(error)}") from error
