"""What the C library's heap holds beside what is in use: holes that nothing has fitted into.

The heap of glibc is played through, block by block: in which order a step's tensors are made and freed decides how much
lies free between those that stay. It is that of a process that began as `rllava train` does, without lists for small
blocks (`rllava_core.cli.heap`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

MAPPED = 32 * 2**20
"""Blocks from which each is mapped by itself, and given back as soon as it is freed."""

KEPT = 2**30
"""Bytes that are free at the heap's end from which they are given back; fewer stay, for the next step needs them."""

ALIGNED = 64
"""Bytes to which torch has tensors aligned."""

LEAST = 32
"""Bytes of the smallest chunk."""

HEADER = 16
"""Bytes in front of what a chunk holds."""

BESIDE = (24, 40)
"""Bytes of small blocks that torch allocates with a tensor, and that live as long: roughly. They fit into what was cut
off in front of a tensor, so that it is not joined to the hole again. (Larger ones, of 300 and 500, changed nothing.)"""

Event: TypeAlias = tuple[int, int | None]
"""A block by its number: made with so many bytes, or freed (None)."""


@dataclass(frozen=True)
class Recording:
    """Blocks in the order in which a piece of code made and freed them. What is left is freed where it ends.

    kept: but for these blocks.
    """

    events: Sequence[Event]
    kept: frozenset[int]


class Heap:
    """glibc's `malloc` with one arena: of the free chunks that are large enough the smallest, or more at the end. Free
    neighbours are joined.

    largest_extent: bytes from the heap's beginning to where it ends, free or not, and of what is mapped, where they
        were most.
    """

    def __init__(self) -> None:
        self._end = 0  # of what is in use
        self._resident = 0
        self._mapped = 0
        self._free: list[tuple[int, int]] = []  # bytes, address; ascending
        self._size_at: dict[int, int] = {}  # of free chunks, by where they begin
        self._begin_of: dict[int, int] = {}  # and by where they end
        self.largest_extent = 0

    @property
    def extent(self) -> int:
        return self._resident + self._mapped

    def allocate(self, size: int) -> tuple[int, int]:
        """A block of a tensor's numbers. Returns where its chunk is, and the chunk's bytes; -1 of a mapped one."""
        if size >= MAPPED:
            self._mapped += size
            found = -1, size
        else:
            found = self._aligned(size)
        self.largest_extent = max(self.largest_extent, self.extent)
        return found

    def small(self, size: int) -> tuple[int, int]:
        """A block that need not be aligned."""
        return self._taken(_chunk(size))

    def free(self, chunk: tuple[int, int]) -> None:
        """Give back what `allocate` or `small` has returned."""
        address, size = chunk
        if address < 0:
            self._mapped -= size
        else:
            self._join(address, size)

    def play(self, recording: Recording) -> list[tuple[int, int]]:
        """Go through a recording. Returns the chunks of what it keeps."""
        live: dict[int, tuple[int, int]] = {}
        beside: dict[int, list[tuple[int, int]]] = {}

        def end(number: int) -> None:
            for chunk in beside.pop(number):
                self.free(chunk)
            if number not in recording.kept:
                self.free(live.pop(number))

        for number, size in recording.events:
            if size is None:
                end(number)
            else:
                live[number] = self.allocate(size)
                beside[number] = [self.small(bytes_) for bytes_ in BESIDE]
        for number in list(beside):
            end(number)
        return list(live.values())

    def _aligned(self, size: int) -> tuple[int, int]:
        """As `posix_memalign`: a chunk with room to spare, of which the ends that are not needed are free again."""
        wanted = _chunk(size)
        address, found = self._taken(wanted + ALIGNED + LEAST)
        before = -(address + HEADER) % ALIGNED
        if 0 < before < LEAST:
            before += ALIGNED
        if before:
            self._join(address, before)
        if found - before - wanted >= LEAST:
            self._join(address + before + wanted, found - before - wanted)
            return address + before, wanted
        return address + before, found - before

    def _taken(self, size: int) -> tuple[int, int]:
        index = bisect_left(self._free, (size, 0))
        if index == len(self._free):
            address, self._end = self._end, self._end + size
            self._resident = max(self._resident, self._end)
            return address, size
        found, address = self._free[index]
        self._remove(address, found)
        if found - size < LEAST:
            return address, found
        self._add(address + size, found - size)
        return address, size

    def _join(self, address: int, size: int) -> None:
        before = self._begin_of.get(address)
        if before is not None:
            self._remove(before, address - before)
            address, size = before, size + address - before
        behind = self._size_at.get(address + size)
        if behind is not None:
            self._remove(address + size, behind)
            size += behind
        if address + size == self._end:
            self._end = address
            if self._resident - self._end >= KEPT:
                self._resident = self._end
        else:
            self._add(address, size)

    def _add(self, address: int, size: int) -> None:
        insort(self._free, (size, address))
        self._size_at[address] = size
        self._begin_of[address + size] = address

    def _remove(self, address: int, size: int) -> None:
        del self._free[bisect_left(self._free, (size, address))]
        del self._size_at[address]
        del self._begin_of[address + size]


@dataclass(frozen=True)
class Extent:
    """Bytes of heap and mapped blocks: at the worst moment of a step's passes, and when they are over."""

    worst: int
    left: int


def extent_of_update(
    before: Sequence[Recording], passes: Sequence[Recording], states: Iterable[int], always: Iterable[int] = ()
) -> Extent:
    """What forward and backward passes need in the second step, for in the first the optimizer has no states.

    before: what a step computes first (rollouts, references), passes: its micro-batches, which keep gradients.
    states: bytes of the optimizer's states, made at the end of the first step; always: of what is there all the time.
    """
    heap = Heap()
    for size in always:
        heap.allocate(size)
    for recording in before:
        heap.play(recording)
    gradients = [chunk for recording in passes for chunk in heap.play(recording)]
    for size in states:
        heap.allocate(size)
    for recording in before:
        heap.play(recording)
    for chunk in gradients:
        heap.free(chunk)
    heap.largest_extent = heap.extent
    for recording in passes:
        heap.play(recording)
    return Extent(heap.largest_extent, heap.extent)


def _chunk(size: int) -> int:
    """Bytes of the chunk for so many: 8 of bookkeeping, and whole sixteens."""
    return max(LEAST, (size + 8 + 15) // 16 * 16)
