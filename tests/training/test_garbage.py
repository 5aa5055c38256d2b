"""During a run the garbage collector goes through what the run makes, and through nothing that was there before."""

from __future__ import annotations

import gc
import weakref

from rllava_core.training.garbage import long_lived_left_alone, settle


class Knot:
    """Refers to itself, so that only the collector can end it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_there_is_left_alone_until_the_end() -> None:
    before = Knot()
    with long_lived_left_alone():
        later = Knot()
        assert not any(item is before for item in gc.get_objects())
        assert any(item is later for item in gc.get_objects())
        settle()
        assert not any(item is later for item in gc.get_objects())
    assert any(item is before for item in gc.get_objects())


def test_what_is_left_behind_meanwhile_is_still_collected() -> None:
    with long_lived_left_alone():
        knot = weakref.ref(Knot())
        gc.collect()
        assert knot() is None


def test_what_was_left_alone_is_collected_afterwards() -> None:
    knot = Knot()
    seen = weakref.ref(knot)
    with long_lived_left_alone():
        del knot
    gc.collect()
    assert seen() is None


def test_what_was_left_behind_meanwhile_is_collected_before_the_rest_is_left_alone() -> None:
    with long_lived_left_alone():
        knot = weakref.ref(Knot())
        settle()
        assert knot() is None
