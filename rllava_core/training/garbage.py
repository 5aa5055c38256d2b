"""What Python's garbage collector goes through while a run is under way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def long_lived_left_alone() -> Iterator[None]:
    """The collector looks only at what is made from here on, until the end.

    Modules, model and data are hundreds of thousands of objects: to go through them takes longer than a step of a small
    model, and finds nothing.
    """
    try:
        gc.freeze()
        yield
    finally:
        gc.unfreeze()


def settle() -> None:
    """Collect what was left behind, and leave alone from here on what is there: what was imported, built and made
    first."""
    gc.collect()
    gc.freeze()
