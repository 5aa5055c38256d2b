"""The replay: transitions within limits of number and memory, drawn in proportion to priorities. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rllava_core.errors import TrainingError
from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import Segment
from rllava_dqn.priorities import SumTree
from rllava_dqn.sharing import Held, Shelf
from rllava_dqn.transitions import Transition

RECORD_BYTES = 250
"""What CPython takes for a transition beside what its states and its action take: about, as in `sharing`."""


@dataclass(frozen=True, slots=True)
class Record:
    """A transition whose states and action are on the shelf."""

    context: Held
    action: Held
    reward: float
    discount: float
    final: Held | None
    seed: int

    @property
    def holds(self) -> tuple[Held, ...]:
        return (self.context, self.action) if self.final is None else (self.context, self.action, self.final)

    @property
    def transition(self) -> Transition:
        final = None if self.final is None else self.final.value
        return Transition(self.context.value, self.action.value, self.reward, self.discount, final, self.seed)


@dataclass(frozen=True)
class Sample:
    """B transitions that were drawn.

    numbers: [B] by which `set_priorities` knows them.
    probabilities: [B] of drawing each, with the priorities of the time.
    """

    transitions: tuple[Transition, ...]
    numbers: NDArray[np.int64]
    probabilities: NDArray[np.float64]


class Replay:
    """Transitions in the order in which they were added; the oldest leave first.

    first, end: the numbers of the oldest transition and of the one that would come next, counted from the beginning
        of the run.
    greatest: the greatest priority so far, which new transitions get, so that each is soon drawn once
        (arXiv:1511.05952, algorithm 1).
    shelf: what their states and actions share.
    """

    def __init__(self, size: int, limit_bytes: int) -> None:
        self.size = size
        self.limit_bytes = limit_bytes
        self.first = 0
        self.end = 0
        self.greatest = 1.0
        self.shelf = Shelf()
        self._records: dict[int, Record] = {}
        self._priorities = SumTree(size)

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def bytes(self) -> int:
        """Memory of all transitions; what several of them share counts once."""
        return self.shelf.bytes + RECORD_BYTES * len(self)

    @property
    def images(self) -> list[Image]:
        """The distinct images of all transitions."""
        return self.shelf.images

    @property
    def records(self) -> list[Record]:
        """Oldest first."""
        return list(self._records.values())

    @property
    def priorities(self) -> NDArray[np.float64]:
        """[transitions] oldest first."""
        return self._priorities[np.arange(self.first, self.end) % self.size]

    def add(self, transitions: Sequence[Transition]) -> None:
        """Add the transitions of an episode. Raises TrainingError if the last alone is beyond the limit of memory."""
        # By identity, as the contexts of an episode share segments: to find them all by their content would take time
        # in the square of the turns.
        known: dict[int, Held] = {}
        records = [
            Record(
                self._context(transition.context, known),
                self.shelf.segment(transition.action),
                transition.reward,
                transition.discount,
                None if transition.final is None else self._context(transition.final, known),
                transition.seed,
            )
            for transition in transitions
        ]
        self.extend(records, np.full(len(records), self.greatest))

    def extend(self, records: Sequence[Record], priorities: NDArray[np.float64]) -> None:
        """Add transitions whose states and actions are on the shelf, with their priorities; let the oldest go."""
        for record in records:
            for held in record.holds:
                self.shelf.hold(held)
            self._records[self.end] = record
            self.end += 1
        latest = min(len(records), self.size)
        if latest:
            self._priorities[np.arange(self.end - latest, self.end) % self.size] = priorities[-latest:]
        self._let_the_oldest_go()

    def sample(self, random: NDArray[np.float64]) -> Sample:
        """Draw as many as there are numbers in `random`, which are uniform in [0, 1).

        Each comes from a stretch of its own of the priorities' sum, all of the same length (arXiv:1511.05952, appendix
        B.2.1): so one may be drawn twice, and what is drawn is spread as evenly as the priorities are.
        """
        count = len(random)
        total = self._priorities.total
        # Below the total even where rounding says otherwise.
        amounts = np.minimum((np.arange(count) + random) / count * total, np.nextafter(total, 0.0))
        places = self._priorities.find(amounts)
        numbers = self.first + (places - self.first) % self.size
        return Sample(
            tuple(self._records[number].transition for number in numbers.tolist()),
            numbers,
            self._priorities[places] / total,
        )

    def set_priorities(self, numbers: NDArray[np.int64], priorities: NDArray[np.float64]) -> None:
        """Give transitions that were drawn, and have not left since, priorities above zero."""
        self.greatest = max(self.greatest, float(priorities.max()))
        self._priorities[numbers % self.size] = priorities

    def _context(self, segments: Sequence[Segment], known: dict[int, Held]) -> Held:
        for segment in segments:
            if id(segment) not in known:
                known[id(segment)] = self.shelf.segment(segment)
        return self.shelf.context(tuple(known[id(segment)] for segment in segments))

    def _let_the_oldest_go(self) -> None:
        before = self.first
        while len(self) > self.size or (self.bytes > self.limit_bytes and len(self)):
            oldest = self._records.pop(self.first)
            if len(self) == 1:
                raise TrainingError(
                    f"one turn of the episode with seed {oldest.seed} takes {self.bytes:,} bytes of the replay, whose "
                    f"limit algorithm.replay_bytes is {self.limit_bytes:,}: raise it, or show smaller images or a "
                    "shorter task.history"
                )
            for held in oldest.holds:
                self.shelf.let_go(held)
            self.first += 1
        gone = np.arange(before, self.first)
        # The places of others have been taken by transitions that came since.
        self._priorities[gone[gone >= self.end - self.size] % self.size] = 0.0
