"""Whatever a plugin's code does while it is loaded becomes the reason why that plugin, and no other, is refused."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


class RefusedError(Exception):
    """Why a plugin is not used, in one line; the exception behind it is its `__cause__`."""

    def __init__(self, reason: str, status: Literal["broken", "incompatible"] = "broken") -> None:
        super().__init__(reason)
        self.status: Literal["broken", "incompatible"] = status


@contextmanager
def isolated(action: str) -> Iterator[None]:
    """Turn what a plugin raises, `sys.exit` included, into a RefusedError; what it prints goes to stderr.

    An interrupt by the user passes, and nothing else does: extensions in Rust panic, and test code skips, with
    exceptions that are no `Exception`.
    """
    try:
        # Standard output belongs to the command that is running, which may be writing JSON.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise RefusedError(f"{action} {what_happened(error)}") from error


def what_happened(error: BaseException) -> str:
    """`raised KeyError: …` or `called sys.exit(…)`, in one line."""
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r})"
    return " ".join(f"raised {type(error).__name__}: {error}".split())
