"""Images on the host, made once an image: preprocessed, or encoded as the language model reads them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor

from rllava_core.mdp.images import Image
from rllava_core.policy.adapter import Features, ModelAdapter
from rllava_core.policy.config import ENCODED_BYTES


class MediaStore:
    """Features by content hash, the least recently used dropped beyond a limit of bytes.

    Trajectories keep their images, so an entry that was dropped is made again from the same pixels: the limit bounds
    memory and changes no result. Threads may ask at the same time.

    limit_bytes: of preprocessed images.
    """

    def __init__(self, adapter: ModelAdapter, limit_bytes: int = 2**30) -> None:
        self._adapter = adapter
        self._lock = Lock()
        self._preprocessed = _Kept(adapter.preprocess, limit_bytes)
        self._encoded: _Kept | None = None

    def encode_by(self, encode: Callable[[Features], Features], limit_bytes: int = ENCODED_BYTES) -> None:
        """From now on batches hold what `encode` makes of each preprocessed image."""
        self._encoded = _Kept(lambda image: encode(self._preprocessed.of(image)), limit_bytes)

    @property
    def encodes(self) -> bool:
        """Whether batches hold encoded images."""
        return self._encoded is not None

    def features(self, images: Sequence[Image]) -> list[Features]:
        """Each image preprocessed, in order. Raises DataError for an image that the model cannot take."""
        with self._lock:
            return [self._preprocessed.of(image) for image in images]

    def shown(self, images: Sequence[Image]) -> list[Features]:
        """Each image as a batch holds it: encoded, or preprocessed. Raises as `features` does."""
        with self._lock:
            return [(self._encoded or self._preprocessed).of(image) for image in images]

    def collated(self, shown: Sequence[Features]) -> dict[str, Tensor]:
        """Images of a batch, in order, as `ModelAdapter.hidden_states` takes them."""
        if not shown:
            return {}
        if self._encoded is None:
            return self._adapter.collate(shown)
        return {name: torch.cat([item[name] for item in shown]) for name in shown[0]}


class _Kept:
    """What was made of images, up to a limit of bytes."""

    def __init__(self, make: Callable[[Image], Features], limit: int) -> None:
        self._make = make
        self._limit = limit
        self._entries: OrderedDict[str, Features] = OrderedDict()
        self._bytes = 0

    def of(self, image: Image) -> Features:
        entry = self._entries.get(image.digest)
        if entry is None:
            entry = self._make(image)
            self._entries[image.digest] = entry
            self._bytes += _size(entry)
            while self._bytes > self._limit and len(self._entries) > 1:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= _size(dropped)
        else:
            self._entries.move_to_end(image.digest)
        return entry


def _size(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features.values())
