"""Drawing in proportion to priorities, in a time that grows with the logarithm of their number. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class SumTree:
    """Non-negative numbers of a fixed number of places, and the sums of every pair, pair of pairs, and so on.

    A sum is always computed of its two parts, never changed by a difference: so it follows from the numbers alone, bit
    for bit, in whatever order they were set.
    """

    def __init__(self, places: int) -> None:
        self._leaves = 1 << max(places - 1, 0).bit_length()
        # Node i is the sum of nodes 2i and 2i + 1; the leaves are the last half.
        self._sums = np.zeros(2 * self._leaves)

    @property
    def total(self) -> float:
        return float(self._sums[1])

    def __getitem__(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """[B] the numbers at [B] places."""
        return self._sums[self._leaves + places]

    def __setitem__(self, places: NDArray[np.int64], values: NDArray[np.float64] | float) -> None:
        """Set the numbers at [B] places; of a place that is named twice, the last."""
        nodes = self._leaves + places
        self._sums[nodes] = values
        while nodes.size and nodes[0] > 1:
            nodes = np.unique(nodes // 2)
            self._sums[nodes] = self._sums[2 * nodes] + self._sums[2 * nodes + 1]

    def find(self, amounts: NDArray[np.float64]) -> NDArray[np.int64]:
        """[B] the places where the running sum of the numbers first exceeds each of [B] amounts below the total."""
        rest = amounts.copy()
        nodes = np.ones(len(amounts), dtype=np.int64)
        while nodes.size and nodes[0] < self._leaves:
            left, right = self._sums[2 * nodes], self._sums[2 * nodes + 1]
            # A rest that rounding has brought to the sum of the left half must not end at a number of zero.
            rightwards = (rest >= left) & (right > 0)
            rest -= np.where(rightwards, left, 0.0)
            nodes = 2 * nodes + rightwards
        return nodes - self._leaves
