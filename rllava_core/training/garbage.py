"""What Python's garbage collector goes through while a run is under way."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def long_lived_left_alone() -> Iterator[Callable[[], None]]:
    """The collector looks only at what is made from here on, until the end.

    Modules, model and data are hundreds of thousands of objects: to go through them takes longer than a step of a small
    model, and finds nothing. What was left behind is collected before. To call what this gives is to begin anew: much
    is imported in the first step only.
    """
    try:
        _settle()
        yield _settle
    finally:
        gc.unfreeze()


def _settle() -> None:
    gc.collect()
    gc.freeze()
