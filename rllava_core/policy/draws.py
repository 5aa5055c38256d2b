"""What sampling draws: a function of a seed, an episode and a place in its action, and of nothing beside it.

A generator whose state goes from row to row would make an answer depend on which others are sampled in the same batch,
and so on how episodes are cut into batches or shared out over processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 256


def uniforms(seed: int, numbers: Sequence[int], places: int) -> NDArray[np.float64]:
    """[N, places] in [0, 1), one for each of the first `places` tokens of each episode `numbers`.

    A counter, hashed by SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
    """
    begin = _mixed(np.array([seed % 2**64], dtype=np.uint64))
    streams = _mixed(begin ^ _mixed(np.asarray(numbers, dtype=np.uint64) + _GOLDEN))  # [N]
    counters = np.arange(1, places + 1, dtype=np.uint64) * _GOLDEN
    return (_mixed(streams[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logprobs: Tensor, points: Tensor | None) -> Tensor:
    """[N] one index a row of [N, V] log-probs: as likely as its share, or the most probable one without points.

    points: [N] float64 in [0, 1), how far to go through the shares of each row. First a block of the vocabulary is
    found, then the place in the block, for a sum over all of a large vocabulary in double precision takes longer than
    the logits.
    """
    if points is None:
        return logprobs.argmax(dim=-1)
    shares = logprobs.exp()
    blocks = torch.nn.functional.pad(shares, (0, -shares.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    ends = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    point = points[:, None] * ends[:, -1:]
    block = _first_beyond(ends, point)
    within = point - torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    rows = torch.arange(len(shares), device=shares.device)
    place = _first_beyond(blocks[rows, block[:, 0]].double().cumsum(dim=1), within)
    return (block * _BLOCK + place)[:, 0]


def _first_beyond(ends: Tensor, point: Tensor) -> Tensor:
    """[N, 1] the first end of each row that is beyond a point, which rounding may not put beyond the last: what has no
    share is never drawn."""
    last = torch.nextafter(ends[:, -1:], torch.zeros_like(point))
    return torch.searchsorted(ends, torch.minimum(point.clamp(min=0.0), last), right=True)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
