"""The heap that a plan plays through, by hand and against the C library's own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from rllava_core.cli.heap import TUNABLES, _is_glibc
from rllava_core.planning.heap import BESIDE, KEPT, MAPPED, Heap, Recording, extent_of_update

MIB = 2**20

ASKED = """
import ctypes, json, sys
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free top".split()]
libc.mallinfo2.restype = Info
libc.free.argtypes = [ctypes.c_void_p]
libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
events = json.load(sys.stdin)
live = (ctypes.c_void_p * len(events))()
step = ctypes.sizeof(ctypes.c_void_p)
before = libc.mallinfo2()
for number, size in events:
    if size is None:
        libc.free(live[number])
    else:
        assert libc.posix_memalign(ctypes.byref(live, step * number), 64, size) == 0
after = libc.mallinfo2()
print(after.arena - before.arena + before.top)
"""


def test_a_hole_holds_what_is_smaller_and_the_smallest_that_is_large_enough_is_taken() -> None:
    heap = Heap()
    large, _, small, _ = (heap.allocate(size * MIB) for size in (8, 1, 4, 1))
    whole = heap.largest_extent
    heap.free(large)
    heap.free(small)
    assert heap.allocate(3 * MIB)[0] == pytest.approx(small[0], abs=64)
    assert heap.allocate(7 * MIB)[0] == pytest.approx(large[0], abs=64)
    assert heap.largest_extent == whole
    heap.allocate(2 * MIB)
    assert heap.largest_extent == pytest.approx(whole + 2 * MIB, abs=200)


def test_neighbours_are_joined() -> None:
    heap = Heap()
    first, second, _ = (heap.allocate(size * MIB) for size in (4, 4, 1))
    whole = heap.largest_extent
    heap.free(first)
    heap.free(second)
    heap.allocate(8 * MIB - 200)
    assert heap.largest_extent == whole


def test_large_blocks_are_mapped_and_leave_no_hole() -> None:
    heap = Heap()
    heap.free(heap.allocate(MAPPED))
    assert heap.largest_extent == MAPPED
    assert heap.extent == 0
    heap.allocate(MAPPED - 100)
    assert heap.largest_extent < MAPPED + 200


def test_the_end_stays_when_it_is_free_unless_it_is_large() -> None:
    heap = Heap()
    heap.free(heap.allocate(8 * MIB))
    assert heap.extent == pytest.approx(8 * MIB, abs=200)
    many = [heap.allocate(MAPPED - MIB) for _ in range(KEPT // MAPPED + 2)]
    assert heap.extent > KEPT
    for chunk in reversed(many):
        heap.free(chunk)
    assert heap.extent < KEPT


def test_thresholds_are_those_that_runs_begin_with() -> None:
    assert {f"glibc.malloc.mmap_threshold={MAPPED}", f"glibc.malloc.trim_threshold={KEPT}"} < set(TUNABLES.split(":"))


def test_gradients_of_the_last_step_are_freed_as_the_next_one_updates() -> None:
    """Blocks of 10 MiB: one of activations, and one that stays; the states of the optimizer are two, made after."""
    size = 10 * MIB
    step = Recording([(0, size), (1, size), (0, None)], frozenset({1}))
    close = 20 * (sum(BESIDE) + 200)
    # [activation, gradient, state], and one state where the first activation was.
    assert extent_of_update([], [step], [size, size]).worst == pytest.approx(4 * size, abs=close)
    assert extent_of_update([], [step], []).worst == pytest.approx(2 * size, abs=close)
    assert extent_of_update([], [step], [], [size]).worst == pytest.approx(3 * size, abs=close)
    mapped = Recording([(0, 4 * size), (1, size), (0, None)], frozenset({1}))
    found = extent_of_update([mapped], [mapped], [])
    assert found.worst - found.left == 4 * size


@pytest.mark.skipif(not _is_glibc(), reason="asks glibc's malloc")
@pytest.mark.parametrize("seed", range(4))
def test_the_c_library_takes_as_much(seed: int) -> None:
    """Tensors that stay stand between others that are freed; of what comes then, some fits into their holes."""
    chance = random.Random(seed)
    hole, stays = chance.randrange(2 * MIB, 4 * MIB), chance.randrange(MIB // 2, MIB)
    sizes = (
        [hole, stays] * 40 + [hole + chance.randrange(2000, MIB)] * 20 + [chance.randrange(hole // 2, hole - 300)] * 20
    )
    events: list[tuple[int, int | None]] = [*enumerate(sizes[:80])]
    events += [(number, None) for number in range(0, 80, 2)]
    events += enumerate(sizes[80:], start=80)
    done = subprocess.run(
        [sys.executable, "-c", ASKED],
        input=json.dumps(events),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "GLIBC_TUNABLES": TUNABLES},
    )
    heap, chunks = Heap(), {}
    for number, size in events:
        if size is None:
            heap.free(chunks.pop(number))
        else:
            chunks[number] = heap.allocate(size)
    assert heap.largest_extent == pytest.approx(int(done.stdout), rel=0.02)
    assert heap.largest_extent > 1.1 * sum(size for _, size in chunks.values()), "no holes were left"
