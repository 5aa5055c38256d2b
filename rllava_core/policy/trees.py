"""Trees: branches of tokens beside each other in one row, each of which goes on from its prefix or from another branch.

A token of a tree sees what its branch goes on from, and not what grows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rllava_core.policy.pieces import Piece


class Place(NamedTuple):
    """The state after `offset` tokens of a branch; without a branch, the end of the prefix itself."""

    prefix: int
    branch: int | None
    offset: int


class Branch(NamedTuple):
    """Tokens that go on from a place. In a packed batch, the first of a tree is the prefix, which goes on from none; in
    `after.offset` is the number of its tree."""

    after: Place
    piece: Piece


class Trees:
    """Branches, by number, in rows: each with what grows from it, and beside others of its prefix.

    A row is as long as its prefix at most, or as the longest that need not be cut. Then its tokens never see much more
    than they would alone, and the cache of the prefix is seldom copied.

    branches: none before the one that it goes on from.
    prefixes: by number.
    beside: off for a model that takes no trees, whose every row is one line.
    rows: the numbers of the branches of each.
    width: length of the longest row, in tokens.
    starts: where each branch, by number, begins in the flattened [B, T].
    """

    def __init__(self, branches: Sequence[Branch], prefixes: Sequence[Piece], *, beside: bool = True) -> None:
        self._branches = branches
        self._beside = beside
        self._lengths = [len(branch.piece.tokens) for branch in branches]
        self.rows = self._filled([prefix.start + len(prefix.tokens) for prefix in prefixes])
        self.width = max((sum(self._lengths[number] for number in row) for row in self.rows), default=0)
        self.starts = [0] * len(branches)
        for place, row in enumerate(self.rows):
            start = place * self.width
            for number in row:
                self.starts[number] = start
                start += self._lengths[number]

    @property
    def pieces(self) -> list[list[Piece]]:
        """Of each row."""
        return [[self._branches[number].piece for number in row] for row in self.rows]

    def sees(self) -> Tensor | None:
        """[B, T, T] bool, which tokens of its row a token sees; None where every row is one line."""
        if all(map(self._is_line, self.rows)):
            return None
        assert self._beside
        owner = np.full((len(self.rows), self.width), -1)
        for row, numbers in zip(owner, self.rows, strict=True):
            whose = np.repeat(numbers, [self._lengths[number] for number in numbers])
            row[: len(whose)] = whose
        sees = owner[:, :, None] == owner[:, None, :]
        sees &= np.tri(self.width, dtype=np.bool_)
        sees &= (owner >= 0)[:, None, :]
        flat = sees.reshape(-1, self.width)
        for number, (after, _) in enumerate(self._branches):
            if after.branch is not None:
                start = self.starts[number]
                flat[start : start + self._lengths[number]] |= flat[self.starts[after.branch] + after.offset - 1]
        return torch.from_numpy(sees)

    def _filled(self, limits: list[int]) -> list[list[int]]:
        """limits: how long the rows of each prefix may be, unless that cuts a branch from what grows from it."""
        grown: dict[int, list[int]] = {}  # by the branch that continues the prefix
        roots: list[int] = []
        for number, (after, _) in enumerate(self._branches):
            roots.append(number if after.branch is None else roots[after.branch])
            grown.setdefault(roots[number], []).append(number)
        lengths = {root: sum(self._lengths[number] for number in together) for root, together in grown.items()}
        for root, length in lengths.items():
            prefix = self._branches[root].after.prefix
            limits[prefix] = max(limits[prefix], length)
        rows: list[list[int]] = []
        filling: dict[int, tuple[list[int], int]] = {}  # by prefix: the row under way, and its length
        for root, together in grown.items():
            prefix = self._branches[root].after.prefix
            row, length = filling.get(prefix, ([], 0))
            if not row or not self._beside or length + lengths[root] > limits[prefix]:
                row, length = [], 0
                rows.append(row)
            row += together
            filling[prefix] = (row, length + lengths[root])
        return rows

    def _is_line(self, row: Sequence[int]) -> bool:
        """Whether each branch goes on from the end of the one before it."""
        return all(
            self._branches[number].after.branch == before
            and self._branches[number].after.offset == self._lengths[before]
            for before, number in pairwise(row)
        )
