"""What is said of the process's memory."""

from __future__ import annotations

from rllava_core.training.memory import peak_memory_bytes


def test_peak_memory_is_in_bytes() -> None:
    """Python with torch takes more than 50 MiB and less than 1 TiB: kibibytes would be too few."""
    assert 50 * 2**20 < peak_memory_bytes() < 2**40
