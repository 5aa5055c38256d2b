"""Which examples are held out: decided by what they are, so that every run and every seed holds out the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def held_out_indices(keys: Sequence[str], fraction: float) -> frozenset[int]:
    """Indices of the share `fraction` of the keys, at least one of them; none for 0.

    The keys of lowest hash are held out. So no period or order of the data shows in the split, a line added later
    moves few others across it, and equal keys nearly always fall on one side. With two keys or more, both sides get
    one; a single key is never held out.
    """
    if fraction == 0:
        return frozenset()
    count = min(max(1, round(len(keys) * fraction)), len(keys) - 1)
    ranked = sorted(range(len(keys)), key=lambda index: (hashlib.sha256(keys[index].encode()).digest(), index))
    return frozenset(ranked[:count])
