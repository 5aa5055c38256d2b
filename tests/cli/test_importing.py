"""What commands import is not searched for garbage."""

from __future__ import annotations

import gc

import pytest

from rllava_core.cli.importing import importing


def test_nothing_is_collected_meanwhile_and_then_as_before() -> None:
    assert gc.isenabled()
    with importing():
        assert not gc.isenabled()
        with importing():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_failed_import_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), importing():
        import rllava_core.there_is_no_such_module  # noqa: F401
    assert gc.isenabled()
